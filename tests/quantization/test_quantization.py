import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from qlora_jax.errors import UserError
from qlora_jax.quantization import (
    BLOCK_SIZES,
    QuantizationConfig,
    abstract_quantized,
    block_scales,
    blockwise,
    dequantize,
    from_bitsandbytes,
    quantize,
    to_bitsandbytes,
)
from qlora_jax.quantization.codebooks import FP4, NF4, dynamic_map

FOUR_BIT = [(t, d) for t in ("nf4", "fp4") for d in (False, True)]


def weight(*shape, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(dtype)


def test_nf4_are_normal_quantiles():
    offset = 0.9677083  # of bitsandbytes: the mean of 1 - 1/32 and 1 - 1/30
    negative = norm.ppf(np.linspace(1 - offset, 0.5, 8)[:-1])
    positive = norm.ppf(np.linspace(0.5, offset, 9)[1:])
    table = np.concatenate([negative, [0], positive]) / norm.ppf(offset)
    np.testing.assert_allclose(NF4, table, atol=2e-7)
    assert NF4[0] == -1 and NF4[7] == 0 and NF4[15] == 1


def test_other_tables():
    assert sorted(set(np.abs(FP4) * 192)) == [0, 1, 32, 48, 64, 96, 128, 192]
    table = dynamic_map()
    assert len(np.unique(table)) == 256 and (np.diff(table) > 0).all()
    assert table[255] == 1, "block_scales relies on it"
    np.testing.assert_array_equal(np.sort(-table[table < 0]), table[(table > 0) & (table < 1)])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_error_is_at_most_half_the_widest_gap(quant_type, block_size):
    w = weight(61, 67)
    q = quantize(w, quant_type=quant_type, block_size=block_size, double_quant=False)
    scale = np.repeat(q.absmax, block_size)[: w.size].reshape(w.shape)
    np.testing.assert_array_equal(q.absmax[0], np.abs(w.reshape(-1)[:block_size]).max())
    half_gap = np.diff(np.sort(NF4 if quant_type == "nf4" else FP4)).max() / 2
    assert (np.abs(dequantize(q) - w) <= scale * half_gap * 1.00001).all()


def test_double_quantisation_changes_scales_little():
    w = weight(256, 256)
    once, twice = (quantize(w, double_quant=d) for d in (False, True))
    np.testing.assert_array_equal(once.codes, twice.codes)
    np.testing.assert_allclose(block_scales(twice), once.absmax, rtol=0.02)


def test_bits_per_parameter_are_counted_from_buffers():
    q = quantize(weight(1024, 1024))
    assert q.nbytes == sum(np.asarray(a).nbytes for a in jax.tree.leaves(q)) == 524288 + 16384 + 4 * 64 + 4
    assert round(q.bits_per_parameter, 3) == 4.127
    assert quantize(weight(64, 64), double_quant=False).bits_per_parameter == 4.5
    assert quantize(weight(4, 64), quant_type="int8").bits_per_parameter == 8.5


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(64, 128), (7, 9), (130,), (3, 5, 77), (1, 1)])
def test_abstract_equals_real(shape, dtype):
    for kwargs in [{"quant_type": t, "double_quant": d} for t, d in FOUR_BIT] + [{"quant_type": "int8"}]:
        if kwargs["quant_type"] == "int8" and len(shape) != 2:
            continue
        q = quantize(jnp.asarray(weight(*shape, dtype=dtype)), **kwargs)
        expected = abstract_quantized(shape, dtype=dtype, **kwargs)
        found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), q)
        assert found == expected
        assert dequantize(q).dtype == dtype and dequantize(q).shape == shape
        assert jax.eval_shape(dequantize, expected).shape == shape


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", [(64, 64), (5, 13)])
def test_stacks(quant_type, shape):
    layers = [quantize(weight(*shape, seed=i), quant_type=quant_type) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stacked.stack_shape == (3,) and stacked.shape == shape
    assert stacked.bits_per_parameter == layers[0].bits_per_parameter
    abstract = abstract_quantized(shape, quant_type=quant_type, dtype="float32", stack=(3,))
    assert jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stacked) == abstract
    each = np.stack([dequantize(q) for q in layers])
    np.testing.assert_array_equal(dequantize(stacked), each)
    np.testing.assert_array_equal(jax.jit(dequantize)(stacked), each)
    _, scanned = jax.lax.scan(lambda carry, q: (carry, dequantize(q, jnp.float32)), 0, stacked)
    np.testing.assert_array_equal(scanned, each)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_a_cpu_does_equals_what_other_platforms_do(dtype):
    q = quantize(weight(64, 96), quant_type="fp4")
    code = blockwise.unpack(jnp.asarray(q.codes))
    np.testing.assert_array_equal(code, blockwise._unpack_pairs(jnp.asarray(q.codes)))
    args = (code.reshape(-1, 64), block_scales(q), None, "fp4", dtype)
    by_products, by_tables = blockwise._scaled_entries(*args), blockwise._entries_of_scaled_tables(*args)
    np.testing.assert_array_equal(by_products, by_tables)
    np.testing.assert_array_equal(by_products.reshape(64, 96), dequantize(q, dtype))


