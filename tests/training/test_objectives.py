"""Objectives: what a step differentiates, divides by and reports, and a reference model without adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import tiny_model
from fixtures.batches import adapters_with_b, batch_of, random_ids
from flax import nnx

from qlora_jax.data import TOKEN_FIELDS, Field
from qlora_jax.optimizers import PagedOptimizer
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.config import StepConfig, TrainConfig
from qlora_jax.training.losses import next_token_loss
from qlora_jax.training.objectives import NextToken, Sums, objective_of
from qlora_jax.training.step import TrainState, make_eval_step, make_gradient_step, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class DistanceToReference:
    """A toy: squared distance of the final hidden states to those without adapters, weighted by row."""

    fields = (TOKEN_FIELDS[0], TOKEN_FIELDS[2], Field("row_weights", "float32", "B"))
    unit = "rows"
    uses_reference = True

    def sums(self, model, batch, *, dropout_key, remat, reference=None):
        arguments = batch["input_ids"], batch["positions"]
        hidden, _ = model(*arguments, dropout_key=dropout_key, remat=remat)
        target, _ = reference(*arguments)
        distance = jnp.mean((hidden - jax.lax.stop_gradient(target)) ** 2, axis=(1, 2))
        weights = batch["row_weights"]
        return Sums(jnp.sum(weights * distance), jnp.sum(weights), {"moved_rows": jnp.sum(distance > 0)})

    def examples(self, rows, tokenizer, config):
        raise NotImplementedError

    def derived(self, loss):
        return {"distance": loss**0.5}


@pytest.fixture(scope="module")
def built():
    graphdef, lora, frozen = tiny_model.build(quantization=QuantizationConfig())
    reference, nothing, same = tiny_model.build(quantization=QuantizationConfig(), modules=None)
    assert not jax.tree.leaves(nothing)
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    return graphdef, adapters_with_b(lora), frozen, reference


def toy_batch(micro_batches):
    ids = random_ids(4, 16)
    batch = batch_of(ids)
    arrays = {"input_ids": batch["input_ids"], "positions": batch["positions"]}
    arrays["row_weights"] = jnp.asarray([0.125, 0.25, 0.0, 0.0625])  # less than one row in all
    return jax.tree.map(lambda array: array.reshape(micro_batches, -1, *array.shape[1:]), arrays)


def toy_step(built, micro_batches, **changes):
    graphdef, _, _, reference = built
    config = StepConfig(micro_batches=micro_batches, **changes)
    return make_gradient_step(graphdef, config, objective=DistanceToReference(), reference=reference)


@pytest.mark.e2e
def test_an_objective_with_a_reference_model_trains(built):
    graphdef, lora, frozen, reference = built
    before = [np.array(leaf) for leaf in jax.tree.leaves(frozen)]
    optimizer = PagedOptimizer(optax.adam(1e-2), lora)
    step = make_train_step(
        graphdef, optimizer, StepConfig(micro_batches=2), objective=DistanceToReference(), reference=reference
    )
    state = TrainState.create(jax.tree.map(jnp.copy, lora), optimizer)
    losses = []
    for _ in range(6):
        state, report = step(state, frozen, toy_batch(2))
        losses.append(float(report.loss))
    # The adapters unlearn what they do.
    assert losses[-1] < losses[0] / 2
    assert float(report.weight) == 0.4375
    assert report.metrics.keys() == {"moved_rows"}
    for old, new in zip(before, jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(old, new)
    # Without adapters the two models are one, but for the rounding of their two subgraphs.
    fresh = jax.tree.map(jnp.zeros_like, lora)
    sums = make_eval_step(graphdef, objective=DistanceToReference(), reference=reference)
    distance = float(sums(fresh, frozen, jax.tree.map(lambda a: a[0], toy_batch(1))).loss)
    assert 0.0 <= distance < 1e-8 < losses[-1]


@pytest.mark.e2e
def test_sums_of_any_weight_and_further_metrics_add_up_over_micro_batches(built):
    _, lora, frozen, _ = built
    step = jnp.zeros((), jnp.int32)
    (gradients, whole), (parts_gradients, parts) = (
        toy_step(built, n)(lora, frozen, toy_batch(n), step) for n in (1, 2)
    )
    assert float(whole.weight) == float(parts.weight) == 0.4375
    for a, b in zip(jax.tree.leaves((gradients, whole)), jax.tree.leaves((parts_gradients, parts)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert float(whole.scale) == pytest.approx(1 / 0.4375)
    assert float(whole.metrics["moved_rows"]) == pytest.approx(4 / 0.4375)
    # The mean gradient: divided by the weight, not by the rows.
    norm = optax.tree.norm(gradients) / 0.4375
    np.testing.assert_allclose(whole.grad_norm, norm, rtol=1e-5)


def test_a_batch_without_weight_has_a_finite_loss_of_zero(built):
    _, lora, frozen, _ = built
    batch = toy_batch(1) | {"row_weights": jnp.zeros((1, 4))}
    _, metrics = toy_step(built, 1)(lora, frozen, batch, jnp.zeros((), jnp.int32))
    assert (float(metrics.loss), float(metrics.grad_norm), bool(metrics.finite)) == (0.0, 0.0, True)


def test_a_batch_of_other_micro_batches_is_refused(built):
    _, lora, frozen, _ = built
    with pytest.raises(ValueError, match="batch field input_ids has 2 micro-batches; the step was made for 4"):
        toy_step(built, 4)(lora, frozen, toy_batch(2), jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("packing", [False, True])
def test_next_token_is_the_objective_of_a_run(built, packing):
    graphdef, lora, frozen, _ = built
    objective = objective_of(TrainConfig(packing=packing))
    assert objective == NextToken(packed=packing)
    names = [field.name for field in objective.fields]
    assert names == ["input_ids", "labels", "positions", *(["segment_ids"] if packing else [])]
    assert not objective.uses_reference
    assert objective.derived(2.0) == {"perplexity": pytest.approx(np.e**2)}
    assert np.isfinite(objective.derived(1e9)["perplexity"])
    ids = random_ids(2, 16)
    batch = batch_of(ids)
    if packing:
        batch["segment_ids"] = jnp.asarray(np.repeat([[1] * 9 + [2] * 7], 2, axis=0), jnp.int32)
        batch["positions"] = jnp.asarray(np.repeat([[*range(9), *range(7)]], 2, axis=0), jnp.int32)
    sums = make_eval_step(graphdef, objective=objective)(lora, frozen, {name: batch[name] for name in names})

    model = nnx.merge(graphdef, lora, frozen)
    hidden, _ = model(batch["input_ids"], batch["positions"], segment_ids=batch["segment_ids"] if packing else None)
    loss, count = next_token_loss(hidden, model.head, batch["labels"])
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
    assert (int(sums.weight), sums.metrics) == (int(count), {})
