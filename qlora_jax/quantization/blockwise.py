"""Block-wise 4-bit quantisation, byte for byte as bitsandbytes does it on a CPU, and its inverse.

`quantize` works on the host, through XLA's CPU backend in pieces of one fixed shape, so that a model compiles one
program whatever its weights' shapes are and the memory needed beside input and output stays at a few MB.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization import gguf_blocks, int8, torch_sum
from qlora_jax.quantization.codebooks import NESTED_BLOCK_SIZE, TABLES, boundaries, dynamic_map
from qlora_jax.quantization.formats import FORMATS, format_named
from qlora_jax.quantization.quantized_tensor import QuantizedTensor, abstract_quantized

PIECE = 1 << 20
"""Elements that are quantised at a time."""
# Scales that are quantised at a time: with what is made of them they fit a core's cache.
_SCALES = 1 << 16
QUANTIZED_IN_PIECES = ("nf4", "fp4", "int4")
"""Types that `quantize_pieces` makes."""

# XLA's CPU backend flushes float32 subnormals to zero, bitsandbytes does not. Blocks in which a subnormal could matter
# are done again in numpy.
_SMALL, _LARGE = np.float32(2.0**-100), np.float32(2.0**20)
_INFINITY_BITS = np.uint32(0x7F800000)
_SMALLEST_DIVISOR = np.float32(1e-38)


def quantize(
    weight: Any,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    name: str | None = None,
) -> QuantizedTensor:
    """Quantise one weight; the result's buffers are numpy arrays on the host.

    NF4 and FP4 are byte-equal to bitsandbytes' ``quantize_4bit(..., compress_statistics=double_quant)`` on a CPU
    (with ``torch.set_num_threads(1)``: see `qlora_jax.quantization.torch_sum`), int8 to its
    ``int8_vectorwise_quant``, GGUF's types to the `gguf` package's own quantisation.

    Args:
        weight: float32, bfloat16 or float16 numpy or JAX array of any shape; [N, K] for "int8" and GGUF's types.
        quant_type: a name of `FORMATS` that can be made of weights (`Format.quantizes`).
        block_size: elements of the flattened weight that share a scale; a power of two in 32..4096 ("nf4", "fp4",
            "int4").
        double_quant: quantise the scales too, to 8 bits over blocks of 256 (of the same types).
        name: what to call the weight in errors.

    Raises:
        UserError: NaN or infinity in the weight, an unsupported dtype, an empty weight, or an unknown quant_type or
            block_size.
    """
    called = name or "the weight"
    weight = np.asarray(weight)
    dtype = weight.dtype.name
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"Cannot quantise {called}: its dtype is {dtype}, not float32, bfloat16 or float16.")
    if weight.size == 0:
        raise UserError(f"Cannot quantise {called}: it is empty (shape {weight.shape}).")
    kind = format_named(quant_type)
    if not kind.quantizes:
        made = ", ".join(name for name, each in FORMATS.items() if each.quantizes)
        raise UserError(
            f"Cannot quantise {called} to {quant_type}: such weights are only taken over from checkpoints; choose one "
            f"of {made}."
        )
    if quant_type in gguf_blocks.LAYOUTS:
        return gguf_blocks.quantize_blocks(weight, quant_type, called)
    if quant_type == "int8":
        if weight.ndim != 2:
            raise UserError(f"Cannot quantise {called} to int8: it needs two dimensions, not shape {weight.shape}.")
        codes, absmax = int8.quantize_rows(weight)
        _check_finite(absmax, called)
        return QuantizedTensor(codes, absmax, None, None, weight.shape, quant_type, 0, dtype)
    declared = abstract_quantized(
        weight.shape, quant_type=quant_type, block_size=block_size, double_quant=double_quant, dtype=dtype
    )
    quantized = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), declared)
    flat = np.ascontiguousarray(weight).reshape(-1)
    quantize_pieces((flat[start : start + PIECE] for start in range(0, flat.size, PIECE)), quantized, called)
    return quantized


def quantize_pieces(pieces: Iterable[np.ndarray], into: QuantizedTensor, called: str) -> None:
    """Quantise a weight that comes in pieces, as `quantize` does.

    Args:
        pieces: of the flat weight, `PIECE` elements each; the last may be shorter, or go on with whatever numbers. A
            piece is done with when the next is asked for.
        into: of one of `QUANTIZED_IN_PIECES`, whose arrays are filled.
        called: the weight's name in errors.

    Raises:
        UserError: NaN or infinity in the weight.
    """
    absmax = np.empty(into.absmax.shape, np.float32) if into.double_quant else into.absmax
    for i, piece in enumerate(pieces):
        codes = into.codes[i * PIECE // 2 : (i + 1) * PIECE // 2]
        scales = absmax[i * PIECE // into.block_size : (i + 1) * PIECE // into.block_size]
        _quantize_piece(piece, min(PIECE, into.n_elements - i * PIECE), into, (codes, scales), called)
    if into.double_quant:
        _quantize_scales(absmax, into)
        if not np.isfinite(into.offset):
            raise UserError(f"Cannot quantise {called} doubly: its values are so large that their scales overflow.")


def _check_finite(absmax: np.ndarray, called: str) -> None:
    if not np.isfinite(absmax).all():
        raise UserError(f"Cannot quantise {called}: it contains NaN or infinity.")


def _quantize_piece(
    piece: np.ndarray, n: int, into: QuantizedTensor, place: tuple[np.ndarray, np.ndarray], called: str
) -> None:
    """Fill packed codes uint8[ceil(n / 2)] and absmax float32[n_blocks] of the first n elements of a piece."""
    (codes, absmax), quant_type, block_size = place, into.quant_type, into.block_size
    n_whole = n // block_size
    if n_whole:
        if piece.size < PIECE:
            piece = np.concatenate([piece, np.empty(PIECE - n, piece.dtype)])
        chunk = piece.reshape(-1, block_size)
        blocks = chunk[:n_whole]
        with jax.default_device(_cpu_device()):
            results = _quantize_chunk(chunk, quant_type)
        packed, scales, redo = (np.asarray(a)[:n_whole] for a in results)
        absmax[:n_whole] = scales
        _check_finite(scales, called)
        out = codes[: n_whole * block_size // 2].reshape(-1, block_size // 2)
        out[:] = packed
        if redo.any():
            divisor = np.maximum(scales[redo], _SMALLEST_DIVISOR)
            scaled = blocks[redo].astype(np.float32) * (np.float32(1) / divisor)[:, None]
            out[redo] = _pack(_nearest(scaled, quant_type))
    if n_whole * block_size < n:
        # bitsandbytes treats the incomplete block apart: it divides instead of multiplying by the reciprocal, and
        # stores 1e-38 as the scale of zeros. An odd last nibble is the code of zero.
        rest = piece[n_whole * block_size : n].astype(np.float32)
        absmax[-1] = np.maximum(np.abs(rest).max(), _SMALLEST_DIVISOR)
        _check_finite(absmax[-1:], called)
        scaled = np.pad(rest / absmax[-1], (0, rest.size % 2))
        codes[n_whole * block_size // 2 :] = _pack(_nearest(scaled, quant_type))


def _cpu_device() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError("Quantising needs JAX's CPU backend: add cpu to JAX_PLATFORMS, or unset it.") from error


def _nearest(scaled: np.ndarray, quant_type: str) -> np.ndarray:
    midpoints, codes = boundaries(quant_type)
    return codes[np.searchsorted(midpoints, scaled, side="left")]


def _pack(codes: np.ndarray) -> np.ndarray:
    return codes[..., ::2] << 4 | codes[..., 1::2]


@functools.partial(jax.jit, static_argnames="quant_type")
def _quantize_chunk(blocks: jax.Array, quant_type: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (packed codes, absmax, whether numpy must do the block again) of float[n_blocks, block_size]."""
    halves = _every_other(blocks)
    bits = [jax.lax.bitcast_convert_type(half, jnp.uint32) & 0x7FFFFFFF for half in halves]
    # As integers, so that subnormals count and NaN is the largest of all.
    absmax_bits = jnp.maximum(*bits).max(axis=1)
    absmax = jax.lax.bitcast_convert_type(absmax_bits, jnp.float32)
    zero = absmax_bits == 0
    redo = ~zero & ((absmax < _SMALL) | (absmax > _LARGE))
    if quant_type != "nf4":
        # FP4 and INT4 have a boundary at zero, where the sign of the smallest value decides.
        smallest = _SMALL.view(np.uint32)
        redo |= (((bits[0] != 0) & (bits[0] < smallest)) | ((bits[1] != 0) & (bits[1] < smallest))).any(axis=1)
    reciprocal = jnp.where(zero, 0, 1 / absmax)[:, None]
    high, low = (_code(half * reciprocal, quant_type) for half in halves)
    return (high << 4 | low).astype(jnp.uint8), absmax, redo


