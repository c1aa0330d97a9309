"""From a weight and any number of rows to a kernel, its tile sizes, and the padding that makes small shapes fit."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.gpus import Chip
from qlora_jax.kernels.mosaic import dequantize as decoding
from qlora_jax.kernels.mosaic import machine, mma, streaming, tcgen05, tiles, wgmma
from qlora_jax.kernels.mosaic.operands import Operands, pad_contraction
from qlora_jax.kernels.weights import StackedWeight, Weight
from qlora_jax.quantization import QuantizedTensor

DTYPES = (jnp.bfloat16, jnp.float16)
# Rows of W that every tile fits into.
_ROWS = 128
# Up to here the portable kernel's small tiles waste less than wgmma's and tcgen05's, which begin at 128 rows.
_PORTABLE_ROWS = 64


def why_not(w: Weight, dtype: Any) -> str | None:
    """Why the kernels cannot take this weight and dtype of activations: the end of a sentence, or None if they can."""
    if not isinstance(w, QuantizedTensor | StackedWeight):
        return "the weight is not quantised"
    if w.quant_type not in ("nf4", "fp4"):
        return f"the weight is {w.quant_type}, not 4-bit"
    if dtype not in DTYPES:
        return f"the activations are {jnp.dtype(dtype).name}, not bfloat16 or float16"
    if len(w.shape) != 2 or w.shape[1] % tiles.RUN:
        return f"the weight's shape {w.shape} has no whole runs of {tiles.RUN} codes in a row"
    return None


def operands(w: Weight) -> Operands:
    """View a 4-bit weight for the kernels; small ones are padded with zero rows of codes."""
    if isinstance(w, StackedWeight) and w.shape[0] >= _ROWS:
        return Operands.of(w.stack, w.layer).with_rows(_ROWS)
    if isinstance(w, StackedWeight):
        w = w.take()
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"not a quantised weight: {type(w).__name__}")
    return Operands.of(w).with_rows(_ROWS)


def matmul(
    x: jax.Array,
    w: Operands,
    *,
    transposed: bool,
    chip: Chip,
    seam: ModuleType = machine,
    interpret: Any = None,
) -> jax.Array:
    """Return x @ W^T [M, N], or x @ W [M, K] if `transposed`, with the fused kernel for `chip`.

    Args:
        x: [M, K] ([M, N] if transposed), bfloat16 or float16, M >= 1.
        w: of `operands`.
        transposed: multiply by W.
        chip: the GPU it will run on.
        seam: `machine`, or `reference` in interpret mode.
        interpret: Pallas interpret parameters.
    """
    m = x.shape[0]
    n, _ = w.shape
    if not transposed and m <= streaming.MAX_ROWS:
        return streaming.matmul(x, w, seam=seam, interpret=interpret)[:, : w.n_rows]
    module, config = choose_kernel(chip, m, w.shape, transposed)
    # Where there is TMA, rows come by eights.
    x = _with_rows(x, max(config.block_m, -(-m // 8) * 8))
    if transposed:
        x = jnp.pad(x, ((0, 0), (0, n - x.shape[1])))
        x = pad_contraction(x, n, config.block_k)
    y = module.matmul(x, w, config=config, transposed=transposed, seam=seam, interpret=interpret)
    return y[:m] if transposed else y[:m, : w.n_rows]


def dequantize(w: Operands, dtype: Any, *, seam: ModuleType = machine, interpret: Any = None) -> jax.Array:
    """Return the weight [N, K] in bfloat16 or float16."""
    return decoding.dequantize(w, dtype, seam=seam, interpret=interpret)[: w.n_rows]


def choose_kernel(chip: Chip, m: int, shape: tuple[int, int], transposed: bool) -> tuple[ModuleType, Any]:
    """The module and the Config that multiply m rows by a weight of `shape` (N, K) on a chip.

    The tensor cores of data-center chips since Hopper need many rows to be worth their set-up; the portable kernel
    takes the others, and all other chips.
    """
    odd = transposed and shape[1] % 128 != 0  # the output is not whole tiles of 128 columns
    if chip.arch == "sm_90a" and m > _PORTABLE_ROWS:
        block_m = 256 if m > 128 and not odd else 128
        if odd:
            return wgmma, wgmma.Config(block_m=block_m, block_n=64, block_k=128, stages=2)
        return wgmma, wgmma.Config(block_m=block_m)
    if chip.arch == "sm_100a" and m > _PORTABLE_ROWS:
        if odd:
            return tcgen05, tcgen05.Config(block_m=128, block_n=64, block_k=128, stages=2, decoders=1)
        # Small outputs: tiles of which two fit an SM, and enough of them for all SMs.
        columns = shape[transposed]
        if m <= 128 or columns < 256 or -(-m // 256) * -(-columns // 256) < chip.n_sms:
            return tcgen05, tcgen05.Config(block_m=128, block_n=128, decoders=1)
        return tcgen05, tcgen05.Config()
    return mma, mma_config(chip, m, odd)


def mma_config(chip: Chip, m: int, odd: bool) -> mma.Config:
    """Tile sizes of the portable kernel; `odd`: the output is not whole tiles of 128 columns.

    Two CTAs should share an SM, so that one decodes while the other multiplies; what limits them is shared memory.
    Larger block_m means less decoding for a product, but never more rows than there are.
    """
    # Two CTAs of block_m = 128 need 2 x 58 KiB: A100 and newer data-center chips have it.
    largest = 128 if chip.shared_memory_bytes >= 160 * 1024 else 64
    # Where there is no TMA, a warpgroup cannot copy less than 32 rows of 64.
    block_m = next(size for size in (32, 64, 128) if size >= min(m, largest))
    if odd:
        return mma.Config(block_m=block_m, block_n=64, block_k=128)
    return mma.Config(block_m=block_m)


def _with_rows(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0))) if rows > x.shape[0] else x
