"""AWQ's and GPTQ's tensors as a QuantizedTensor: groups of inputs that share a float16 scale and a zero point.

Both store a weight transposed, [in, out], eight codes in an int32::

    AWQ    qweight [in, out / 8]   nibble i of a word holds output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]
           qzeros  [groups, out / 8] in the same order;  scales float16 [groups, out]
    GPTQ   qweight [in / 8, out]   nibble i of a word holds input 8 j + i
           qzeros  [groups, out / 8] nibble i output 8 j + i; in format "gptq", not in "gptq_v2", each word less
                   0x11111111
           scales  float16 [groups, out];  g_idx int32 [in], the group of every input

    w[out, in] = (code - zero) * scale

Sources: AutoAWQ, awq/utils/packing_utils.py; GPTQModel, gptqmodel/nn_modules/qlinear/torch.py.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization.formats import FORMATS
from qlora_jax.quantization.quantized_tensor import QuantizedTensor

_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_IN_ORDER = np.arange(8)
# Words [rows, columns] that are transposed at a time, of AWQ twice as many: they fit a core's cache.
_AWQ_TILE, _GPTQ_TILE = (64, 128), (16, 4096)


def from_awq(
    tensors: Mapping[str, np.ndarray], *, dtype: Any = "float16", codes: np.ndarray | None = None
) -> QuantizedTensor:
    """Return the weight of AWQ's tensors ("gemm" layout), lossless.

    Args:
        tensors: "qweight", "qzeros" and "scales".
        dtype: what `dequantize` should return by default.
        codes: memory for the codes, uint8 [out * in / 2]; by default their own.

    Raises:
        UserError: tensors that do not fit each other.
    """
    qweight, qzeros, scales = (np.asarray(tensors[name]) for name in ("qweight", "qzeros", "scales"))
    _check_words(qweight)
    inputs, words = qweight.shape
    size = _group_size((inputs, 8 * words), qzeros, scales)
    by_output = _memory(codes, 8 * words, inputs)
    _put_awq(qweight, by_output)
    return _of(by_output, _unpacked(qzeros, _AWQ_ORDER), scales, size, dtype)


def from_gptq(
    tensors: Mapping[str, np.ndarray], *, version: int = 1, dtype: Any = "float16", codes: np.ndarray | None = None
) -> QuantizedTensor:
    """Return the weight of GPTQ's tensors, lossless.

    Args:
        tensors: "qweight", "qzeros", "scales" and, if there is one, "g_idx".
        version: 1 if zero points are stored less 1 (`checkpoint_format` "gptq"), 2 if not ("gptq_v2").
        dtype: what `dequantize` should return by default.
        codes: memory for the codes, uint8 [out * in / 2]; by default their own.

    Raises:
        UserError: tensors that do not fit each other, or inputs out of the order of their groups ("act-order").
    """
    qweight, qzeros, scales = (np.asarray(tensors[name]) for name in ("qweight", "qzeros", "scales"))
    _check_words(qweight)
    words, outputs = qweight.shape
    inputs = 8 * words
    size = _group_size((inputs, outputs), qzeros, scales)
    if version == 1:
        # Word by word, as GPTQModel takes 1 from zero points when it saves them: what a zero borrowed is paid back.
        qzeros = (qzeros.view(np.uint32) + np.uint32(0x11111111)).view(np.int32)
    if "g_idx" in tensors and not np.array_equal(tensors["g_idx"], np.arange(inputs) // size):
        raise UserError(
            "g_idx puts inputs out of the order of their groups (act-order); quantise the model with "
            "desc_act=False, or give its 16-bit weights."
        )
    by_output = _memory(codes, outputs, inputs)
    _put_gptq(qweight, by_output)
    return _of(by_output, _unpacked(qzeros, _IN_ORDER), scales, size, dtype)


def _memory(codes: np.ndarray | None, outputs: int, inputs: int) -> np.ndarray:
    """Return memory of codes as uint32 [out, in / 8]."""
    memory = np.empty(outputs * inputs // 2, np.uint8) if codes is None else codes
    return memory.view(np.uint32).reshape(outputs, inputs // 8)


def _put_gptq(qweight: np.ndarray, out: np.ndarray) -> None:
    """Transpose int32 [in / 8, out] to uint32 [out, in / 8], the even input in the high nibble of a byte."""
    words = qweight.view(np.uint32)
    for down, across in _tiles(words.shape, _GPTQ_TILE):
        tile = words[down, across]
        out[across, down] = ((tile & 0x0F0F0F0F) << 4 | tile >> 4 & 0x0F0F0F0F).T


def _put_awq(qweight: np.ndarray, out: np.ndarray) -> None:
    """Transpose int32 [in, out / 8] to uint32 [out, in / 8], the even input in the high nibble of a byte."""
    words = qweight.view(np.uint32).reshape(-1, 2, qweight.shape[1])
    pairs = out.view(np.uint8).reshape(qweight.shape[1], 8, -1)
    for down, across in _tiles((len(words), words.shape[2]), _AWQ_TILE):
        even, odd = words[down, 0, across], words[down, 1, across]
        # Byte i of a word is now nibble 2 i, or 2 i + 1, of two inputs.
        low, high = (even & 0x0F0F0F0F) << 4 | odd & 0x0F0F0F0F, even & 0xF0F0F0F0 | odd >> 4 & 0x0F0F0F0F
        for first, tile in enumerate((low, high)):
            for byte, output in enumerate(_AWQ_ORDER[first::2]):
                pairs[across, output, down] = tile.view(np.uint8)[:, byte::4].T


def _tiles(shape: tuple[int, int], tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    (rows, columns), (down, across) = shape, tile
    for row, column in itertools.product(range(0, rows, down), range(0, columns, across)):
        yield slice(row, row + down), slice(column, column + across)


def _check_words(words: np.ndarray) -> None:
    if words.ndim != 2 or words.dtype != np.int32:
        raise UserError(f"packed codes must be int32 in two dimensions, not {words.dtype.name}{list(words.shape)}.")


def _unpacked(words: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Codes uint8 [a, 8 b] of int32 [a, b]; nibble i of a word is element order[i] of its eight."""
    pairs = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    out = np.empty((*words.shape, 8), np.uint8)
    out[..., order[::2]], out[..., order[1::2]] = pairs & 15, pairs >> 4
    return out.reshape(len(words), -1)


