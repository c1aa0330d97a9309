"""Rematerialisation policies, sequence tiles and groups of heads: less memory, the same numbers."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import tiny_model
from fixtures.batches import array
from fixtures.tiny_configs import LLAMA
from flax import nnx

from qlora_jax.choices import Remat
from qlora_jax.nn import attention, long_sequence, remat
from qlora_jax.planner import count_products
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.config import StepConfig, TrainConfig
from qlora_jax.training.step import make_gradient_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


def cut_small(patch):
    """Make tiles and groups of heads so small that a tiny model's sequence falls into several."""
    patch.setattr(long_sequence, "TILE", 32)
    patch.setattr(long_sequence, "_MULTIPLE", 8)
    patch.setattr(attention, "_BUSY_BLOCKS", 1)


@pytest.fixture
def small_pieces(monkeypatch):
    cut_small(monkeypatch)


@functools.cache
def model(dropout: float = 0.0):
    # Dropout of one adapter before attention, one after it, and one of the MLP: fewer masks compile faster.
    modules = "q_proj,o_proj,down_proj" if dropout else "all"
    graphdef, lora, frozen = tiny_model.build(quantization=QuantizationConfig(), dropout=dropout, modules=modules)
    return graphdef, jax.tree.map(lambda leaf: leaf + 0.01, lora), frozen


@functools.cache
def loss_and_gradient(policy: str, *, packed: bool = False, dropout: float = 0.0, small: bool = False, seed: int = 1):
    """Of the tiny model, its sequence whole or in small pieces; computed once for all tests."""
    _, lora, _ = model(dropout)
    # Masks of the generator that compiles fastest.
    key = jax.random.key(seed, impl="rbg") if dropout else None
    with pytest.MonkeyPatch.context() as patch:
        if small:
            cut_small(patch)
            assert long_sequence.tile_size(2 * 96) == 32
            assert attention.head_groups(2 * 96, 4, 2) == 2
        return program(policy, packed, dropout, small)(lora, key)


@functools.cache
def program(policy, packed, dropout, small):
    """Its name in the cache has `small` in it, which is patched when it is traced."""
    graphdef, _, frozen = model(dropout)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, LLAMA["vocab_size"], (2, 96)))
    positions = jnp.tile(jnp.arange(96), (2, 1))
    segments = jnp.where(positions < 40, 1, 2) if packed else None

    def loss(lora, key):
        model = nnx.merge(graphdef, lora, frozen)
        hidden, _ = model(ids, positions, segment_ids=segments, dropout_key=key, remat=policy)
        return jnp.sum(jnp.sin(model.logits(hidden)))

    return jax.jit(jax.value_and_grad(loss))


def assert_same(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        scale = np.abs(b).max()
        assert scale > 0
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-5)


def test_the_flag_offers_every_policy():
    (flag, _) = typing.get_args(typing.get_type_hints(TrainConfig)["remat"])
    assert set(typing.get_args(flag)) == set(remat.POLICIES) == set(typing.get_args(Remat))
    assert TrainConfig().remat_policy == "full"
    assert TrainConfig(gradient_checkpointing=False).remat_policy == "none"
    assert TrainConfig(remat="offload").remat_policy == "offload"


# By default every policy once, packed or not; the tier slow has the rest of the product.
CASES = [
    pytest.param(policy, packed, marks=[] if packed == (policy == "save_attention") else pytest.mark.slow)
    for policy in ("full", "save_attention", "offload")
    for packed in (False, True)
]


@pytest.mark.parametrize(("policy", "packed"), CASES)
def test_policies_agree(policy, packed):
    assert_same(loss_and_gradient(policy, packed=packed), loss_and_gradient("none", packed=packed))


# The policies agree: of them, tiles need one that keeps attention's output, packed, and one that does not.
@pytest.mark.parametrize(
    ("policy", "packed"),
    [case if case.values[0] != "full" else pytest.param(*case.values, marks=pytest.mark.slow) for case in CASES],
)
def test_tiles_and_groups_of_heads_change_nothing(policy, packed):
    assert_same(loss_and_gradient(policy, packed=packed, small=True), loss_and_gradient("none", packed=packed))


