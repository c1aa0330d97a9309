"""Byte equality with bitsandbytes, against the file that tests/reference/make_bitsandbytes_golden.py wrote."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quantization import dequantize, from_bitsandbytes, quantize, to_bitsandbytes
from qlora_jax.quantization.torch_sum import mean

HERE = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("golden", HERE / "reference" / "make_bitsandbytes_golden.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


@pytest.fixture(scope="module")
def stored():
    with np.load(HERE / "golden" / "bitsandbytes_quantization.npz") as file:
        return {key: file[key] for key in file.files}


def group(case):
    return "-".join(str(case[key]) for key in ("kind", "dtype", "quant_type"))


@pytest.mark.parametrize("wanted", sorted({group(case) for case in golden.cases()}))
def test_bytes_equal_bitsandbytes(stored, wanted):
    results = [r for r in json.loads(str(stored["cases"]))["results"] if group(r["case"]) == wanted]
    assert results or wanted.startswith("huge-float16")
    for result in results:
        case = result["case"]
        weight = golden.make_weight(case["kind"], case["shape"]).astype(jnp.dtype(case["dtype"]))
        assert golden.digest(weight) == result["input"], "make_weight does not reproduce the producer's weights"
        settings = {key: case[key] for key in ("quant_type", "block_size", "double_quant")}
        q = quantize(weight, **settings)
        tensors = to_bitsandbytes(q)
        found = {key: [str(t.dtype), list(t.shape), golden.digest(t)] for key, t in tensors.items()}
        assert found == result["tensors"], case
        if case["kind"] != "subnormal":  # XLA flushes float32 subnormals
            assert golden.digest(np.asarray(dequantize(q))) == result["dequantized"], case


def test_stored_bytes(stored):
    q = quantize(golden.make_weight("random", [32, 64]))
    tensors = {key.removeprefix("nf4/"): a for key, a in stored.items() if key.startswith("nf4/")}
    values = tensors.pop("dequantized")
    ours = to_bitsandbytes(q)
    assert set(ours) == set(tensors)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(ours[key], tensor, err_msg=key)
        assert ours[key].dtype == tensor.dtype
    np.testing.assert_array_equal(dequantize(q), values)
    back = from_bitsandbytes(tensors)
    np.testing.assert_array_equal(dequantize(back), values)
    assert (back.shape, back.dtype, back.quant_type, back.block_size) == ((32, 64), "float32", "nf4", 64)


@pytest.mark.parametrize("dtype", golden.DTYPES)
def test_int8_bytes(stored, dtype):
    weight = golden.make_weight("heavy", [67, 130]).astype(jnp.dtype(dtype))
    weight[3] = 0
    q = quantize(weight, quant_type="int8")
    np.testing.assert_array_equal(q.codes, stored[f"int8/{dtype}/codes"])
    np.testing.assert_array_equal(q.absmax, stored[f"int8/{dtype}/absmax"])
    np.testing.assert_array_equal(dequantize(q, "float32"), stored[f"int8/{dtype}/dequantized"])


def test_mean_adds_in_the_order_of_torch(stored):
    for size, expected in zip(stored["mean/sizes"], stored["mean/values"], strict=True):
        assert mean(np.abs(golden.normal(int(size)))) == expected, size
