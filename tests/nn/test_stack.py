"""Stacks of layers: patterns, several attentions a layer, both executors, shards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.compile_in_child import call
from fixtures.tiny_configs import LLAMA
from flax import nnx

from qlora_jax.models.common import flatten, initialize, split_model, unflatten_like
from qlora_jax.nn import long_sequence
from qlora_jax.nn.attention import Attention
from qlora_jax.nn.blocks import AttentionProjections
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig, QLoRALinear
from qlora_jax.nn.norms import RMSNorm
from qlora_jax.nn.stack import Context, DropoutKeys, Segment, Stack, segments_of
from qlora_jax.quantization import QuantizationConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOCAL, GLOBAL = Attention(window=4), Attention()
SELF, CROSS = Attention(rope=None), Attention(causal=False, rope=None, cross=True)
WIDTH = 32


@pytest.mark.parametrize(
    ("kinds", "segments"),
    [
        ("G" * 32, [("G", 32)]),
        # Gemma 3 with 26 layers: five local, one global; two remain.
        (("LLLLLG" * 5)[:26], [("LLLLLG", 4), ("L", 2)]),
        ("GGGGLLL", [("G", 4), ("L", 3)]),
        ("LGLGLG", [("LG", 3)]),
        ("LGLGL", [("LG", 2), ("L", 1)]),
        ("LLG", [("L", 2), ("G", 1)]),
        ("G", [("G", 1)]),
    ],
)
def test_layers_fall_into_repeated_patterns(kinds, segments):
    layers = tuple((LOCAL if kind == "L" else GLOBAL,) for kind in kinds)
    found = segments_of(layers)
    written = ["".join("L" if attentions == (LOCAL,) else "G" for attentions in each.pattern) for each in found]
    assert list(zip(written, [each.repeats for each in found], strict=True)) == segments
    again = [attentions for each in found for attentions in each.pattern * each.repeats]
    assert tuple(again) == layers
    assert [each.start for each in found] == [sum(len(p) * n for p, n in segments[:i]) for i in range(len(segments))]


def test_a_segment_is_what_its_pattern_repeats():
    assert segments_of(((SELF, CROSS),) * 3) == (Segment(0, ((SELF, CROSS),), 3),)


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"cross": True}, {"cross": True, "causal": False, "rope": None, "window": 3}]
)
def test_impossible_attentions_are_refused(wrong):
    with pytest.raises(ValueError, match=r"window|cross-attention"):
        Attention(**wrong)


class CrossLayer(nnx.Module):
    """A decoder layer of an encoder-decoder: self-attention, cross-attention, one linear."""

    def __init__(self, qlora, stack):
        self.norm = RMSNorm(WIDTH, eps=1e-6, stack=stack)
        self.own = AttentionProjections(WIDTH, (4, 2, 8), qlora, stack)
        self.cross = AttentionProjections(WIDTH, (4, 2, 8), qlora, stack)
        self.mlp = QLoRALinear(WIDTH, WIDTH, name="mlp", qlora=qlora, stack=stack)

    def pre_attention(self, i, h, rope, keys):
        if i == 0:
            return self.own.project(self.norm(h), rope, keys)
        return (self.cross.q_proj(h, keys("q_proj")).reshape(*h.shape[:2], -1, 8),)

    def encoder_keys_values(self, i, encoder, keys):
        _, k, v = self.cross.project(encoder, None, keys)
        return k, v

    def post_attention(self, i, h, attended, keys):
        if i == 0:
            return h + self.own.output(attended, keys)
        h = h + self.cross.output(attended, keys)
        return h + jnp.tanh(self.mlp(h, keys("mlp")))


def cross_stack(n_layers=3, seq=64):
    lora = LoRAConfig(2, 4.0, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj", "mlp"))
    qlora = QLoRAConfig(QuantizationConfig(block_size=32), jnp.float32, lora)
    graphdef, trained, frozen = split_model(CrossLayer(qlora, (n_layers,)))
    key = jax.random.key(0)
    trained = jax.tree.map(lambda leaf: leaf + 0.02, initialize(trained, key))
    values = {}
    for i, (path, value) in enumerate(flatten(frozen).items()):
        if path[-2:] == ("norm", "weight"):
            values[path] = jnp.ones(value.shape)
            continue
        from qlora_jax.quantization import quantize

        weights = jax.random.normal(jax.random.fold_in(key, i), (n_layers, *value.shape)) / 6
        each = [quantize(np.asarray(w), block_size=32) for w in weights]
        each = [dataclasses.replace(q, dtype=value.dtype) for q in each]
        values[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    frozen = unflatten_like(frozen, values, what="test")
    h = jax.random.normal(jax.random.key(1), (2, seq, WIDTH))
    encoder = jax.random.normal(jax.random.key(2), (2, 20, WIDTH))
    return graphdef, trained, frozen, h, encoder


@pytest.mark.parametrize(
    ("causal", "packed", "policy"),
    [pytest.param(True, True, "full", marks=pytest.mark.slow), (False, True, "save_attention")],
)
def test_both_executors_agree_for_cross_attention(causal, packed, policy, monkeypatch):
    """Gradients of the adapters, of the stream and of the encoder's output are automatic differentiation's."""
    graphdef, trained, frozen, h, encoder = cross_stack()
    stack = Stack(((Attention(causal=causal, rope=None), CROSS),) * 3)
    positions = jnp.arange(h.shape[1])[None]
    segments = jnp.where(positions < 30, 1, 2) * jnp.ones((2, 1), jnp.int32)
    encoder_segments = jnp.where(jnp.arange(20) < 9, 1, 2)[None] * jnp.ones((2, 1), jnp.int32)

    def loss(trained, h, encoder, remat):
        ctx = Context({}, segments, encoder, encoder_segments) if packed else Context({}, encoder=encoder)
        out = stack(nnx.merge(graphdef, trained, frozen), h, ctx, remat=remat)
        return jnp.sum(jnp.sin(out))

    def gradients(remat):
        return jax.jit(jax.value_and_grad(lambda *args: loss(*args, remat), argnums=(0, 1, 2)))(trained, h, encoder)

    want = gradients("none")
    monkeypatch.setattr(long_sequence, "TILE", 16)
    monkeypatch.setattr(long_sequence, "_MULTIPLE", 8)
    got = gradients(policy)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a / np.abs(b).max(), b / np.abs(b).max(), atol=2e-5)


def test_what_an_encoder_says_matters_everywhere_and_documents_stay_apart():
    graphdef, trained, frozen, h, encoder = cross_stack(seq=8)
    stack = Stack(((SELF, CROSS),) * 3)
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2]] * 2)
    encoder_segments = jnp.asarray([[1] * 10 + [2] * 10] * 2)

    def run(encoder):
        layers = nnx.merge(graphdef, trained, frozen)
        return stack(layers, h, Context({}, segments, encoder, encoder_segments))

    moved = np.abs(run(encoder) - run(encoder.at[:, 15].add(1.0))).max(axis=(0, 2))
    assert (moved[:4] == 0).all()
    assert (moved[4:] > 1e-4).all()


def test_decoding_with_a_cache_equals_one_pass_for_cross_attention():
    graphdef, trained, frozen, h, encoder = cross_stack(seq=8)
    layers = nnx.merge(graphdef, trained, frozen)
    stack, ctx = Stack(((SELF, CROSS),) * 3), Context({}, encoder=encoder)
    cache = stack.empty_cache(2, 8, (2, 8), jnp.float32)
    pieces = []
    for start, stop in ((0, 5), (5, 6), (6, 8)):
        out, cache = stack.decode(layers, h[:, start:stop], ctx, cache, jnp.full(2, stop - start))
        pieces.append(out)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), stack(layers, h, ctx), atol=1e-5)
    # A full cache keeps what it has.
    _, after = stack.decode(layers, h[:, :1], ctx, cache, jnp.ones(2, int))
    assert np.array_equal(after.keys[0], cache.keys[0])


# Tokens of both rows, call by call.
@pytest.mark.parametrize("pieces", [[(3, 7), (1, 1), (9, 0)], pytest.param([(11, 5), (1, 9)], marks=pytest.mark.e2e)])
def test_sliding_layers_keep_as_many_slots_as_their_window(pieces):
    """Rings of slots hold the window's tokens of every row, however the rows are cut into pieces and padded."""
    graphdef, trained, frozen, h, _ = cross_stack(n_layers=4, seq=14)

    class SelfLayer(CrossLayer):
        def post_attention(self, i, h, attended, keys):
            return super().post_attention(1, super().post_attention(0, h, attended, keys), attended, keys)

    layers = nnx.merge(graphdef, trained, frozen)
    layers.__class__ = SelfLayer
    local, full = Attention(window=4, rope=None), Attention(rope=None)
    stack = Stack.of([local, full, local, local])
    cache = stack.empty_cache(2, 14, (2, 8), jnp.float32)
    assert [leaf.shape[:3] for leaf in cache.keys] == [(3, 2, 4), (1, 2, 14)]
    outs, starts = [[], []], [0, 0]
    for counts in pieces:
        new = np.full((2, max(counts), h.shape[2]), 9.0, np.float32)  # the padding is not seen
        for row, count in enumerate(counts):
            new[row, :count] = h[row, starts[row] : starts[row] + count]
        out, cache = stack.decode(layers, jnp.asarray(new), Context({}), cache, jnp.asarray(counts))
        for row, count in enumerate(counts):
            outs[row].append(out[row, :count])
            starts[row] += count
    assert cache.lengths.tolist() == starts
    want = stack(layers, h, Context({}))
    for row in range(2):
        np.testing.assert_allclose(np.concatenate(outs[row]), want[row, : starts[row]], atol=1e-5)


