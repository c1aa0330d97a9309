"""Formats of others bit for bit: the golden file of tests/reference/make_format_golden.py, and the gguf package.

Zeros may differ in sign from the references': the sum of a minimum and its negative is +0, and modelopt's table has no -0.
XLA on a CPU takes float32 subnormals for zeros, as inputs and results; only MXFP4 scales of 2^-126 and less show it.
"""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.random_weights_of_formats import FOUR_BITS, random_weight, values_of

from qlora_jax.errors import UserError
from qlora_jax.kernels import dequantize as dequantize_with
from qlora_jax.kernels import matmul
from qlora_jax.quantization import (
    FORMATS,
    QuantizationConfig,
    QuantizedTensor,
    abstract_quantized,
    dequantize,
    from_awq,
    from_gguf,
    from_gptq,
    from_mxfp4,
    from_nvfp4,
    quantize,
    to_gguf,
)
from qlora_jax.quantization.codebooks import INT4
from qlora_jax.quantization.gguf_blocks import LAYOUTS

DTYPES = ("float32", "bfloat16", "float16")
KERNEL_DTYPES = ("bfloat16", "float16")
QUANTIZED_GGUF = ("q4_0", "q4_1", "q8_0")


@pytest.fixture(scope="module")
def golden(request):
    found = {}
    with np.load(request.path.parents[1] / "golden" / "formats.npz") as file:
        for key in file.files:
            case, _, name = key.partition("/")
            found.setdefault(case, {})[name] = file[key]
    return found


def assert_values(q, wanted, dtype):
    """Compare all bits of one dtype, but for the sign of zeros."""
    values = np.asarray(dequantize(q, dtype))
    if dtype == "bfloat16":
        wanted = wanted.view(jnp.bfloat16)
    assert values.dtype == wanted.dtype
    np.testing.assert_array_equal(values, wanted)


def check_golden(q, tensors, *, transposed=False):
    dtypes = [dtype for dtype in DTYPES if dtype in tensors]
    assert "float32" in dtypes and len(dtypes) >= 2
    for dtype in dtypes:
        assert_values(q, tensors[dtype].T if transposed else tensors[dtype], dtype)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_awq_equals_autoawq(golden, group_size):
    tensors = golden[f"awq-{group_size}"]
    q = from_awq(tensors)
    assert (q.quant_type, q.block_size, q.dtype) == ("uint4", group_size, "float16")
    assert set(unpacked(q.codes)) == set(range(16)) and 0 in q.absmax
    check_golden(q, tensors, transposed=True)


@pytest.mark.parametrize(("case", "version"), [("gptq-64", 1), ("gptq_v2-128", 2)])
def test_gptq_equals_gptqmodel(golden, case, version):
    tensors = golden[case]
    stored = tensors["qzeros"].view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    assert version == 2 or 15 in stored, "no zero point that overflows"
    q = from_gptq(tensors, version=version)
    assert (q.quant_type, q.block_size, q.dtype) == ("uint4", int(case.split("-")[1]), "float16")
    check_golden(q, tensors, transposed=True)
    del tensors["g_idx"]
    check_golden(from_gptq(tensors, version=version), tensors, transposed=True)


def test_zero_points_that_borrowed_are_restored():
    zeros = np.arange(16, dtype=np.uint32).reshape(2, 8)
    words = (zeros << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=1, keepdims=True, dtype=np.uint32)
    tensors = {"qweight": np.zeros((8, 8), np.int32), "scales": np.ones((2, 8), np.float16)}
    for version, stored in ((1, words - np.uint32(0x11111111)), (2, words)):
        q = from_gptq(tensors | {"qzeros": stored.view(np.int32)}, version=version)
        np.testing.assert_array_equal(q.minimum.reshape(8, 2).T, zeros)


def without_tiny_scales(wanted, scales, axis):
    """Zero what XLA on a CPU makes zero: blocks whose scale is subnormal, and values that are."""
    wanted = np.where(np.repeat(scales, 32, axis) == 0, 0, wanted)
    return np.where(np.abs(wanted.astype(np.float32)) < 2.0**-126, 0, wanted)


