"""AWQ's and GPTQ's tensors as a QuantizedTensor: groups of inputs that share a float16 scale and a zero point.

Both store a weight transposed, [in, out], eight codes in an int32::

    AWQ    qweight [in, out / 8]   nibble i of a word holds output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
           qzeros  [groups, out / 8] in the same order;  scales float16 [groups, out]
    GPTQ   qweight [in / 8, out]   nibble i of a word holds input 8 j + i
           qzeros  [groups, out / 8] nibble i output 8 j + i, less 1 in format "gptq", as it is in "gptq_v2"
           scales  float16 [groups, out];  g_idx int32 [in], the group of every input

    w[out, in] = (code - zero) * scale

Sources: AutoAWQ, awq/utils/packing_utils.py; GPTQModel, gptqmodel/nn_modules/qlinear/torch.py.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization.formats import FORMATS
from qlora_jax.quantization.quantized_tensor import QuantizedTensor

_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_IN_ORDER = np.arange(8)


def from_awq(tensors: Mapping[str, np.ndarray], *, dtype: Any = "float16") -> QuantizedTensor:
    """Return the weight of AWQ's tensors ("gemm" layout), lossless.

    Args:
        tensors: "qweight", "qzeros" and "scales".
        dtype: what `dequantize` should return by default.

    Raises:
        UserError: tensors that do not fit each other.
    """
    qweight, qzeros, scales = (np.asarray(tensors[name]) for name in ("qweight", "qzeros", "scales"))
    codes = _unpacked(qweight, _AWQ_ORDER)
    return _of(codes, _unpacked(qzeros, _AWQ_ORDER), scales, dtype)


def from_gptq(tensors: Mapping[str, np.ndarray], *, version: int = 1, dtype: Any = "float16") -> QuantizedTensor:
    """Return the weight of GPTQ's tensors, lossless.

    Args:
        tensors: "qweight", "qzeros", "scales" and, if there is one, "g_idx".
        version: 1 if zero points are stored less 1 (`checkpoint_format` "gptq"), 2 if not ("gptq_v2").
        dtype: what `dequantize` should return by default.

    Raises:
        UserError: tensors that do not fit each other, or inputs out of the order of their groups ("act-order").
    """
    qweight, qzeros, scales = (np.asarray(tensors[name]) for name in ("qweight", "qzeros", "scales"))
    codes = _unpacked(np.ascontiguousarray(qweight.T), _IN_ORDER).T
    zeros = _unpacked(qzeros, _IN_ORDER)
    if version == 1:
        zeros = zeros + np.uint8(1)  # 16 where all bits are set
    if "g_idx" in tensors:
        groups = np.asarray(tensors["g_idx"])
        size = -(-len(codes) // max(1, len(scales)))
        if groups.shape != (len(codes),) or not np.array_equal(groups, np.arange(len(codes)) // size):
            raise UserError(
                "g_idx puts inputs out of the order of their groups (act-order); quantise the model with "
                "desc_act=False, or give its 16-bit weights."
            )
    return _of(codes, zeros, scales, dtype)


def _unpacked(words: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Codes uint8 [a, 8 b] of int32 [a, b]; nibble i of a word is element order[i] of its eight."""
    if words.ndim != 2 or words.dtype != np.int32:
        raise UserError(f"packed codes must be int32 in two dimensions, not {words.dtype.name}{list(words.shape)}.")
    pairs = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    out = np.empty((*words.shape, 8), np.uint8)
    out[..., order[::2]], out[..., order[1::2]] = pairs & 15, pairs >> 4
    return out.reshape(len(words), -1)


def _of(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, dtype: Any) -> QuantizedTensor:
    """Put codes [in, out], zeros and scales [groups, out] together."""
    columns, rows = codes.shape
    groups = len(scales)
    if scales.shape != (groups, rows) or zeros.shape != scales.shape or not groups or columns % groups:
        raise UserError(
            f"qweight of {columns} inputs and {rows} outputs does not fit scales {list(scales.shape)} and zero points "
            f"{list(zeros.shape)}."
        )
    if scales.dtype != np.float16:
        narrowed = scales.astype(np.float16)
        if not np.array_equal(narrowed.astype(np.float32), scales.astype(np.float32)):
            raise UserError(f"scales are {scales.dtype.name} and do not fit float16; give the model's 16-bit weights.")
        scales = narrowed
    size = columns // groups
    FORMATS["uint4"].check_block_size(size)
    by_row = np.ascontiguousarray(codes.T)
    packed = (by_row[:, ::2] << 4 | by_row[:, 1::2]).reshape(-1)
    absmax, minimum = (np.ascontiguousarray(values.T).reshape(-1) for values in (scales, zeros))
    return QuantizedTensor(
        packed, absmax, None, None, (rows, columns), "uint4", size, jnp.dtype(dtype).name, minimum=minimum
    )
