"""The pair that puts a QuantizedTensor into a GGUF file's blocks and back, and llama.cpp's quantisation to them.

A block of 32 elements is its scale, its minimum if it has one, then its codes: of 4 bits, byte j holds element j in the
low nibble and element j + 16 in the high one (ggml-common.h: block_q4_0, block_q4_1, block_mxfp4, block_q8_0).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization.formats import FORMATS
from qlora_jax.quantization.quantized_tensor import QuantizedTensor

BLOCK = 32
"""Elements of a block."""
# Elements that are quantised at a time: bounds the temporaries.
_CHUNK_ELEMENTS = 1 << 20
# Blocks whose codes are put into another order at a time: with what is made of them they fit a core's cache.
_CHUNK_BLOCKS = 1 << 13


class Layout(NamedTuple):
    """Bytes of a block.

    Attributes:
        scale: of its scale.
        minimum: of its minimum.
        codes: of its codes.
    """

    scale: int
    minimum: int
    codes: int

    @property
    def nbytes(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def record(self) -> np.dtype:
        """A block as a structured type."""
        scale = ("scale", "<f2" if self.scale == 2 else "u1")
        minimum = [("minimum", "<f2")] if self.minimum else []
        return np.dtype([scale, *minimum, ("codes", "<u8", (self.codes // 8,))])


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {"q4_0": Layout(2, 0, 16), "q4_1": Layout(2, 2, 16), "q8_0": Layout(2, 0, 32), "mxfp4": Layout(1, 0, 16)}
)
"""`quant_type`, which is ggml's name in lower case -> its blocks."""


def from_gguf(
    packed: np.ndarray, quant_type: str, *, dtype: Any = "float32", codes: np.ndarray | None = None
) -> QuantizedTensor:
    """Return the QuantizedTensor whose `to_gguf` these blocks are.

    Args:
        packed: uint8 [N, K / 32 * bytes of a block].
        quant_type: a name of `LAYOUTS`.
        dtype: what `dequantize` should return by default; the file does not say what the weight was made of.
        codes: memory for the codes, flat; by default their own.

    Raises:
        UserError: rows that are no whole blocks, or a power-of-two scale of NaN.
    """
    layout = LAYOUTS[quant_type]
    rows, row_bytes = packed.shape
    if row_bytes % layout.nbytes:
        raise UserError(f"rows of {row_bytes} bytes are no whole {quant_type} blocks of {layout.nbytes}.")
    columns = row_bytes // layout.nbytes * BLOCK
    blocks = np.ascontiguousarray(packed).reshape(-1).view(layout.record)
    scales = np.ascontiguousarray(blocks["scale"])
    if FORMATS[quant_type].scale == "e8m0" and (scales == 255).any():
        raise UserError(f"{quant_type} scales hold NaN.")
    minimum = np.ascontiguousarray(blocks["minimum"]) if layout.minimum else None
    eight = FORMATS[quant_type].bits == 8
    if codes is None:
        codes = np.empty(len(blocks) * layout.codes, np.int8 if eight else np.uint8)
    by_block = codes.view(np.uint64).reshape(len(blocks), -1)
    if eight:
        by_block[:] = blocks["codes"]
    else:
        _halves_to_pairs(blocks["codes"], by_block)
    shape, name = (rows, columns), jnp.dtype(dtype).name
    return QuantizedTensor(codes, scales, None, None, shape, quant_type, BLOCK, name, minimum=minimum)


