"""The pair that puts a QuantizedTensor into a bitsandbytes 4-bit or 8-bit checkpoint's tensors and back."""

import dataclasses
import json
import math
import reprlib
from typing import Any

import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization.codebooks import BLOCK_SIZES, NESTED_BLOCK_SIZE, TABLES, dynamic_map
from qlora_jax.quantization.quantized_tensor import QuantizedTensor, abstract_quantized

_STATE_KEY = "quant_state.bitsandbytes__"
_DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class QuantState:
    """Contents of a quant_state tensor.

    Attributes:
        quant_type: "nf4" or "fp4".
        block_size: elements that share a scale.
        dtype: of the original weight.
        shape: of the weight.
        offset: of the scales; None without double quantisation.
    """

    quant_type: str
    block_size: int
    dtype: str
    shape: tuple[int, ...]
    offset: float | None


def quant_state(raw: bytes, name: str) -> QuantState:
    """Read the JSON object of a quant_state tensor.

    Args:
        raw: its bytes.
        name: of the tensor, for messages.

    Raises:
        UserError: it is not what bitsandbytes writes; names the tensor and the first field that is wrong.
    """
    try:
        state = json.loads(raw)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise UserError(f"{name} is not the JSON that bitsandbytes writes.")

    def check(field: str, valid: bool, wanted: str) -> None:
        if not valid:
            found = reprlib.repr(state[field]) if field in state else "missing"
            raise UserError(f"{name} is not the JSON that bitsandbytes writes: {field} must be {wanted}, is {found}.")

    def one_of(field: str, *allowed: Any) -> Any:
        # JSON's true equals 1, and lists are in no set.
        value = state.get(field)
        check(field, any(type(value) is type(other) and value == other for other in allowed), _either(allowed))
        return value

    quant_type, block_size = one_of("quant_type", "nf4", "fp4"), one_of("blocksize", *BLOCK_SIZES)
    dtype = one_of("dtype", *_DTYPES)
    shape: Any = state.get("shape")
    sizes = isinstance(shape, list) and shape and all(type(size) is int and 0 < size < 2**31 for size in shape)
    check("shape", bool(sizes), "a list of positive integers")
    if "nested_offset" not in state:
        return QuantState(quant_type, block_size, dtype, tuple(shape), None)
    offset, largest = state["nested_offset"], float(np.finfo(np.float32).max)
    check("nested_offset", type(offset) in (int, float) and abs(offset) <= largest, "a finite number")
    one_of("nested_blocksize", NESTED_BLOCK_SIZE)
    one_of("nested_dtype", "float32")
    return QuantState(quant_type, block_size, dtype, tuple(shape), float(offset))


def _either(allowed: tuple[Any, ...]) -> str:
    return " or ".join(map(str, allowed))


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
    state = quant_state(np.asarray(tensors[state_keys[0]]).tobytes(), state_keys[0])
    quant_type, double_quant = state.quant_type, state.offset is not None
    expected = abstract_quantized(
        state.shape, quant_type=quant_type, block_size=state.block_size, double_quant=double_quant, dtype=state.dtype
    )
    nested_absmax = offset = None
    tables = {"quant_map": TABLES[quant_type]}
    if double_quant:
        nested_absmax, offset = _take(tensors, "nested_absmax"), np.asarray(state.offset, np.float32)
        tables["nested_quant_map"] = dynamic_map()
    for key, table in tables.items():
        if not np.array_equal(_take(tensors, key), table):
            raise UserError(f"{key} is not bitsandbytes' table for {quant_type}; such a weight cannot be represented.")
    codes = _take(tensors, "weight").reshape(-1)
    absmax = _take(tensors, "absmax")
    q = QuantizedTensor(codes, absmax, nested_absmax, offset, state.shape, quant_type, state.block_size, state.dtype)
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
