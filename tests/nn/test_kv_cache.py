"""Keys and values in 8 bits, beside those that are not rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import tiny_model
from fixtures.tiny_configs import LLAMA

from qlora_jax.generation import Engine, EngineOptions, Request, Sampling
from qlora_jax.nn.attention import Attention
from qlora_jax.nn.kv_cache import Int8Heads, attend_cached, empty_heads


def test_rounding_keeps_each_head_to_half_a_step():
    heads = np.random.default_rng(0).normal(size=(3, 5, 2, 16)).astype(np.float32)
    heads[0, 0] = 0
    heads[1, 2, 1, 3] = 1e4  # an outlier costs its own token and head alone
    kept = Int8Heads.of(jnp.asarray(heads))
    assert (kept.values.dtype, kept.scales.dtype, kept.scales.shape) == (jnp.int8, jnp.float32, (3, 5, 2))
    error = np.abs(np.asarray(kept.values * kept.scales[..., None]) - heads)
    assert (error <= np.abs(heads).max(axis=-1, keepdims=True) / 254 * 1.001).all()
    assert (error[0, 0] == 0).all() and error[1, 3].max() < 0.02
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) == heads.size + 4 * heads.size // 16


@pytest.mark.parametrize("facts", [Attention(), Attention(window=5, scale=0.3)], ids=str)
def test_attention_over_eight_bits_is_attention_over_what_they_stand_for(facts):
    """In pieces and token by token, rows of several lengths, around a window's ring."""
    rng = np.random.default_rng(1)
    slots = 5 if facts.window else 12
    kept = tuple(empty_heads((2, 2, slots, 2, 8), jnp.int8) for _ in range(2))
    exact = tuple(empty_heads((2, 2, slots, 2, 8), jnp.float32) for _ in range(2))
    lengths = jnp.zeros(2, jnp.int32)
    attend = jax.jit(attend_cached, static_argnums=(1, 3))
    for counts in ([3, 1], [4, 0], [1, 1], [2, 4], [1, 1]):
        size = 4 if max(counts) > 1 else 1
        q, k, v = (jnp.asarray(rng.normal(size=(2, size, heads, 8)), jnp.float32) for heads in (4, 2, 2))
        rounded = [each.values * each.scales[..., None] for each in map(jax.jit(Int8Heads.of), (k, v))]
        tokens = lengths, jnp.array(counts, jnp.int32)
        kept, found = attend((q, k, v), facts, kept, (1, None), tokens)
        exact, expected = attend((q, *rounded), facts, exact, (1, None), tokens)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(found[row, :count], expected[row, :count], atol=2e-5)
        lengths += tokens[1]
    for each, other in zip(kept, exact, strict=True):
        np.testing.assert_allclose(each.values[1] * each.scales[1][..., None], other[1], rtol=1e-6)
        assert not np.any(each.values[0])


@pytest.mark.e2e
@pytest.mark.usefixtures("quick_compilation")
def test_an_engine_keeps_a_third_of_the_bytes_and_the_probabilities():
    parts = tiny_model.build(LLAMA)
    prompt = Request(
        tuple(np.random.default_rng(0).integers(0, 96, 30).tolist()), Sampling(max_new_tokens=1), scored=True
    )

    def scores(dtype):
        engine = Engine(*parts, EngineOptions(1, 48, dtype), eos_ids=())
        engine.submit(prompt)
        tokens = []
        while engine.busy or engine.waiting:
            tokens += engine.step()
        cache = engine._state.cache
        held = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))
        return np.array([token.logprob for token in tokens[1:]]), held

    exact, whole = scores("auto")
    found, held = scores("int8")
    assert held / whole == pytest.approx((1 + 4 / 16) / 4)
    # The tiny model is sharp: its logarithms reach -24.
    assert 0 < np.abs(found - exact).mean() < 0.1