@pytest.mark.e2e
@pytest.mark.parametrize("policy", ["offload", pytest.param("save_attention", marks=pytest.mark.slow)])
def test_tiles_draw_their_own_dropout(policy):
    """Every policy draws the same masks; no two tiles draw the same."""
    full = loss_and_gradient("full", dropout=0.5, small=True)
    assert_same(loss_and_gradient(policy, dropout=0.5, small=True), full)
    # Masks matter: those of another key give another loss.
    assert abs(full[0] - loss_and_gradient("full", dropout=0.5, small=True, seed=2)[0]) > 1e-3


class TestAttention:
    """`attend` against the plain product of scores."""

    def arrays(self, seq: int = 24):
        shapes = {"q": (2, seq, 8, 16), "k": (2, seq, 4, 16), "v": (2, seq, 4, 16), "d": (2, seq, 8, 16)}
        return [array(*shape, seed=i) for i, shape in enumerate(shapes.values())]

    @pytest.mark.parametrize("groups", [1, 2, 4])
    @pytest.mark.parametrize("window", [None, 6])
    @pytest.mark.parametrize("masked", [False, True])
    def test_groups(self, groups, window, masked, monkeypatch):
        q, k, v, d = self.arrays()
        facts = attention.Attention(window=window, scale=0.3)
        segments = jnp.asarray([[1] * 10 + [2] * 14, [1] * 24])
        mask = attention.segment_mask(facts, segments) if masked else None
        want, want_vjp = jax.vjp(lambda *qkv: attention.attend_xla(*qkv, facts, mask), q, k, v)
        monkeypatch.setattr(attention, "head_groups", lambda *_: groups)
        got, got_vjp = jax.vjp(lambda *qkv: attention._attend(facts, *qkv, mask), q, k, v)
        np.testing.assert_allclose(got, want, atol=1e-6)
        for a, b in zip(got_vjp(d), want_vjp(d), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)

    @pytest.mark.parametrize(
        ("tokens", "heads", "kv_heads", "groups"),
        [(512, 32, 32, 1), (16384, 32, 8, 4), (65536, 32, 8, 8), (1 << 20, 64, 8, 8), (1 << 20, 9, 3, 3)],
    )
    def test_every_group_fills_a_large_gpu(self, tokens, heads, kv_heads, groups):
        assert attention.head_groups(tokens, heads, kv_heads) == groups


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(512, 512), (4096, 4096), (8192, 2048), (262144, 2048), (49152, 2048), (5120, 1280), (4099, 4099)],
)
def test_tile_sizes(tokens, size):
    assert long_sequence.tile_size(tokens) == size


@functools.cache
def gradients(working, policy: str, *, small: bool):
    """Loss and summed gradients of three micro-batches."""
    graphdef, lora, frozen = model()
    lora = jax.tree.map(lambda leaf: leaf.astype(working), lora)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, LLAMA["vocab_size"], (3, 2, 96)))
    positions = jnp.broadcast_to(jnp.arange(96), ids.shape)
    batch = {"input_ids": ids, "labels": ids, "positions": positions, "segment_ids": jnp.ones_like(ids)}
    with pytest.MonkeyPatch.context() as patch:
        if small:
            cut_small(patch)
        step = make_gradient_step(graphdef, StepConfig(remat=policy, micro_batches=3))
        sums, metrics = step(lora, frozen, batch, jnp.zeros((), jnp.int32))
    return metrics.loss, sums


@pytest.mark.parametrize("policy", ["full", pytest.param("save_attention", marks=pytest.mark.e2e), "offload"])
@pytest.mark.parametrize("working", [pytest.param(jnp.float32, marks=pytest.mark.e2e), jnp.bfloat16])
def test_tiles_add_to_the_gradients_of_earlier_micro_batches(working, policy):
    """The hand-written backward pass adds where the step keeps its totals, and asks for no gradient of the matrices."""
    got = gradients(working, policy, small=True)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got[1]))
    assert_same(got, gradients(working, "none", small=False))


@pytest.mark.parametrize("policy", ["full", "save_attention", "offload"])
def test_tiles_add_no_products_with_weights(policy, request):
    graphdef, lora, frozen = model()
    batch = dict.fromkeys(
        ("input_ids", "labels", "positions", "segment_ids"), jax.ShapeDtypeStruct((1, 2, 96), jnp.int32)
    )
    step = jax.ShapeDtypeStruct((), jnp.int32)

    def products():
        traced = make_gradient_step(graphdef, StepConfig(remat=policy)).trace(lora, frozen, batch, step)
        return count_products(traced.jaxpr, trips=1.0).plain

    whole = products()
    request.getfixturevalue("small_pieces")
    assert whole <= products() <= 1.05 * whole