def test_dropout_keys_belong_to_names():
    keys = DropoutKeys(jax.random.key(0))
    assert jnp.array_equal(jax.random.key_data(keys("q_proj")), jax.random.key_data(keys("q_proj")))
    assert not jnp.array_equal(jax.random.key_data(keys("q_proj")), jax.random.key_data(keys("k_proj")))
    assert DropoutKeys()("q_proj") is None


def sharded_against_replicated():
    """(largest difference of loss and gradients, codes a device holds, codes in all) on two devices; in a child."""
    from fixtures import tiny_model
    from fixtures.batches import adapters_with_b, random_ids
    from jax.sharding import AxisType, PartitionSpec

    from qlora_jax import models, sharding

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rules = sharding.ShardingRules(rows="data", vocabulary="data")
    config = models.model_config(LLAMA)
    _, trained, frozen = tiny_model.build(quantization=QuantizationConfig())
    trained = adapters_with_b(trained)
    ids = jnp.asarray(random_ids(4, 16))
    results = []
    for each in (sharding.REPLICATED, rules):
        lora = LoRAConfig(4, 8.0, 0.0, models.lora_modules(config, "all"))
        qlora = QLoRAConfig(QuantizationConfig(), jnp.float32, lora, rules=each)
        graphdef, _, _ = models.split_model(models.abstract_model(config, qlora))
        placed = sharding.Devices(mesh, each).place(frozen)

        def local(trained, frozen, ids, graphdef=graphdef):
            def loss(trained):
                model = nnx.merge(graphdef, trained, frozen)
                hidden, _ = model(ids, jnp.broadcast_to(jnp.arange(16), ids.shape), remat="full")
                return jnp.sum(jnp.sin(model.logits(hidden)))

            return jax.lax.psum(jax.value_and_grad(loss)(trained), "data")

        whole = PartitionSpec()
        step = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(whole, sharding.specs(frozen, each), each.batch_spec()),
            out_specs=whole,
            check_vma=False,
        )
        results.append(jax.jit(step)(trained, placed, ids))
    codes = placed["layers"]["mlp"]["up_proj"]["weight"].get_value().codes
    differ = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, results), strict=True))
    return [differ, codes.addressable_data(0).size, codes.size]


@pytest.mark.e2e
def test_another_sharding_rule_needs_no_other_code():
    """Packed rows and the vocabulary cut over two devices: the same bits as weights that are whole on each."""
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    differ, held, whole = call("test_stack:sharded_against_replicated", environment=two)
    assert differ == 0
    assert 2 * held == whole