def test_mxfp4_equals_transformers(golden):
    tensors = golden["gpt_oss"]
    assert set(tensors["scales"].ravel()) == set(range(255))
    for expert in range(2):
        scales = tensors["scales"][expert]
        q = from_mxfp4(tensors["blocks"][expert], scales)
        assert (q.quant_type, q.shape, q.dtype) == ("mxfp4", (32, 128), "bfloat16")
        float32, bfloat16 = tensors["float32"][expert].T, tensors["bfloat16"][expert].T
        assert np.isinf(float32).any() == (254 in scales)
        for dtype, values in (("float32", float32), ("bfloat16", bfloat16.view(jnp.bfloat16))):
            np.testing.assert_array_equal(dequantize(q, dtype), without_tiny_scales(values, scales, 1))


def test_mxfp4_equals_compressed_tensors(golden):
    tensors = golden["compressed_tensors-mxfp4"]
    scales = tensors["weight_scale"]
    q = from_mxfp4(tensors["weight_packed"].reshape(*scales.shape, 16), scales)
    for dtype in ("float32", "bfloat16"):
        values = tensors[dtype].view(jnp.dtype(dtype))
        np.testing.assert_array_equal(dequantize(q, dtype), without_tiny_scales(values, scales, 1))


def test_nvfp4_equals_compressed_tensors(golden):
    tensors = golden["compressed_tensors-nvfp4"]
    assert len(set(tensors["weight_scale"].ravel())) == 254, "all but two NaN"
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    q = from_nvfp4(packed, scales, tensors["weight_global_scale"], convention="divide")
    check_golden(q, tensors)
    as_floats = from_nvfp4(packed, scales.view(jnp.float8_e4m3fn), tensors["weight_global_scale"], convention="divide")
    jax.tree.map(np.testing.assert_array_equal, as_floats, q)


def test_nvfp4_equals_modelopt(golden):
    tensors = golden["modelopt-nvfp4"]
    q = from_nvfp4(tensors["weight"], tensors["weight_scale"], tensors["weight_scale_2"], convention="multiply")
    assert (q.quant_type, q.shape, q.block_size, q.dtype) == ("nvfp4", (32, 128), 16, "bfloat16")
    check_golden(q, tensors)


def unpacked(codes):
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)


def test_int4_is_bitsandbytes_table(golden):
    np.testing.assert_array_equal(INT4, golden["bitsandbytes"]["int4"])
    weight = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    q = quantize(weight, quant_type="int4", double_quant=False)
    nearest = np.abs(INT4 - weight.reshape(-1, 1)).min(axis=1)
    np.testing.assert_array_equal(np.abs(np.asarray(dequantize(q)) - weight)[0], nearest)
    assert set(np.asarray(dequantize(q)).ravel()) == set(INT4)