def _group_size(shape: tuple[int, int], qzeros: np.ndarray, scales: np.ndarray) -> int:
    """Return the inputs of a group of a weight of shape (in, out), once all tensors are seen to fit each other."""
    _check_words(qzeros)
    columns, rows = shape
    groups = len(scales)
    zeros = (len(qzeros), 8 * qzeros.shape[1])
    if scales.shape != (groups, rows) or zeros != scales.shape or not groups or columns % groups:
        raise UserError(
            f"qweight of {columns} inputs and {rows} outputs does not fit scales {list(scales.shape)} and zero points "
            f"{list(zeros)}."
        )
    FORMATS["uint4"].check_block_size(columns // groups)
    return columns // groups


def _of(words: np.ndarray, zeros: np.ndarray, scales: np.ndarray, size: int, dtype: Any) -> QuantizedTensor:
    """Put codes uint32 [out, in / 8], zeros and scales [groups, out] together."""
    if scales.dtype != np.float16:
        with np.errstate(over="ignore"):
            narrowed = scales.astype(np.float16)
        if not np.array_equal(narrowed.astype(np.float32), scales.astype(np.float32)):
            raise UserError(f"scales are {scales.dtype.name} and do not fit float16; give the model's 16-bit weights.")
        scales = narrowed
    absmax, minimum = (np.ascontiguousarray(values.T).reshape(-1) for values in (scales, zeros))
    codes, shape = words.view(np.uint8).reshape(-1), (len(words), 8 * words.shape[1])
    return QuantizedTensor(codes, absmax, None, None, shape, "uint4", size, jnp.dtype(dtype).name, minimum=minimum)