def test_dequantise_to_another_dtype_rounds_the_float32_product():
    q = quantize(weight(32, 64))
    exact = np.asarray(dequantize(q, jnp.float32))
    for dtype in (jnp.bfloat16, jnp.float16):
        np.testing.assert_array_equal(dequantize(q, dtype), exact.astype(dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, -1, 100])
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_non_finite_weights_are_named(bad, where, quant_type):
    w = weight(11, 13)
    w.reshape(-1)[where] = bad
    with pytest.raises(UserError, match=r"layers\.3\.down_proj: it contains NaN or infinity"):
        quantize(w, quant_type=quant_type, name="layers.3.down_proj")


def test_a_late_chunk_is_checked_and_quantised_like_the_first():
    w = weight(1100, 2000)
    q = quantize(w)
    np.testing.assert_array_equal(q.codes[-500_000:], quantize(w.reshape(-1)[-1_000_000 - 16 * 64 :]).codes[-500_000:])
    w[-1, -1] = np.nan
    with pytest.raises(UserError, match="the weight: it contains NaN"):
        quantize(w)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_memory_beside_the_result_is_bounded(quant_type):
    w = np.ones((2048, 4096), jnp.bfloat16)
    quantize(w[:1], quant_type=quant_type)
    tracemalloc.start()
    try:
        q = quantize(w, quant_type=quant_type)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - q.nbytes < w.nbytes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": weight(4, 4).astype(np.float64)}, "dtype is float64"),
        ({"weight": np.ones((4, 4), np.int32)}, "dtype is int32"),
        ({"weight": np.ones((0, 4), np.float32)}, "is empty"),
        ({"weight": weight(4, 4), "quant_type": "nf5"}, "quant_type must be one of nf4, .*, int8, not 'nf5'"),
        ({"weight": weight(4, 4), "block_size": 48}, "block_size must be one of 32, 64, .*, not 48"),
        ({"weight": weight(4), "quant_type": "int8"}, "needs two dimensions"),
        ({"weight": np.full((128, 64), 3e38, np.float32)}, "scales overflow"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(UserError, match=message):
        quantize(**kwargs)


def test_config():
    assert QuantizationConfig() == QuantizationConfig("nf4", 64, True)
    for bad in ({"quant_type": "nf8"}, {"block_size": 100}):
        with pytest.raises(UserError, match=str(*bad.values())):
            QuantizationConfig(**bad)


@pytest.mark.parametrize(("quant_type", "double_quant"), [*FOUR_BIT, ("int8", False)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_bitsandbytes_round_trip(quant_type, double_quant, dtype):
    q = quantize(weight(33, 65, dtype=dtype), quant_type=quant_type, double_quant=double_quant)
    back = from_bitsandbytes(to_bitsandbytes(q), dtype=jnp.dtype(dtype).name)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    for ours, theirs in zip(jax.tree.leaves(q), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_bitsandbytes_errors():
    tensors = to_bitsandbytes(quantize(weight(32, 64)))
    state = "quant_state.bitsandbytes__nf4"

    def without(key):
        return {k: v for k, v in tensors.items() if k != key}

    def with_state(**changes):
        changed = json.loads(tensors[state].tobytes()) | changes
        return tensors | {state: np.frombuffer(json.dumps(changed).encode(), np.uint8)}

    for key in ("absmax", "weight", "nested_absmax", "quant_map", "nested_quant_map"):
        with pytest.raises(UserError, match=f"needs a tensor '{key}'"):
            from_bitsandbytes(without(key))
    with pytest.raises(UserError, match="found 0"):
        from_bitsandbytes(without(state))
    with pytest.raises(UserError, match="not the JSON"):
        from_bitsandbytes(tensors | {state: np.frombuffer(b"{}", np.uint8)})
    with pytest.raises(UserError, match="nested_blocksize must be 256, is 512"):
        from_bitsandbytes(with_state(nested_blocksize=512))
    with pytest.raises(UserError, match="codes of a nf4 weight of shape"):
        from_bitsandbytes(with_state(shape=[32, 32]))
    with pytest.raises(UserError, match="quant_map is not bitsandbytes' table for nf4"):
        from_bitsandbytes(tensors | {"quant_map": FP4})
    q = quantize(weight(32, 64))
    stack = dataclasses.replace(q, codes=np.stack([q.codes, q.codes]))
    with pytest.raises(UserError, match="pass one layer"):
        to_bitsandbytes(stack)
