"""The training step: its loss, its promises about the frozen base, accumulation, dropout, schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import tiny_model
from fixtures.batches import adapters_with_b, batch_of, random_ids
from flax import nnx

from qlora_jax import models
from qlora_jax.data import IGNORED
from qlora_jax.nn.linear import low_rank
from qlora_jax.optimizers import PagedOptimizer
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.config import StepConfig, TrainConfig
from qlora_jax.training.losses import next_token_loss
from qlora_jax.training.schedule import learning_rate_schedule, make_optimizer
from qlora_jax.training.step import TrainState, make_eval_step, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


def plain_loss(hidden, head, labels):
    logits = jnp.einsum("bsd,vd->bsv", hidden.astype(jnp.float32), head.astype(jnp.float32))[:, :-1]
    targets = labels[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(targets == IGNORED, 0, targets))
    return jnp.sum(jnp.where(targets == IGNORED, 0, losses))


@pytest.mark.parametrize("masked", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("chunk", [7, 16, 512])
def test_chunked_loss_equals_the_plain_one(masked, chunk):
    rng = np.random.default_rng(1)
    hidden, head = jnp.asarray(rng.normal(size=(3, 20, 16)), jnp.float32), jnp.asarray(rng.normal(size=(50, 16)))
    labels = jnp.asarray(np.where(rng.random((3, 20)) < masked, IGNORED, rng.integers(0, 50, (3, 20))), jnp.int32)
    head = head.astype(jnp.float32)
    ours = lambda h: next_token_loss(h, head, labels, chunk=chunk)[0]  # noqa: E731
    want, want_gradient = jax.value_and_grad(plain_loss)(hidden, head, labels)
    got, got_gradient = jax.jit(jax.value_and_grad(ours))(hidden)
    np.testing.assert_allclose(ours(hidden), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got_gradient, want_gradient, rtol=1e-5, atol=1e-6)
    assert int(next_token_loss(hidden, head, labels, chunk=chunk)[1]) == int(jnp.sum(labels[:, 1:] != IGNORED))


@pytest.mark.parametrize("vocabulary", [1024, 2048, 2100])
def test_loss_of_a_vocabulary_of_several_blocks(vocabulary):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(2, 9, 16)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(vocabulary, 16)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, vocabulary, (2, 9)), jnp.int32)
    want, want_gradient = jax.value_and_grad(plain_loss)(hidden, head, labels)
    got, got_gradient = jax.jit(jax.value_and_grad(lambda h: next_token_loss(h, head, labels)[0]))(hidden)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got_gradient, want_gradient, rtol=1e-5, atol=1e-5)


def test_loss_survives_huge_logits():
    hidden = jnp.full((1, 4, 8), 1e4, jnp.float32)
    head = jnp.asarray(np.eye(8), jnp.float32)
    loss, gradient = jax.value_and_grad(lambda h: next_token_loss(h, head, jnp.zeros((1, 4), jnp.int32))[0])(hidden)
    assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient))


def test_low_rank_derivatives():
    rng = np.random.default_rng(2)
    x, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 12), (3, 12), (7, 3)))
    plain = lambda x, a, b: jnp.sum(jnp.sin(1.5 * (x @ a.T) @ b.T))  # noqa: E731
    ours = lambda x, a, b: jnp.sum(jnp.sin(low_rank(1.5, x, a, b)))  # noqa: E731
    for got, want in zip(jax.grad(ours, (0, 1, 2))(x, a, b), jax.grad(plain, (0, 1, 2))(x, a, b), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def quantized():
    graphdef, lora, frozen = tiny_model.build(quantization=QuantizationConfig())
    return graphdef, adapters_with_b(lora), frozen


@pytest.mark.parametrize(
    "quant_type", ["nf4", "int8", *(pytest.param(each, marks=pytest.mark.e2e) for each in ("fp4", "none"))]
)
def test_training_changes_adapters_and_not_one_bit_of_the_base(quant_type):
    graphdef, lora, frozen = tiny_model.build(quantization=QuantizationConfig(quant_type), dropout=0.1)
    before = [np.array(leaf) for leaf in jax.tree.leaves(frozen)]
    optimizer = make_optimizer(TrainConfig(learning_rate=1e-2), 8, lora)
    state = TrainState.create(lora, optimizer)
    # The optimizer holds two moments for every adapter leaf and nothing for the base.
    adapter_elements = sum(leaf.size for leaf in jax.tree.leaves(lora))
    moments = [leaf for leaf in jax.tree.leaves(optimizer.gather(state.opt_state)) if leaf.ndim > 1]
    assert sum(leaf.size for leaf in moments) == 2 * adapter_elements
    assert {leaf.shape for leaf in moments} == {leaf.shape for leaf in jax.tree.leaves(lora)}
    step = make_train_step(graphdef, optimizer, StepConfig(dropout=True, max_grad_norm=0.3))
    batch = batch_of(random_ids(1, 2, 16))
    losses = []
    for _ in range(8):
        state, report = step(state, frozen, batch)
        losses.append(float(report.loss))
    assert losses[-1] < losses[0] - 0.1
    for old, new in zip(before, jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(old, new)
    for path, leaf in models.flatten(state.lora).items():
        assert np.any(np.asarray(leaf) != 0), path


def test_gradient_is_that_of_the_dequantised_model(quantized):
    graphdef, lora, frozen = quantized
    from qlora_jax.quantization import QuantizedTensor, dequantize

    plain_graphdef, _, plain_frozen = tiny_model.build()
    values = {
        path: dequantize(value, jnp.float32) if isinstance(value, QuantizedTensor) else value
        for path, value in models.flatten(frozen).items()
    }
    plain_frozen = models.fill_base(plain_frozen, values)
    batch = batch_of(random_ids(2, 24))

    def loss(lora, graphdef, frozen):
        model = nnx.merge(graphdef, lora, frozen)
        hidden, _ = model(batch["input_ids"], batch["positions"])
        return plain_loss(hidden, model.head, batch["labels"]) / 46

    want = jax.grad(loss)(lora, plain_graphdef, plain_frozen)
    sgd = PagedOptimizer(optax.sgd(1.0), lora)
    state, _ = make_train_step(graphdef, sgd, StepConfig())(
        TrainState.create(jax.tree.map(jnp.copy, lora), sgd), frozen, jax.tree.map(lambda a: a[None], batch)
    )
    got = jax.tree.map(jnp.subtract, lora, state.lora)
    for path, value in models.flatten(want).items():
        np.testing.assert_allclose(models.flatten(got)[path], value, atol=2e-5, rtol=1e-3)
        assert np.abs(value).max() > 1e-5


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.e2e), "full"])
def test_accumulation_equals_one_large_batch(quantized, remat):
    graphdef, lora, frozen = quantized
    ids = random_ids(4, 16)
    labels = ids.copy()
    labels[0, :13] = IGNORED  # micro-batches with different numbers of trained tokens
    sgd = PagedOptimizer(optax.sgd(1.0), lora)
    results = []
    for micro_batches in (1, 4):
        step = make_train_step(graphdef, sgd, StepConfig(remat=remat, micro_batches=micro_batches))
        batch = jax.tree.map(lambda a: a.reshape(micro_batches, -1, 16), batch_of(ids, labels))  # noqa: B023
        results.append(step(TrainState.create(jax.tree.map(jnp.copy, lora), sgd), frozen, batch))
    np.testing.assert_allclose(results[0][1].loss, results[1][1].loss, rtol=1e-5)
    assert int(results[0][1].weight) == int(results[1][1].weight) == 45 + 3
    for a, b in zip(jax.tree.leaves(results[0][0].lora), jax.tree.leaves(results[1][0].lora), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_evaluation_loss_is_the_training_loss_without_dropout(quantized):
    graphdef, lora, frozen = quantized
    batch = batch_of(random_ids(2, 16))
    total, count, _ = make_eval_step(graphdef)(lora, frozen, batch)
    sgd = PagedOptimizer(optax.sgd(0.0), lora)
    state = TrainState.create(jax.tree.map(jnp.copy, lora), sgd)
    _, report = make_train_step(graphdef, sgd, StepConfig())(state, frozen, jax.tree.map(lambda a: a[None], batch))
    np.testing.assert_allclose(total / count, report.loss, rtol=1e-6)


def test_dropout_follows_seed_and_step():
    graphdef, lora, frozen = tiny_model.build(dropout=0.5)
    lora = adapters_with_b(lora)
    sgd = PagedOptimizer(optax.sgd(0.0), lora)
    batch = batch_of(random_ids(1, 2, 16))
    steps = {seed: make_train_step(graphdef, sgd, StepConfig(dropout=True, seed=seed)) for seed in (0, 1)}

    def loss(seed, step):
        state = TrainState.create(jax.tree.map(jnp.copy, lora), sgd)
        state = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))
        return float(steps[seed](state, frozen, batch)[1].loss)

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(0, 3), loss(0, 4), loss(1, 3)}) == 3


def test_a_step_that_is_not_finite_keeps_the_last_good_state(quantized):
    graphdef, lora, frozen = quantized
    optimizer = make_optimizer(TrainConfig(), 4, lora)
    step = make_train_step(graphdef, optimizer, StepConfig())
    poisoned = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.inf), lora)
    state = TrainState.create(poisoned, optimizer)
    expected = [np.array(leaf) for leaf in jax.tree.leaves((state.lora, state.opt_state))]
    state, report = step(state, frozen, batch_of(random_ids(1, 1, 8)))
    assert not np.isfinite(report.loss)
    for old, new in zip(expected, jax.tree.leaves((state.lora, state.opt_state)), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 60: 1.0, 99: 1.0}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}),
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0}),
    ],
)
def test_schedules(kind, expected):
    config = TrainConfig(learning_rate=1.0, lr_scheduler_type=kind, warmup_ratio=0.1)
    schedule = learning_rate_schedule(config, 100)
    for step, rate in expected.items():
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-6)


def test_schedule_without_warm_up_starts_at_the_peak():
    config = TrainConfig(learning_rate=3e-4, warmup_ratio=0.0)
    assert float(learning_rate_schedule(config, 10)(0)) == pytest.approx(3e-4)
