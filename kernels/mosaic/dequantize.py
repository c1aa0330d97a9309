"""The kernel that dequantizes a whole weight to 16 bits, for an ordinary matrix product to follow."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic import tiles
from qlora_jax.kernels.mosaic.kernel import GPU, Execution
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight

# As `kernel.Cost.alu_per_weight`.
ALU_PER_WEIGHT = 3.75
# Column tiles that one CTA dequantizes, one after another, while the codes of the next are on their way.
_STEPS = 4


def tile_of(k: int) -> tuple[int, int]:
    """Rows and columns that a CTA dequantizes in one step, of a weight with K columns."""
    return (64, 128) if k % 128 == 0 else (128, 64)


def dequantize(w: PackedWeight, dtype: Any, *, execution: Execution = GPU) -> jax.Array:
    """Return the weight as an array [N, K] of bfloat16 or float16, each element rounded once.

    Args:
        w: the weight; N >= 128, or >= 64 if K is a multiple of 128.
        dtype: bfloat16 or float16.
        execution: on a GPU, or interpreted.
    """
    n, k = w.shape
    dtype = jnp.dtype(dtype)
    rows, columns = tile = tile_of(k)
    weight_format = w.format(dtype)
    column_tiles = k // columns
    steps = min(_STEPS, column_tiles)
    primitives = execution.primitives

    def kernel(codes: Any, *refs: Any) -> None:
        *scale_refs, layer_ref, out, w_tile, scale_map = refs
        layer = layer_ref[0]
        row = lax.min(lax.axis_index("n") * rows, n - rows)
        first = lax.min(lax.axis_index("k") * steps, column_tiles - steps)
        scales = primitives.Scales.of(weight_format, tile, layer, scale_refs, scale_map)

        def body(indices: Any, codes_tile: Any, scale: Any) -> Any:
            (step,) = indices
            column = (first + step) * columns
            upcoming = scales.fetch(row, lax.min(column + columns, k - columns))
            primitives.barrier()  # the last tile has been read
            primitives.dequantize_tile(weight_format, codes_tile, scale, w_tile)
            primitives.barrier()
            values = plgpu.load(w_tile, layout=plgpu.Layout.SMEM_GMEM_COPY(tile, dtype, 128))
            plgpu.store(out.at[pl.ds(row, rows), pl.ds(column, columns)], values, optimized=False)
            return scales.finish(upcoming)

        primitives.barrier()  # the map of scales is in place
        plgpu.emit_pipeline(
            body,
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec(
                    (pl.Element(rows), columns // 2),
                    lambda step: (row, first + step),
                    transforms=tiles.swizzle_of(columns // 2),
                    oob_fill_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )
            ],
            max_concurrent_steps=2,
            init_carry=scales.finish(scales.fetch(row, first * columns)),
        )(codes.at[layer])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((n, k), dtype),
        grid=(-(-n // rows), -(-column_tiles // steps)),
        grid_names=("n", "k"),
        scratch_types=[
            plgpu.SMEM(tile, dtype, transforms=tiles.tile_transforms(dtype)),
            plgpu.SMEM((256,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=execution.interpret,
    )(*w.arrays)
