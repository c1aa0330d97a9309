"""From a weight and any number of rows to a kernel, its tile sizes, and the padding that makes small shapes fit."""

import dataclasses
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
# The fast path of an architecture and up to how many rows the portable kernel's small tiles are predicted to take less
# time than those of 128 rows (by `roofline.predict` with either): on a B200 never.
_FAST_PATHS = {"sm_90a": ("wgmma", 64), "sm_100a": ("tcgen05", 0)}
KERNELS: dict[str, ModuleType] = {"streaming": streaming, "mma": mma, "wgmma": wgmma, "tcgen05": tcgen05}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The fused kernel of one product.

    Attributes:
        kernel: a name of `KERNELS`.
        block_m: rows of x that decoding a tile of W serves.
        block_n: columns of the output of one CTA.
        config: the kernel's tile sizes; None for "streaming", which has no others than its own.
    """

    kernel: str
    block_m: int
    block_n: int
    config: Any = None


def plan(chip: Chip, m: int, shape: tuple[int, int], *, transposed: bool) -> Plan:
    """Which kernel multiplies m >= 1 rows with a weight of this shape (N, K) on `chip`, and its tile sizes.

    The portable kernel is for chips without wgmma and tcgen05, and for few rows on a Hopper.
    """
    if not transposed and m <= streaming.MAX_ROWS:
        return Plan("streaming", -(-m // 8) * 8, streaming.BLOCK_N)
    odd = transposed and shape[1] % 128 != 0  # the output is not whole tiles of 128 columns
    name, portable_rows = _FAST_PATHS.get(chip.arch, ("mma", 0))
    config: Any
    if m <= portable_rows or name == "mma":
        name, config = "mma", mma_config(chip, m, odd)
    elif name == "wgmma":
        config = _wgmma_config(m, odd)
    else:
        config = _tcgen05_config(chip, m, shape[transposed], odd)
    return Plan(name, config.block_m, config.block_n, config)


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
    if isinstance(w, StackedWeight):
        if w.shape[0] >= _ROWS and w.shape[0] % 8 == 0:
            return Operands.of(w.stack, w.layer)
        w = w.take()  # one layer is padded, not all of them
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
    planned = plan(chip, m, w.shape, transposed=transposed)
    if planned.kernel == "streaming":
        return streaming.matmul(x, w, seam=seam, interpret=interpret)[:, : w.n_rows]
    module, config = KERNELS[planned.kernel], planned.config
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


def mma_config(chip: Chip, m: int, odd: bool) -> mma.Config:
    """Tile sizes of the portable kernel; `odd`: the output is not whole tiles of 128 columns.

    Two CTAs should share an SM, so that one decodes while the other multiplies; what limits them is shared memory.
    Larger block_m means less decoding for a product, but never more rows than there are.
    """
    # Two CTAs of block_m = 128 need 2 x 58 KiB: A100 and newer data-center chips have it.
    largest = 128 if chip.shared_memory_bytes >= 160 * 1024 else 64
    # Not 16: before Hopper, a tile's eights of rows are copied by four warps.
    block_m = next(size for size in (32, 64, 128) if size >= min(m, largest))
    if odd:
        return mma.Config(block_m=block_m, block_n=64, block_k=128)
    return mma.Config(block_m=block_m)


def _wgmma_config(m: int, odd: bool) -> wgmma.Config:
    if odd:
        return wgmma.Config(block_m=128, block_n=64, block_k=128, stages=2)
    return wgmma.Config(block_m=256 if m > 128 else 128)


def _tcgen05_config(chip: Chip, m: int, columns: int, odd: bool) -> tcgen05.Config:
    if odd:
        return tcgen05.Config(block_m=128, block_n=64, block_k=128, stages=2, decoders=1)
    small, large = tcgen05.Config(block_m=128, block_n=128, decoders=1), tcgen05.Config()
    if m <= small.block_m or columns < large.block_n:
        return small

    def waves(config: tcgen05.Config) -> int:
        return -(-(-(-m // config.block_m) * -(-columns // config.block_n)) // chip.n_sms)

    # A large tile is four small ones, but twice their decoding, which is what takes the time.
    return large if 2 * waves(large) <= waves(small) else small


def _with_rows(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0))) if rows > x.shape[0] else x