def random_blocks(quant_type, rows=64, columns=256):
    """Random bytes of a GGUF tensor whose float16 numbers and scales of all exponents are finite."""
    random, layout = np.random.default_rng(0), LAYOUTS[quant_type]
    blocks = random.integers(0, 256, (rows * columns // 32, layout.nbytes), np.uint8)
    record = blocks.view(layout.record)
    if quant_type == "mxfp4":
        record["scale"] = (1 + np.arange(len(blocks)) % 254).reshape(-1, 1)  # 1 upwards: 0 is subnormal
    else:
        for name in {"scale", "minimum"} & set(record.dtype.names):
            bits = random.integers(0, 2**16, record[name].shape, np.uint16)
            bits = np.where(bits & 0x7C00 == 0x7C00, bits & 0x83FF, bits)  # neither NaN nor infinity
            record[name] = bits.view(np.float16)
        record["scale"][:3] = np.float16([0, -0.0, 2.0**-24]).reshape(-1, 1)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("quant_type", LAYOUTS)
def test_gguf_round_trip_and_values(quant_type):
    blocks = random_blocks(quant_type)
    q = from_gguf(blocks, quant_type)
    assert (q.shape, q.block_size, q.dtype) == ((64, 256), 32, "float32")
    np.testing.assert_array_equal(to_gguf(q), blocks)
    on_device = jax.tree.map(jnp.asarray, q)
    np.testing.assert_array_equal(to_gguf(on_device), blocks)
    strided = np.repeat(blocks, 2, axis=0)[::2]
    jax.tree.map(np.testing.assert_array_equal, from_gguf(strided, quant_type), q)
    with np.errstate(over="ignore"):
        wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[quant_type.upper()])
        wanted = np.where(np.abs(wanted) < 2.0**-126, 0, wanted)
        for dtype in DTYPES:
            np.testing.assert_array_equal(dequantize(q, dtype), wanted.astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("quant_type", LAYOUTS)
def test_gguf_over_chunks(quant_type):
    blocks = random_blocks(quant_type, rows=130, columns=32 * 64)
    q = from_gguf(blocks, quant_type)
    np.testing.assert_array_equal(to_gguf(q), blocks)
    parts = [from_gguf(blocks[i : i + 1], quant_type) for i in range(len(blocks))]
    np.testing.assert_array_equal(q.codes, np.concatenate([part.codes for part in parts]))


def hard_weights():
    """Weights by name, [n, 64], whose blocks are hard to quantise."""
    random = np.random.default_rng(0)
    normal = random.standard_normal((512, 64)).astype(np.float32)
    both_signs = normal.clip(-2, 2)
    both_signs[:, [3, 35]], both_signs[:, [9, 60]] = 2.5, -2.5
    swapped = -both_signs
    return {
        "normal": normal,
        "bfloat16": normal.astype(jnp.bfloat16),
        "float16": normal.astype(np.float16),
        "zeros": np.zeros((2, 64), np.float32) * np.float32([[1], [-1]]),
        "constants": np.repeat(np.float32([[1], [-1], [0.1], [-3], [2.0**-20], [65504]]), 64, axis=1),
        "ties": (random.integers(-64, 65, (512, 64)) / 8).astype(np.float32),
        "ties_of_bytes": (random.integers(-254, 255, (512, 64)) / 2).astype(np.float32),
        "both_signs": np.concatenate([both_signs, swapped]),
        "float16_subnormals": (normal * np.float32(2.0**-20)).astype(np.float16),
        "scales_that_vanish": normal * np.float32(2.0**-26),
        "huge": (normal * np.float32(3e4)).clip(-65504, 65504),
        "one_large": np.where(np.arange(64) % 32 == 7, np.float32(3e4), normal * np.float32(1e-3)),
    }


@pytest.mark.parametrize("quant_type", QUANTIZED_GGUF)
@pytest.mark.parametrize("name", hard_weights())
def test_quantize_equals_gguf(quant_type, name):
    weight = hard_weights()[name]
    q = quantize(weight, quant_type=quant_type)
    assert q.dtype == weight.dtype.name
    wanted = gguf.quants.quantize(weight.astype(np.float32), gguf.GGMLQuantizationType[quant_type.upper()])
    np.testing.assert_array_equal(to_gguf(q), wanted)


@pytest.mark.parametrize("quant_type", QUANTIZED_GGUF)
def test_quantize_subnormals_to_zero(quant_type):
    # The reciprocal of a scale may overflow, and gguf converts infinity to an integer: only the weights are defined.
    weight = (np.random.default_rng(0).standard_normal((4, 64)) * 1e-40).astype(np.float32)
    q = quantize(weight, quant_type=quant_type)
    assert not np.asarray(dequantize(q)).any() and not np.asarray(q.absmax).any()


def test_quantize_to_gguf_over_chunks():
    weight = np.random.default_rng(0).standard_normal((33, 32768)).astype(np.float32)
    for quant_type in QUANTIZED_GGUF:
        parts = [to_gguf(quantize(row[None], quant_type=quant_type)) for row in weight]
        np.testing.assert_array_equal(to_gguf(quantize(weight, quant_type=quant_type)), np.concatenate(parts))
