"""The planner's arithmetic: searching for the longest sequence, counting products, bounds, bytes by class."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from fixtures.tiny_configs import LLAMA

from qlora_jax import models
from qlora_jax.data import abstract_batch
from qlora_jax.gpus import CHIPS
from qlora_jax.nn.attention import Attention
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.planner import (
    BaseBytes,
    Phase,
    Plan,
    Program,
    StepCost,
    bound,
    count_products,
    describe,
    longest_sequence,
    tree_bytes,
    visible_fraction,
)
from qlora_jax.planner.search import COARSE, FINE, SWITCH, step_above
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training import losses, setup
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import NextToken


def linear(crossing: int):
    return lambda length: 60e3 * (length - crossing)


def bent(crossing: int):
    """Slopes that differ by ten: another algorithm takes over in the middle."""
    return lambda length: (length - crossing) * (6e3 if length < crossing / 2 else 60e3)


def stepped(crossing: int):
    """In tiles of 2048: flat in between."""
    return lambda length: 60e3 * (math.ceil(length / 2048) * 2048 - crossing)


def quadratic(crossing: int):
    return lambda length: length**2 - crossing**2


def refused(crossing: int):
    """A compiler that gives up, without a number."""
    return lambda length: 60e3 * (length - 10 * crossing) if length <= crossing else math.inf


@pytest.mark.parametrize("shape", [linear, bent, stepped, quadratic, refused])
@pytest.mark.parametrize("crossing", [100, 700, 4095, 4097, 30_000, 262_144, 1_500_000])
@pytest.mark.parametrize("start", [512, 8192])
def test_the_length_found_fits_and_the_next_one_does_not(shape, crossing, start):
    excess = shape(crossing)
    found = longest_sequence(excess, start=start)
    if found.length:
        assert excess(found.length) <= 0
        assert found.length % (FINE if found.length < SWITCH else COARSE) == 0
        assert found.next_length == found.length + step_above(found.length)
    else:
        assert found.next_length == FINE
    assert excess(found.next_length) > 0
    assert {found.length, found.next_length} - {0} <= set(found.evaluations)
    assert len(found.evaluations) == len(set(found.evaluations)) <= (7 if shape is linear else 18)


def test_a_maximum_ends_the_search():
    assert longest_sequence(linear(1e9), start=512, maximum=131_072).length == 131_072
    found = longest_sequence(linear(1e9), start=999_999, maximum=5000)
    assert (found.length, found.next_length, found.evaluations) == (4096, None, (4096,))


def products(function, *shapes, trips=1.0):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_products(jax.jit(function).trace(*arguments).jaxpr, trips=trips)


def test_products_of_loops_branches_and_derivatives():
    one = 2.0 * 4 * 8 * 8
    x, w = (4, 8), (8, 8)
    assert products(lambda x, w: x @ w, x, w).plain == one
    assert products(lambda x, w: jax.lax.scan(lambda h, _: (h @ w, None), x, length=5)[0], x, w).plain == 5 * one
    assert products(lambda x, w: jax.lax.map(lambda row: row @ w, x), x, w).plain == one
    looped = products(lambda x, w: jax.lax.fori_loop(0, x[0, 0].astype(int), lambda _, h: h @ w, x), x, w, trips=2.5)
    assert looped.plain == 2.5 * one
    cheapest = products(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), x, w)
    assert cheapest.plain == one
    by_platform = products(
        lambda x, w: jax.lax.platform_dependent(x, w, cpu=lambda x, w: x @ w @ w, default=lambda x, w: x @ w), x, w
    )
    assert by_platform.plain == one
    # What nothing reads is not counted, nor are rules for derivatives that are not taken.
    assert products(lambda x, w: (x @ w, x)[1], x, w).plain == 0
    both = products(jax.grad(lambda x, w: (x @ w).sum() ** 2, argnums=(0, 1)), x, w)
    assert both.plain == 3 * one
    batched = products(lambda q, k: jnp.einsum("bsd,btd->bst", q, k), (2, 4, 8), (2, 4, 8))
    assert (batched.plain, batched.batched) == (0, 2.0 * 2 * 4 * 4 * 8)


@pytest.mark.parametrize("recomputed", [True, False])
def test_products_of_a_training_step_follow_its_shapes(recomputed):
    """Two for a weight and token in each pass over the base, three passes if the forward one is repeated."""
    config = TrainConfig(
        lora_r=4, kernel="xla", gradient_checkpointing=recomputed, bf16=False, gradient_accumulation_steps=1
    )
    model_config = models.model_config(LLAMA)
    lora_config = LoRAConfig(4, 16.0, 0.0, models.lora_modules(model_config, "all"))
    model = setup.declare_model(config, model_config, lora_config, jnp.float32)
    step = setup.make_step(config, model, 10)
    batch = abstract_batch(NextToken().fields, 1, 2, 64)
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    traced = step.gradient_step.trace(step.optimizer.abstract_lora(), model.frozen, batch, counter)
    tokens = 2 * 64
    found = count_products(traced.jaxpr, trips=tokens / min(losses.default_chunk(96), tokens))

    layers, d, f, kv, vocabulary = 3, 64, 128, 32, 96
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)]
    forward = 2.0 * tokens * layers * sum(n * k for n, k in shapes)
    down = 2.0 * tokens * layers * d * f
    low = 2.0 * tokens * layers * 4 * sum(n + k for n, k in shapes)
    up_of_down = 2.0 * tokens * layers * 4 * d
    head = 2 * 2.0 * tokens * d * vocabulary
    # Nothing needs the last linear's output a second time.
    repeated = forward - down + low - up_of_down if recomputed else 0
    assert found.plain == pytest.approx(2 * forward + 3 * low + head + repeated, rel=1e-12)
    scores = 2 * 2.0 * tokens * 64 * d * layers
    # Scores are computed again whatever is kept; their gradient takes twice as many products.
    assert 3 * scores <= found.batched <= 4 * scores


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 1), (7, 50), (64, 16)])
def test_the_visible_share_of_the_scores(length, window, causal):
    facts = Attention(causal=causal, window=window)
    seen = facts.visible(jnp.arange(length), jnp.arange(length)).sum()
    assert visible_fraction(length, facts) == pytest.approx(float(seen) / length**2)


def test_a_bound_is_what_takes_longest():
    chip = CHIPS["h100"]
    work = StepCost(tokens=1000, flops=chip.bf16_flops, device_bytes=0, host_bytes=int(2 * chip.host_bandwidth))
    limit = bound(chip, work)
    assert (limit.seconds, limit.limited_by, limit.tokens_per_second) == (2.0, "host link", 500.0)
    limit = bound(chip, StepCost(1000, chip.bf16_flops, int(3 * chip.memory_bandwidth), 0))
    assert (limit.seconds, limit.limited_by) == (3.0, "memory")


GIB = 2**30


def two_phases(temporaries=GIB):
    scopes = {"mlp": temporaries // 2, "attention": temporaries // 4}
    gradients = Program(5 * GIB, 2 * GIB, 0, temporaries, 0, host_temporaries=7, name="gradients", scopes=scopes)
    update = Program(3 * GIB, 2 * GIB, 2 * GIB, 0, 0, 0, name="optimizer update")
    return (
        Phase(gradients, {"base_packed": 4 * GIB, "adapters": GIB, "optimizer_device": 2 * GIB}, {"gradients": GIB}),
        Phase(update, {"base_packed": 4 * GIB, "adapters": GIB, "optimizer_device": 2 * GIB, "gradients": GIB}),
    )


def test_classes_add_up_and_the_fullest_phase_counts():
    plan = Plan(CHIPS["rtx4090"], two_phases(), {"optimizer_host": 10 * GIB})
    assert plan.fullest is plan.phases[0]
    # A result that no class claims is a temporary.
    assert plan.by_class["temporaries"] == 2 * GIB
    assert plan.device_bytes == sum(plan.by_class.values()) == 10 * GIB + plan.allowance.total
    # Program 1 takes the base and the adapters; what it does not take lies there all the same.
    assert plan.device_bytes - plan.allowance.total == plan.phases[0].program.peak + 2 * GIB
    assert plan.phases[1].device_bytes == 8 * GIB
    assert plan.allowance.context == 512 * 2**20
    assert plan.allowance.reserve == math.ceil(0.02 * 24 * GIB)
    assert (plan.host_bytes, plan.fits, plan.device_limit) == (10 * GIB, True, 24 * GIB)
    assert plan.excess == plan.device_bytes - plan.device_limit


def test_both_limits_hold():
    chip = CHIPS["rtx4090"]
    assert not Plan(chip, two_phases(20 * GIB), {}).fits
    host = Plan(chip, two_phases(), {"optimizer_host": 10 * GIB}, host_limit=9 * GIB)
    assert (host.fits, host.excess) == (False, GIB)
    assert "the host lacks 1.07 GB (1.00 GiB)" in describe(host)


def test_what_is_printed_names_every_class_and_the_allowance():
    text = describe(Plan(CHIPS["rtx4090"], two_phases(), {"optimizer_host": 10 * GIB}))
    for words in (
        "packed base", "adapters", "gradients", "optimizer", "activations and temporaries",
        "allowance: CUDA context 512.0 MiB, reserve 2%", "optimizer update",
        "of 25.77 GB (24.00 GiB): fits, ",
        "Most of the temporaries of gradients, of 1.0 GiB: mlp 512.0 MiB, attention 256.0 MiB",
    ):  # fmt: skip
        assert words in text
    assert re.search(r"^  on the host \(pinned\)\n  optimizer +10\.0 GiB$", text, re.MULTILINE)


@pytest.mark.parametrize("quant_type", ["nf4", "int8", "none"])
def test_bytes_of_a_base_are_all_of_it(quant_type):
    precision = QLoRAConfig(QuantizationConfig(quant_type), jnp.bfloat16, None)
    _, _, frozen = models.split_model(models.abstract_model(models.model_config(LLAMA), precision))
    base = BaseBytes.of(frozen)
    classes = base.by_class
    assert sum(classes.values()) == tree_bytes(frozen)
    linears = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    expected = {"nf4": linears // 2, "int8": linears, "none": 2 * linears}[quant_type]
    assert classes["unquantised_linear" if quant_type == "none" else "base_packed"] == expected
    assert classes["unquantised_embedding"] == 2 * 96 * 64
    assert "unquantised_head" not in classes
    assert base.head == classes["unquantised_embedding"]  # tied
    assert base.linears == sum(classes.values()) - sum(base.unquantised[kind] for kind in ("embedding", "norm"))


def test_arguments_that_the_compiler_counts_otherwise_are_an_error():
    x = jax.ShapeDtypeStruct((64,), jnp.float32)
    empty = {"absent": None, "unread": x}
    compiled = jax.jit(lambda x, more: x + 1).lower(x, empty).compile()
    program = Program.checked("p", compiled, (x, empty))
    assert (program.arguments, program.outputs) == (256, 256)
    with pytest.raises(RuntimeError, match="p: the compiler counts 256 bytes of arguments, their shapes say 512"):
        Program.checked("p", compiled, (jax.ShapeDtypeStruct((128,), jnp.float32), empty))