def to_gguf(q: QuantizedTensor) -> np.ndarray:
    """Return the blocks of a GGUF tensor, uint8 [N, K / 32 * bytes of a block].

    Raises:
        UserError: a type that GGUF does not have, or a stack of weights.
    """
    if q.quant_type not in LAYOUTS:
        raise UserError(f"GGUF has no type that holds {q.quant_type} weights as they are; it has {', '.join(LAYOUTS)}.")
    if q.stack_shape or len(q.shape) != 2 or q.shape[1] % BLOCK:
        raise UserError(f"A GGUF tensor is one matrix of whole blocks, not {[*q.stack_shape, *q.shape]}.")
    layout = LAYOUTS[q.quant_type]
    codes = np.ascontiguousarray(q.codes).view(np.uint64).reshape(-1, layout.codes // 8)
    blocks = np.empty(len(codes), layout.record)
    blocks["scale"] = np.asarray(q.absmax)
    if layout.minimum:
        blocks["minimum"] = np.asarray(q.minimum)
    if q.format.bits == 8:
        blocks["codes"] = codes
    else:
        _pairs_to_halves(codes, blocks["codes"])
    return blocks.view(np.uint8).reshape(q.shape[0], -1)


def quantize_blocks(weight: np.ndarray, quant_type: str, called: str) -> QuantizedTensor:
    """Quantise a [N, K] weight to the bytes that llama.cpp's reference makes of it (ggml-quants.c).

    Args:
        weight: float array.
        quant_type: "q4_0", "q4_1" or "q8_0".
        called: the weight's name in errors.

    Raises:
        UserError: NaN or infinity, rows that are no whole blocks, or values whose float16 scale overflows.
    """
    if weight.ndim != 2 or weight.shape[1] % BLOCK:
        raise UserError(
            f"Cannot quantise {called} to {quant_type}: shape {weight.shape} has no whole blocks of {BLOCK}."
        )
    blocks = np.ascontiguousarray(weight).reshape(-1, BLOCK)
    eight = FORMATS[quant_type].bits == 8
    codes = np.empty((len(blocks), BLOCK if eight else BLOCK // 2), np.int8 if eight else np.uint8)
    scales = np.empty(len(blocks), np.float16)
    minimum = np.empty(len(blocks), np.float16) if quant_type == "q4_1" else None
    for start in range(0, len(blocks), _CHUNK_ELEMENTS // BLOCK):
        part = slice(start, start + _CHUNK_ELEMENTS // BLOCK)
        values = blocks[part].astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"Cannot quantise {called}: it contains NaN or infinity.")
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            code, scale, low = _QUANTIZERS[quant_type](values)
            scales[part] = scale[:, 0]
            if minimum is not None:
                minimum[part] = low[:, 0]
        codes[part] = code if eight else code[:, ::2] << 4 | code[:, 1::2]
    if not (np.isfinite(scales).all() and (minimum is None or np.isfinite(minimum).all())):
        raise UserError(f"Cannot quantise {called} to {quant_type}: its values are too large for float16 scales.")
    flat, dtype = codes.reshape(-1), weight.dtype.name
    return QuantizedTensor(flat, scales, None, None, weight.shape, quant_type, BLOCK, dtype, minimum=minimum)


def _q4_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [n, 32], scales and minima [n, 1]: the value of largest magnitude becomes code 0, which is -8."""
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-8)
    # Two roundings as C's source has them; gguf before 0.18 followed compilers that contract product and sum.
    steps = values * _reciprocal(scale) + np.float32(8.5)
    return np.clip(np.trunc(steps), 0, 15).astype(np.uint8), scale, scale


def _q4_1(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, high = values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True)
    scale = (high - low) / np.float32(15)
    steps = (values - low) * _reciprocal(scale) + np.float32(0.5)
    return np.clip(np.trunc(steps), 0, 15).astype(np.uint8), scale, low


def _q8_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    steps = values * _reciprocal(scale)
    size = np.abs(steps)
    whole = np.floor(size)
    rounded = whole + np.floor(np.float32(2) * (size - whole))  # halves away from zero, as C's roundf
    return (np.sign(steps) * rounded).astype(np.int8), scale, scale


def _reciprocal(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


_QUANTIZERS = MappingProxyType({"q4_0": _q4_0, "q4_1": _q4_1, "q8_0": _q8_0})


def _halves_to_pairs(halves: np.ndarray, pairs: np.ndarray) -> None:
    """Move elements j and j + 16, which share a byte, to elements 2i and 2i + 1, both uint64 [n_blocks, 2]."""
    for start in range(0, len(halves), _CHUNK_BLOCKS):
        part = slice(start, start + _CHUNK_BLOCKS)
        words = np.ascontiguousarray(halves[part]).view(np.uint16)
        for half in range(2):
            nibbles = words >> 4 * half & 0x0F0F  # two neighbours, a byte each
            nibbles *= 0x1001  # the high byte is now the first's code beside the second's
            pairs[part, half] = (nibbles >> 8).astype(np.uint8).view(np.uint64)[:, 0]


def _pairs_to_halves(pairs: np.ndarray, halves: np.ndarray) -> None:
    """Do the inverse of `_halves_to_pairs`."""
    for start in range(0, len(pairs), _CHUNK_BLOCKS):
        part = slice(start, start + _CHUNK_BLOCKS)
        words = pairs[part].view(np.uint8).astype(np.uint16)
        nibbles = (words >> 4 | words << 8) & 0x0F0F
        low, high = nibbles[:, :8], nibbles[:, 8:] << 4
        halves[part] = (low | high).view(np.uint64)
