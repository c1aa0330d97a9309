"""The pair that puts a QuantizedTensor into a bitsandbytes 4-bit or 8-bit checkpoint's tensors and back."""

import json
import math

import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization.codebooks import NESTED_BLOCK_SIZE, TABLES, dynamic_map
from qlora_jax.quantization.quantized_tensor import QuantizedTensor, abstract_quantized

_STATE_KEY = "quant_state.bitsandbytes__"


def to_bitsandbytes(q: QuantizedTensor) -> dict[str, np.ndarray]:
    """Return the tensors that bitsandbytes writes for this weight, byte for byte.

    The packed weight is under "weight" (uint8[ceil(n / 2), 1]). The other keys are the suffixes of a checkpoint's
    ``<name>.weight.<suffix>``: "absmax", "quant_map", "quant_state.bitsandbytes__nf4" (or "__fp4": the bytes of a JSON
    object) and, with double quantisation, "nested_absmax" and "nested_quant_map". An int8 weight is Linear8bitLt's
    "weight" (int8[N, K]) and "SCB" (float32[N]); it does not record the original dtype.

    Raises:
        UserError: a stack of weights; take one layer at a time.
    """
    if q.stack_shape:
        raise UserError(f"A stack of {math.prod(q.stack_shape)} weights has no bitsandbytes form; pass one layer.")
    if q.quant_type == "int8":
        return {"weight": np.asarray(q.codes), "SCB": np.asarray(q.absmax)}
    state = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": q.dtype,
        "shape": list(q.shape),
    }
    tensors = {
        "weight": np.asarray(q.codes)[:, None],
        "absmax": np.asarray(q.absmax),
        "quant_map": TABLES[q.quant_type].copy(),
    }
    if q.double_quant:
        tensors["nested_absmax"] = np.asarray(q.nested_absmax)
        tensors["nested_quant_map"] = dynamic_map().copy()
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(q.offset),
        }
    tensors[_STATE_KEY + q.quant_type] = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    return tensors


def from_bitsandbytes(tensors: dict[str, np.ndarray], *, dtype: str = "float16") -> QuantizedTensor:
    """Return the QuantizedTensor whose `to_bitsandbytes` these tensors are.

    Args:
        tensors: as `to_bitsandbytes` describes.
        dtype: the original dtype of an int8 weight (bitsandbytes quantises float16); a 4-bit one says its own.

    Raises:
        UserError: a missing tensor, code tables other than ours, or sizes that do not fit the recorded shape.
    """
    if "SCB" in tensors:
        codes, absmax = _take(tensors, "weight"), tensors["SCB"]
        q = QuantizedTensor(codes, absmax, None, None, tuple(codes.shape), "int8", 0, dtype)
        return _checked(q, abstract_quantized(codes.shape, quant_type="int8", dtype=dtype))
    state_keys = [key for key in tensors if key.startswith(_STATE_KEY)]
    if len(state_keys) != 1:
        raise UserError(f"A bitsandbytes 4-bit weight needs one {_STATE_KEY}<type> tensor; found {len(state_keys)}.")
    try:
        state = json.loads(np.asarray(tensors[state_keys[0]]).tobytes())
        quant_type, block_size = state["quant_type"], state["blocksize"]
        dtype, shape = state["dtype"], tuple(state["shape"])
        double_quant = "nested_offset" in state
        nested_block_size = state["nested_blocksize"] if double_quant else NESTED_BLOCK_SIZE
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state_keys[0]} is not the JSON that bitsandbytes writes: {error!r}.") from error
    expected = abstract_quantized(
        shape, quant_type=quant_type, block_size=block_size, double_quant=double_quant, dtype=dtype
    )
    if nested_block_size != NESTED_BLOCK_SIZE:
        raise UserError(f"nested_blocksize is {nested_block_size}; only {NESTED_BLOCK_SIZE} is supported.")
    nested_absmax = offset = None
    tables = {"quant_map": TABLES[quant_type]}
    if double_quant:
        nested_absmax = _take(tensors, "nested_absmax")
        offset = np.asarray(np.float32(state["nested_offset"]))
        tables["nested_quant_map"] = dynamic_map()
    for key, table in tables.items():
        if not np.array_equal(_take(tensors, key), table):
            raise UserError(f"{key} is not bitsandbytes' table for {quant_type}; such a weight cannot be represented.")
    codes = _take(tensors, "weight").reshape(-1)
    absmax = _take(tensors, "absmax")
    q = QuantizedTensor(codes, absmax, nested_absmax, offset, shape, quant_type, block_size, dtype)
    return _checked(q, expected)


def _take(tensors: dict[str, np.ndarray], key: str) -> np.ndarray:
    if key not in tensors:
        raise UserError(f"A bitsandbytes weight needs a tensor {key!r}; found {', '.join(sorted(tensors))}.")
    return np.asarray(tensors[key])


def _checked(q: QuantizedTensor, expected: QuantizedTensor) -> QuantizedTensor:
    for field in ("codes", "absmax", "nested_absmax", "offset"):
        found, wanted = getattr(q, field), getattr(expected, field)
        if wanted is not None and (found.shape != wanted.shape or found.dtype != wanted.dtype):
            raise UserError(
                f"The {field} of a {q.quant_type} weight of shape {q.shape} must be "
                f"{wanted.dtype}{list(wanted.shape)}, not {found.dtype}{list(found.shape)}."
            )
    return q
