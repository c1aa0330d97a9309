"""Formats of others bit for bit: the golden file of tests/reference/make_format_golden.py, and the gguf package.

Zeros may differ in sign from the references': the sum of a minimum and its negative is +0, and modelopt's table has no
-0. XLA on a CPU takes float32 subnormals for zeros, as inputs and results; only the least scales of MXFP4 show it.
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
    Format,
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
QUANTIZED_GGUF = ("q4_0", "q4_1", "q8_0")
dequantize_jitted = jax.jit(dequantize, static_argnums=1)


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
    values = np.asarray(dequantize_jitted(q, dtype))
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


def test_transposed_over_tiles():
    """Codes and zero points of large words against a nibble at a time."""
    random = np.random.default_rng(0)
    inputs, outputs, shifts = 192, 4224, np.arange(0, 32, 4, dtype=np.uint32)
    scales = np.ones((3, outputs), np.float16)
    qzeros = random.integers(-(2**31), 2**31, (3, outputs // 8)).astype(np.int32)
    qweight = random.integers(-(2**31), 2**31, (inputs, outputs // 8)).astype(np.int32)
    awq = from_awq({"qweight": qweight, "qzeros": qzeros, "scales": scales})
    nibbles = (qweight.view(np.uint32)[..., None] >> shifts & 15)[..., [0, 4, 1, 5, 2, 6, 3, 7]]
    np.testing.assert_array_equal(unpacked(awq.codes), nibbles.reshape(inputs, outputs).T.ravel())
    qweight = qweight.reshape(inputs // 8, outputs)
    gptq = from_gptq({"qweight": qweight, "qzeros": qzeros, "scales": scales}, version=2)
    nibbles = qweight.view(np.uint32)[:, None] >> shifts[:, None] & 15
    np.testing.assert_array_equal(unpacked(gptq.codes), nibbles.reshape(inputs, outputs).T.ravel())
    zeros = qzeros.view(np.uint32)[..., None] >> shifts & 15
    np.testing.assert_array_equal(gptq.minimum, zeros.reshape(3, outputs).T.ravel())


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
            np.testing.assert_array_equal(dequantize_jitted(q, dtype), without_tiny_scales(values, scales, 1))


def test_mxfp4_equals_compressed_tensors(golden):
    tensors = golden["compressed_tensors-mxfp4"]
    scales = tensors["weight_scale"]
    q = from_mxfp4(tensors["weight_packed"].reshape(*scales.shape, 16), scales)
    for dtype in ("float32", "bfloat16"):
        values = tensors[dtype].view(jnp.dtype(dtype))
        np.testing.assert_array_equal(dequantize_jitted(q, dtype), without_tiny_scales(values, scales, 1))


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
            np.testing.assert_array_equal(dequantize_jitted(q, dtype), wanted.astype(jnp.dtype(dtype)))


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


SHAPES = {"uint4": (3, 128), "nvfp4": (5, 48), "mxfp4": (5, 96), "q4_0": (5, 96), "q4_1": (5, 96)}


@pytest.mark.parametrize("quant_type", FOUR_BITS)
def test_xla_follows_the_equation(quant_type):
    stack = random_weight(quant_type, SHAPES.get(quant_type, (7, 9)), block_size=32, layers=2)
    for dtype in DTYPES:
        wanted = [values_of(stack, layer, dtype) for layer in range(2)]
        np.testing.assert_array_equal(dequantize_jitted(stack, dtype), np.stack(wanted))


SMALL_M, TILED_M = 2, 40


def by_format(*cases):
    """All formats with each case; the default run takes one with a minimum and one with a table of scales."""
    return [
        pytest.param(name, case, marks=[pytest.mark.e2e] * (name not in ("q4_1", "nvfp4")))
        for name in FOUR_BITS
        for case in cases
    ]


@pytest.mark.parametrize(("quant_type", "dtype"), [*((name, "bfloat16") for name in FOUR_BITS), *by_format("float16")])
def test_the_kernel_follows_the_equation(quant_type, dtype):
    stack = random_weight(quant_type, (128, 64))
    q = jax.tree.map(lambda leaf: leaf[0], stack)
    values = dequantize_with(q, jnp.dtype(dtype), implementation="interpreted_unfused")
    np.testing.assert_array_equal(values, values_of(stack, 0, dtype))


@pytest.mark.parametrize(("quant_type", "m"), by_format(SMALL_M, TILED_M))
def test_fused_products_and_gradients(quant_type, m):
    stack, random = random_weight(quant_type, (128, 64)), np.random.default_rng(0)
    q, weight = jax.tree.map(lambda leaf: leaf[0], stack), values_of(stack, 0, "bfloat16").astype(np.float64)
    x, dy = (random.integers(-8, 9, (m, size)).astype(jnp.bfloat16) for size in (64, 128))
    y, vjp = jax.vjp(lambda x: matmul(x, q, implementation="interpreted_fused"), jnp.asarray(x))
    (dx,) = vjp(jnp.asarray(dy))
    for found, wanted in ((y, x.astype(np.float64) @ weight.T), (dx, dy.astype(np.float64) @ weight)):
        assert found.dtype == jnp.bfloat16
        error = np.abs(np.asarray(found, np.float64) - wanted)
        assert (error <= 2.0**-8 * np.abs(wanted) + 1e-5 * np.abs(wanted).max()).all()


def adopted():
    """One weight of every format [64, 256] or the like, by name."""
    random = np.random.default_rng(0)
    words = random.integers(0, 2**31, (256, 8)).astype(np.int32)
    awq = {"qweight": words, "qzeros": words[:2], "scales": np.ones((2, 64), np.float16)}
    gptq = {"qweight": words[:32].repeat(8, axis=1), "qzeros": words[:4], "scales": np.ones((4, 64), np.float16)}
    packed = random.integers(0, 256, (64, 128), np.uint8)
    scales = random.integers(64, 127, (64, 16), np.uint8)
    weight = random.standard_normal((64, 256)).astype(np.float32)
    return {
        "awq": from_awq(awq),
        "gptq": from_gptq(gptq),
        "mxfp4": from_mxfp4(packed.reshape(64, 8, 16), scales[:, :8]),
        "nvfp4": from_nvfp4(packed, scales, 3, convention="divide"),
        **{f"gguf-{name}": from_gguf(random_blocks(name), name, dtype="bfloat16") for name in LAYOUTS},
        **{name: quantize(weight, quant_type=name) for name, kind in FORMATS.items() if kind.quantizes},
        "int4-plain": quantize(weight, quant_type="int4", block_size=128, double_quant=False),
    }


def test_bits_per_parameter():
    found = {name: round(q.bits_per_parameter, 4) for name, q in adopted().items()}
    table = 256 * 32 / (64 * 256)  # of float32 scales, by their codes
    double = 4 + 8 / 64 + 32 / (64 * 256) + 32 / (64 * 256)  # codes, scales, one nested scale, the offset
    gguf_bits = {"q4_0": 4.5, "q4_1": 5, "q8_0": 8.5}
    assert found == {
        "awq": 4 + 24 / 128,
        "gptq": 4 + 24 / 64,
        "mxfp4": 4.25,
        "nvfp4": 4.5 + table,
        **{f"gguf-{name}": bits for name, bits in {**gguf_bits, "mxfp4": 4.25}.items()},
        **gguf_bits,
        **dict.fromkeys(("nf4", "fp4", "int4"), round(double, 4)),
        "int4-plain": 4.25,
        "int8": 8 + 32 / 256,
    }


def test_abstract_equals_real():
    for name, q in adopted().items():
        settings = {"block_size": q.block_size, "double_quant": q.double_quant, "dtype": q.dtype}
        abstract = abstract_quantized(q.shape, quant_type=q.quant_type, **settings)
        real = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), q)
        assert abstract == real, name
        if q.format.block_size is not None:
            assert abstract_quantized(q.shape, quant_type=q.quant_type, dtype=q.dtype) == real, name


@pytest.mark.parametrize("quant_type", FORMATS)
def test_a_scan_slices_stacks(quant_type):
    weights = [q for q in adopted().values() if q.quant_type == quant_type][:1]
    weights += [jax.tree.map(lambda leaf: np.roll(leaf, 1), weights[0])]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *weights)
    assert stack.stack_shape == (2,)
    one = weights[0]
    settings = {"quant_type": quant_type, "block_size": one.block_size, "double_quant": one.double_quant}
    abstract = abstract_quantized(one.shape, dtype=one.dtype, stack=(2,), **settings)
    assert abstract == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stack)

    def body(carry, q):
        assert isinstance(q, QuantizedTensor) and q.stack_shape == ()
        return carry, dequantize(q)

    _, values = jax.jit(lambda stack: jax.lax.scan(body, None, stack))(stack)
    for layer, weight in enumerate(weights):
        np.testing.assert_array_equal(values[layer], dequantize_jitted(weight))


def test_config_fills_in_what_the_format_decides():
    for name, kind in FORMATS.items():
        config = QuantizationConfig(name, block_size=64, double_quant=True)
        assert config.format is kind
        assert config.block_size == (64 if kind.block_size is None else kind.block_size)
        assert config.double_quant == (name in ("nf4", "fp4", "int4"))
    assert QuantizationConfig("q4_0", block_size=128) == QuantizationConfig("q4_0", double_quant=False)
    assert QuantizationConfig("uint4", block_size=192).block_size == 192
    assert str(QuantizationConfig("int4")) == "int4 in blocks of 64 with double quantisation"
    assert str(QuantizationConfig("uint4", block_size=128)) == "uint4 in blocks of 128"
    assert str(QuantizationConfig("q8_0")) == "q8_0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("q4_2",), r"quant_type must be one of nf4, fp4, int4, q4_0, .* or none, not 'q4_2'\.$"),
        (("int4", 48), r"block_size must be one of 32, 64, .* 4096, not 48\.$"),
        (("uint4", 96), r"block_size of uint4 must be 32 or a multiple of 64, not 96\.$"),
        (("uint4", 16), r"block_size of uint4 must be 32 or a multiple of 64, not 16\.$"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        QuantizationConfig(*settings)


def test_formats_refuse():
    with pytest.raises(UserError, match=r"block_size of mxfp4 is 32, not 64\.$"):
        FORMATS["mxfp4"].check_block_size(64)
    with pytest.raises(ValueError, match="no table of 16 values is called 'nf5'"):
        Format("nf5")
    with pytest.raises(UserError, match=r"quant_type must be one of nf4, .*, int8, not 'nf5'\.$"):
        abstract_quantized((4, 64), quant_type="nf5")


AWQ = {
    "qweight": np.zeros((128, 8), np.int32),
    "qzeros": np.zeros((2, 8), np.int32),
    "scales": np.ones((2, 64), np.float16),
}
GPTQ = AWQ | {"qweight": np.zeros((16, 64), np.int32), "g_idx": np.arange(128, dtype=np.int32) // 64}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"qweight": np.zeros((128, 8), np.int64)},
            r"packed codes must be int32 in two dimensions, not int64\[128, 8\]\.$",
        ),
        ({"qzeros": np.zeros(16, np.int32)}, r"must be int32 in two dimensions, not int32\[16\]\.$"),
        ({"qzeros": np.zeros((2, 7), np.int32)}, r"does not fit scales \[2, 64\] and zero points \[2, 56\]\.$"),
        (
            {"scales": np.ones((2, 63), np.float16)},
            r"^qweight of 128 inputs and 64 outputs does not fit scales \[2, 63\]",
        ),
        (
            {"scales": np.ones((0, 64), np.float16), "qzeros": np.zeros((0, 8), np.int32)},
            r"does not fit scales \[0, 64\] and zero points \[0, 64\]\.$",
        ),
        (
            {"scales": np.ones((3, 64), np.float16), "qzeros": np.zeros((3, 8), np.int32)},
            r"does not fit scales \[3, 64\]",
        ),
        (
            {"scales": np.ones((8, 64), np.float16), "qzeros": np.zeros((8, 8), np.int32)},
            r"block_size of uint4 must be 32 or a multiple of 64, not 16\.$",
        ),
        (
            {"scales": np.full((2, 64), 1 + 2**-12, np.float32)},
            r"scales are float32 and do not fit float16; give the model's 16-bit weights\.$",
        ),
        ({"scales": np.full((2, 64), 1e6, jnp.bfloat16)}, r"scales are bfloat16 and do not fit float16"),
    ],
)
def test_awq_refuses(changed, message):
    with pytest.raises(UserError, match=message):
        from_awq(AWQ | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qweight": np.zeros((16, 8, 8), np.int32)}, r"must be int32 in two dimensions, not int32\[16, 8, 8\]\.$"),
        ({"g_idx": np.arange(128)[::-1] // 64}, r"g_idx puts inputs out of the order of their groups \(act-order\)"),
        ({"g_idx": np.arange(64) // 64}, r"g_idx puts inputs out of the order of their groups \(act-order\)"),
        ({"qweight": np.zeros((15, 64), np.int32)}, r"block_size of uint4 must be 32 or a multiple of 64, not 60\.$"),
        ({"qweight": np.zeros((16, 56), np.int32)}, r"^qweight of 128 inputs and 56 outputs does not fit"),
    ],
)
def test_gptq_refuses(changed, message):
    with pytest.raises(UserError, match=message):
        from_gptq(GPTQ | changed)


def test_float_scales_that_fit_are_taken():
    scales = np.full((2, 64), 0.375, jnp.bfloat16)
    for q in (from_awq(AWQ | {"scales": scales}), from_gptq(GPTQ | {"scales": scales.astype(np.float32)})):
        assert q.absmax.dtype == np.float16 and (q.absmax == 0.375).all()


BYTES = np.zeros((4, 32), np.uint8)


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (BYTES, BYTES[:, :2], r"MXFP4 blocks \[4, 32\] do not fit scales \[4, 2\]\.$"),
        (BYTES.reshape(4, 2, 16), BYTES[:, :3], r"MXFP4 blocks \[4, 2, 16\] do not fit scales \[4, 3\]\.$"),
        (BYTES.reshape(4, 2, 16), np.full((4, 2), 255, np.uint8), r"MXFP4 scales hold NaN\.$"),
        (BYTES.reshape(4, 2, 16).view(np.int8), BYTES[:, :2], r"packed codes must be uint8, not int8\.$"),
        (
            BYTES.reshape(4, 2, 16),
            np.ones((4, 2), np.float32),
            "scales must be float8_e8m0fnu or its bytes, not float32",
        ),
    ],
)
def test_mxfp4_refuses(blocks, scales, message):
    with pytest.raises(UserError, match=message):
        from_mxfp4(blocks, scales)


@pytest.mark.parametrize(
    ("packed", "scales", "factor", "message"),
    [
        (BYTES[0], BYTES[:, :4], 1, r"NVFP4 codes \[32\] do not fit scales \[4, 4\]\.$"),
        (BYTES, BYTES[:, :2], 1, r"NVFP4 codes \[4, 32\] do not fit scales \[4, 2\]\.$"),
        (BYTES[:, :4], BYTES[:, :0], 1, r"NVFP4 codes \[4, 4\] do not fit scales \[4, 0\]\.$"),
        (BYTES.view(np.int8), BYTES[:, :4], 1, r"packed codes must be uint8, not int8\.$"),
        (BYTES, np.ones((4, 4), np.float16), 1, r"scales must be float8_e4m3fn or its bytes, not float16\.$"),
        (BYTES, BYTES[:, :4], [1, 2], r"NVFP4 has one global scale a weight, not 2\.$"),
        (BYTES, BYTES[:, :4] + np.uint8(127), 1, r"NVFP4 scales are not finite\.$"),
        (BYTES, BYTES[:, :4] + np.uint8(1), 0, r"NVFP4 scales are not finite\.$"),
        (BYTES, BYTES[:, :4], np.nan, r"NVFP4 scales are not finite\.$"),
    ],
)
def test_nvfp4_refuses(packed, scales, factor, message):
    with pytest.raises(UserError, match=message):
        from_nvfp4(packed, scales, factor, convention="divide")


def test_gguf_refuses():
    with pytest.raises(UserError, match=r"rows of 19 bytes are no whole q4_0 blocks of 18\.$"):
        from_gguf(np.zeros((2, 19), np.uint8), "q4_0")
    with pytest.raises(UserError, match=r"mxfp4 scales hold NaN\.$"):
        from_gguf(np.full((2, 17), 255, np.uint8), "mxfp4")
    with pytest.raises(UserError, match=r"GGUF has no type that holds uint4 weights as they are; it has q4_0, q4_1, "):
        to_gguf(from_awq(AWQ))
    one = from_gguf(random_blocks("q4_0"), "q4_0")
    with pytest.raises(UserError, match=r"A GGUF tensor is one matrix of whole blocks, not \[1, 64, 256\]\.$"):
        to_gguf(jax.tree.map(lambda leaf: leaf[None], one))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.ones((2, 33)), r"Cannot quantise w: its dtype is float64, not float32, bfloat16 or float16\.$"),
        (np.ones((2, 33), np.float32), r"Cannot quantise w to q4_1: shape \(2, 33\) has no whole blocks of 32\.$"),
        (np.ones((1, 2, 32), np.float32), r"shape \(1, 2, 32\) has no whole blocks of 32\.$"),
        (np.full((1, 32), np.nan, np.float32), r"Cannot quantise w: it contains NaN or infinity\.$"),
        (np.full((1, 32), -np.inf, np.float16), r"Cannot quantise w: it contains NaN or infinity\.$"),
        (
            np.full((1, 32), 1e5, np.float32),
            r"Cannot quantise w to q4_1: its values are too large for float16 scales\.$",
        ),
    ],
)
def test_quantize_refuses(weight, message):
    with pytest.raises(UserError, match=message):
        quantize(weight, quant_type="q4_1", name="w")


@pytest.mark.parametrize("quant_type", ["uint4", "mxfp4", "nvfp4"])
def test_formats_of_checkpoints_are_not_made(quant_type):
    message = (
        f"Cannot quantise w to {quant_type}: such weights are only taken over from checkpoints; choose one of nf4, "
    )
    with pytest.raises(UserError, match=message):
        quantize(np.ones((2, 64), np.float32), quant_type=quant_type, name="w")
