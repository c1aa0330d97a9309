"""The kernel for small M, as in token generation: every code is read once, into the registers it is used from.

A CTA owns 16 rows of W. Its four warps take turns along K, 256 columns at a time, multiply with mma.sync (W as the left
operand, x as the right one, so that eight rows of x are enough to fill it) and add their sums at the end. Reading takes
most of the time: the codes and scales of a step are on their way while the step before is dequantized.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.gpus import Chip
from qlora_jax.kernels.mosaic.kernel import GPU, Cost, Execution
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight
from qlora_jax.kernels.product import Product

COST = Cost(alu_per_weight=3.65, tensor_fraction=0.7, overlap=0.75, mma_sync=True)
MAX_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes; those of W are fixed by the assignment of codes to threads.

    Attributes:
        block_m: rows of x, rounded up to a multiple of 8.
    """

    block_m: int = 8

    @property
    def block_n(self) -> int:
        """Rows of W of one CTA."""
        return 16

    @property
    def block_k(self) -> int:
        """Columns of one step."""
        return 1024

    @property
    def dequantizers(self) -> int:
        """Warpgroups that dequantize a tile together."""
        return 1


def supports(chip: Chip, product: Product) -> bool:
    """Accept up to 16 rows of x in the forward direction, on every chip."""
    del chip
    return not product.transposed and product.m <= MAX_ROWS


def config_for(chip: Chip, product: Product) -> Config:
    """Round the rows of x up to a multiple of 8."""
    del chip
    return Config(-(-product.m // 8) * 8)


def pad_activations(x: jax.Array, w: PackedWeight, config: Config, *, transposed: bool) -> jax.Array:
    """Return x: rows and columns beyond its edges count as zeros."""
    del w, config, transposed
    return x


def matmul(
    x: jax.Array,
    w: PackedWeight,
    *,
    config: Config,
    transposed: bool = False,
    execution: Execution = GPU,
) -> jax.Array:
    """See `kernel.Kernel.matmul`; x has any number of rows up to block_m, the weight N >= 16, and not `transposed`."""
    if transposed or x.shape[0] > config.block_m or w.shape[0] < config.block_n:
        raise ValueError(f"x {x.shape} and W {w.shape}, transposed={transposed}, do not fit {config}")
    m, k = x.shape
    n, _ = w.shape
    rows, columns = config.block_n, config.block_k
    m_tiles = config.block_m // 8
    steps = -(-k // columns)
    weight_format = w.format(x.dtype)
    primitives = execution.primitives

    def kernel(x_ref: Any, codes: Any, *refs: Any) -> None:
        *scale_refs, layer_ref, out, partial_sums, scale_map = refs
        layer = layer_ref[0]
        row = lax.min(lax.axis_index("n") * rows, n - rows)
        tile = (rows, columns)
        scales = primitives.Scales.of(weight_format, tile, layer, scale_refs, scale_map, fragments=True)
        layer_codes = codes.at[layer]

        def read(step: Any) -> Any:
            column = step * columns
            return primitives.load_codes(weight_format, layer_codes, row, column), scales.fetch(row, column)

        def body(step: Any, carry: Any) -> Any:
            acc, (words, scale) = carry
            upcoming = read(lax.min(step + 1, steps - 1))
            scale = scales.finish(scale)
            acc = primitives.multiply_codes(weight_format, acc, words, scale, x_ref, step * columns)
            return acc, upcoming

        first = read(jnp.int32(0))
        primitives.barrier()  # the map of scales is in place
        acc, _ = lax.fori_loop(0, steps, body, (primitives.zero_fragments(m_tiles), first))
        primitives.store_fragments(acc, partial_sums, out, row)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(-(-n // rows),),
        grid_names=("n",),
        scratch_types=[
            plgpu.SMEM((4, rows, 8 * m_tiles), jnp.float32),
            plgpu.SMEM((256,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=execution.interpret,
    )(x, *w.arrays)