def _every_other(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the elements at even and at odd places of each block, as float32.

    Two of 16 bits are taken as one word: loads at every other place do not vectorise.
    """
    if blocks.dtype.itemsize != 2:
        return blocks[:, ::2], blocks[:, 1::2]
    words = jax.lax.bitcast_convert_type(blocks.reshape(len(blocks), -1, 2), jnp.uint32)
    even, odd = (
        jax.lax.bitcast_convert_type(half.astype(jnp.uint16), blocks.dtype) for half in (words & 0xFFFF, words >> 16)
    )
    return even.astype(jnp.float32), odd.astype(jnp.float32)


def _code(scaled: jax.Array, quant_type: str) -> jax.Array:
    """Return the 4-bit codes (int32) of values in [-1, 1]; they may exceed it by a rounding, no midpoint is near."""
    midpoints, codes = boundaries(quant_type)
    code = jnp.full(scaled.shape, int(codes[0]), jnp.int32)
    # The code climbs, or falls, from midpoint to midpoint.
    for midpoint, step in zip(midpoints, np.diff(codes.astype(np.int32)), strict=True):
        code = code + jnp.where(scaled > midpoint, int(step), 0)
    return code


def _quantize_scales(absmax: np.ndarray, into: QuantizedTensor) -> None:
    """Fill the 8-bit scales, their own scales and the offset of a weight whose float32 scales are given."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        into.offset[...] = offset = torch_sum.mean(absmax)
        for start in range(0, absmax.size, _SCALES):
            n = min(_SCALES, absmax.size - start)
            blocks = np.zeros((-(-n // NESTED_BLOCK_SIZE), NESTED_BLOCK_SIZE), np.float32)
            np.subtract(absmax[start : start + n], offset, out=blocks.reshape(-1)[:n])
            nested_absmax = np.abs(blocks).max(axis=1)
            codes = _dynamic_codes()[_grid_index(blocks * (np.float32(1) / nested_absmax)[:, None])]
            codes[nested_absmax == 0] = 0
            into.absmax[start : start + n] = codes.reshape(-1)[:n]
            first = start // NESTED_BLOCK_SIZE
            into.nested_absmax[first : first + len(blocks)] = nested_absmax


def _grid_index(scaled: np.ndarray) -> np.ndarray:
    """Round float32 values in [-1, 1] to a grid of 65536 points."""
    half = (np.clip(scaled, np.float32(-1), np.float32(1)) + np.float32(1)) * np.float32(0.5)
    return (np.nan_to_num(half) * np.float32(65535) + np.float32(0.5)).astype(np.uint16)


@functools.cache
def _dynamic_codes() -> np.ndarray:
    """Return the 8-bit code of every point of the grid.

    bitsandbytes does not look up the nearest entry of the dynamic map itself but that of the nearest point of a grid of
    65536; a scale between two entries may so go to the farther one, and zero goes to 2.1e-5.
    """
    table = dynamic_map()
    midpoints = np.float32(0.5) * (table[:-1] + table[1:])
    grid = np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)
    return np.searchsorted(midpoints, grid, side="left").astype(np.uint8)


def block_scales(q: QuantizedTensor) -> jax.Array:
    """Return the float32 scales [*stack, n_blocks] of a weight in blocks: quantised ones restored."""
    absmax = jnp.asarray(q.absmax)
    if q.format.scale == "e8m0":
        return power_of_two(absmax)
    if q.format.scale == "e4m3":
        return jnp.take_along_axis(jnp.asarray(q.scale_map), absmax.astype(jnp.int32), axis=-1, mode="clip")
    if not q.double_quant:
        return absmax.astype(jnp.float32)
    nested = jnp.repeat(jnp.asarray(q.nested_absmax), NESTED_BLOCK_SIZE, axis=-1)[..., : absmax.shape[-1]]
    table = jnp.asarray(dynamic_map())
    # The entry 255 is exactly 1, so selecting changes no value; it stands between product and sum, which a compiler
    # would otherwise contract to one fused multiply-add with another rounding than bitsandbytes'.
    product = jnp.where(absmax == 255, nested, table.at[absmax].get(mode="promise_in_bounds") * nested)
    return product + jnp.asarray(q.offset)[..., None]


def power_of_two(code: jax.Array) -> jax.Array:
    """Return the float32 number 2^(code - 127) of an e8m0 code (uint8)."""
    bits = code.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(jnp.where(bits == 0, jnp.uint32(1 << 22), bits << 23), jnp.float32)


def _block_minima(q: QuantizedTensor, scales: jax.Array) -> jax.Array | None:
    """Return the float32 minima [*stack, n_blocks] of a weight with these scales; None of a format without.

    Of zero points they are exact, and so are the sums with them: 4 bits times a float16 number.
    """
    if q.minimum is None:
        return None
    minimum = jnp.asarray(q.minimum).astype(jnp.float32)
    return -minimum * scales if q.format.minimum == "zero_point" else minimum


def lookup(code: jax.Array, quant_type: str) -> jax.Array:
    """Return the float32 table entries of 4-bit codes (uint8).

    Four levels of selects, because they vectorise and gathers do not. The first level selects between constants with
    `low ^ (mask & (low ^ high))`: as `jnp.where` its constants would be arrays of the full shape, which differentiating
    a scan moves out of the loop and so into memory, all sixteen.
    """
    mask = -(code.astype(jnp.uint32) & 1)
    bits = TABLES[quant_type].view(np.uint32)
    level = [mask & (low ^ high) ^ low for low, high in zip(bits[::2], bits[1::2], strict=True)]
    return jax.lax.bitcast_convert_type(_select(code, level, 1), jnp.float32)


def _select(code: jax.Array, entries: list[jax.Array], first_bit: int) -> jax.Array:
    """Return ``entries[code >> first_bit]`` element by element."""
    for i in range(first_bit, 4):
        bit = (code & (1 << i)) != 0
        entries = [jnp.where(bit, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]


def _scaled_entries(
    code: jax.Array, scales: jax.Array, minima: jax.Array | None, quant_type: str, dtype: Any
) -> jax.Array:
    """Return ``dtype(table[code] * scale + minimum)``: of codes uint8 [*stack, n_blocks, block_size]."""
    return _affine(lookup(code, quant_type), scales[..., None], _column(minima)).astype(dtype)


def _affine(values: jax.Array, scales: jax.Array, minima: jax.Array | None) -> jax.Array:
    # Where there is a minimum the product is exact, so that one that is contracted with the sum rounds no differently.
    product = values * scales
    return product if minima is None else product + minima


def _column(minima: jax.Array | None) -> jax.Array | None:
    return None if minima is None else minima[..., None]


def _entries_of_scaled_tables(
    code: jax.Array, scales: jax.Array, minima: jax.Array | None, quant_type: str, dtype: Any
) -> jax.Array:
    """Return the same as `_scaled_entries` in a 16-bit dtype, through a table of 16 rounded values for each block.

    The selects then work on 16-bit elements, twice as many in a vector, and nothing is rounded element by element.
    (1024x1024 to bfloat16 on one core of a Zen 5: 230 us, against 420.) The blocks of an entry are side by side, where
    rounding them fills vectors: 62 us for 1536x576, against 88.
    """
    column = jnp.asarray(TABLES[quant_type]).reshape(16, *[1] * scales.ndim)
    table = _affine(column, scales, minima).astype(dtype)
    table = jax.lax.bitcast_convert_type(table, jnp.uint16)
    entries = [table[j][..., None] for j in range(16)]
    return jax.lax.bitcast_convert_type(_select(code, entries, 0), dtype)


def unpack(codes: jax.Array) -> jax.Array:
    """Return the 4-bit codes uint8 [..., 2m] of packed bytes uint8 [..., m], in the order of the elements."""
    return jax.lax.platform_dependent(codes, cpu=_unpack_through_words, default=_unpack_pairs)


def _unpack_pairs(codes: jax.Array) -> jax.Array:
    return jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(*codes.shape[:-1], -1)


def _unpack_through_words(codes: jax.Array) -> jax.Array:
    # A 16-bit word whose low byte is the even element's code, viewed as two bytes. On its own this vectorises; fused
    # with the look-up it would be redone element by element, hence the barrier. (1024x1024 dequantized on one core of a
    # Zen 5: 300 us, against 490 for interleaving in one fusion.)
    words = codes.astype(jnp.uint16)
    words = words >> 4 | (words & 15) << 8
    pairs = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(words, jnp.uint8))
    return pairs.reshape(*codes.shape[:-1], -1)


def dequantize(q: QuantizedTensor, dtype: Any = None) -> jax.Array:
    """Return the weights [*stack, *shape] in `dtype` (default: the original one) by QuantizedTensor's equation.

    Values equal those of bitsandbytes' `dequantize_4bit` bit for bit wherever it follows its own equation: its CPU
    kernel reads wrong scales if the last dimension is no multiple of block_size. XLA flushes float32 subnormals.

    Args:
        q: a quantised weight or stack; may be traced.
        dtype: float32, bfloat16 or float16.
    """
    dtype = jnp.dtype(dtype or q.dtype)
    if q.quant_type == "int8":
        return int8.dequantize_rows(q.codes, q.absmax).astype(dtype)
    stack, codes, scales = q.stack_shape, jnp.asarray(q.codes), block_scales(q)
    if q.format.bits == 8:
        blocks = _padded(codes, scales.shape[-1] * q.block_size).reshape(*scales.shape, q.block_size)
        values = _affine(blocks.astype(jnp.float32), scales[..., None], None).astype(dtype)
        return values.reshape(*stack, -1)[..., : q.n_elements].reshape(*stack, *q.shape)
    code = unpack(_padded(codes, scales.shape[-1] * q.block_size // 2)).reshape(*scales.shape, q.block_size)
    minima = _block_minima(q, scales)
    by_entries = functools.partial(_scaled_entries, quant_type=q.quant_type, dtype=dtype)
    if dtype.itemsize == 2:
        by_tables = functools.partial(_entries_of_scaled_tables, quant_type=q.quant_type, dtype=dtype)
        values = jax.lax.platform_dependent(code, scales, minima, cpu=by_tables, default=by_entries)
    else:
        values = by_entries(code, scales, minima)
    return values.reshape(*stack, -1)[..., : q.n_elements].reshape(*stack, *q.shape)


def _padded(codes: jax.Array, size: int) -> jax.Array:
    """Pad the last axis with zeros to whole blocks."""
    missing = size - codes.shape[-1]
    return jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)]) if missing else codes


_compiled_dequantize = jax.jit(dequantize, static_argnames="dtype")


def dequantize_on_host(q: QuantizedTensor) -> np.ndarray:
    """Return a weight or stack float32 in NumPy, by `dequantize` compiled for the CPU.

    Compiled, it takes a byte of memory an element beside the result; without, several arrays of its size.
    """
    with jax.default_device(_cpu_device()):
        return np.asarray(_compiled_dequantize(q, dtype="float32"))
