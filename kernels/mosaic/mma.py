"""The portable kernel: `mma.sync` on decoded tiles, for every GPU from sm_80 on."""

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic import machine, tiles
from qlora_jax.kernels.mosaic.operands import Operands

# See `tiles.place`.
_BAND = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes.

    Attributes:
        block_m: rows of x of one CTA.
        block_n: columns of the output of one CTA.
        block_k: contracted elements of one step. block_n * block_k must be a multiple of 128 runs of 64 codes.
        stages: tiles in flight.
        m_warps: warps along the rows (1, 2 or 4); the others go along the columns.
    """

    block_m: int = 64
    block_n: int = 128
    block_k: int = 64
    stages: int = 2
    m_warps: int = 2


def matmul(
    x: jax.Array,
    w: Operands,
    *,
    config: Config,
    transposed: bool = False,
    seam: ModuleType = machine,
    interpret: Any = None,
) -> jax.Array:
    """Return x @ W^T [M, N], or x @ W [M, K] if `transposed`, in x.dtype, summed in float32.

    Every tile that would reach over an edge is moved back inside, and so computes some elements a second time, to the
    same bits: nothing is masked and nothing of W is padded.

    Args:
        x: bfloat16 or float16 [M, K], M >= block_m; if transposed [M, N'], as `operands.pad_contraction` makes it.
        w: the weight, N a multiple of 8 and N >= block_n (block_k if transposed).
        config: tile sizes; K a multiple of block_k, or of block_n if transposed.
        transposed: multiply by W instead of W^T.
        seam: `machine`, or `reference` in interpret mode.
        interpret: Pallas interpret parameters.
    """
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    m = x.shape[0]
    n, k = w.shape
    tiling = tiles.Tiling(m, n, k, transposed, block_m, block_n, block_k, _BAND)
    n_out, steps, tile = tiling.n_out, tiling.steps, tiling.tile
    decoding = w.decoding(x.dtype)

    def kernel(x_ref: Any, codes: Any, *refs: Any) -> None:
        *scale_refs, layer_ref, out, w_tile, scale_scratch = refs
        layer = layer_ref[0]
        m0, n0 = tiling.origin(lax.axis_index("tile"))

        corner = functools.partial(tiling.corner, n0=n0)
        scales = seam.Scales.of(decoding, tile, layer, scale_refs, scale_scratch)

        def body(indices: Any, x_tile: Any, codes_tile: Any, carry: Any) -> Any:
            (step,) = indices
            acc, scale = carry
            upcoming = scales.fetch(*corner(lax.min(step + 1, steps - 1)))
            seam.barrier()  # all warps are done with the last step's tile
            seam.decode(decoding, codes_tile, scale, w_tile)
            seam.barrier()
            acc = seam.mma(acc, x_tile, w_tile, transposed=transposed, m_warps=config.m_warps)
            return acc, scales.finish(upcoming)

        seam.barrier()  # the table of scales is in place
        zero = seam.zero_accumulator((block_m, block_n), x.dtype, config.m_warps)
        first = scales.finish(scales.fetch(*corner(jnp.int32(0))))
        in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        acc, _ = plgpu.emit_pipeline(
            body,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec(
                    (pl.Element(block_m), block_k),
                    lambda step: (m0, step),
                    transforms=tiles.tile_transforms(x.dtype),
                    oob_fill_mode=in_bounds,
                ),
                plgpu.BlockSpec(
                    (pl.Element(tile[0]), pl.Element(tile[1] // 2)),
                    lambda step: (corner(step)[0], corner(step)[1] // 2),
                    transforms=tiles.swizzle_of(tile[1] // 2),
                    oob_fill_mode=in_bounds,
                ),
            ],
            max_concurrent_steps=config.stages,
            init_carry=(zero, first),
        )(x_ref, codes.at[layer])
        plgpu.store(out.at[pl.ds(m0, block_m), pl.ds(n0, block_n)], acc.astype(x.dtype), optimized=False)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n_out), x.dtype),
        grid=(math.prod(tiling.grid),),
        grid_names=("tile",),
        scratch_types=[
            plgpu.SMEM(tile, x.dtype, transforms=tiles.tile_transforms(x.dtype)),
            plgpu.SMEM((256,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(x, *w.arrays)
