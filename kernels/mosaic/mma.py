"""The portable kernel: `mma.sync` on dequantized tiles, for every GPU from sm_80 on."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.gpus import Chip
from qlora_jax.kernels.mosaic import tiles
from qlora_jax.kernels.mosaic.kernel import GPU, Cost, Execution, check_operands, pad_to_tiles
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight
from qlora_jax.kernels.product import Product

# CTAs that share a multiprocessor overlap dequantizing and multiplying.
COST = Cost(alu_per_weight=3.9, tensor_fraction=0.7, overlap=0.75, mma_sync=True)

# See `tiles.rasterize`.
GRID_TILE_WIDTH = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes.

    Attributes:
        block_m: rows of x of one CTA.
        block_n: columns of the output of one CTA.
        block_k: contracted elements of one step. block_n * block_k must be a multiple of 128 groups of 64 codes.
        stages: tiles in flight.
        m_warps: warps along the rows (1, 2 or 4); the others go along the columns.
    """

    block_m: int = 64
    block_n: int = 128
    block_k: int = 64
    stages: int = 2
    m_warps: int = 2

    @property
    def dequantizers(self) -> int:
        """Warpgroups that dequantize a tile together."""
        return 1


pad_activations = pad_to_tiles


def supports(chip: Chip, product: Product) -> bool:
    """Accept every product: the kernel for chips and products without a faster one."""
    del chip, product
    return True


def config_for(chip: Chip, product: Product) -> Config:
    """Choose tile sizes with which two CTAs share an SM, so that one dequantizes while the other multiplies.

    Shared memory limits them. Larger block_m means less dequantization, but there are never more rows than x has.
    """
    # Two CTAs of block_m = 128 need 2 x 58 KiB: A100 and newer data-center chips have it.
    largest = 128 if chip.shared_memory_bytes >= 160 * 1024 else 64
    # Not 16: before Hopper, a tile's eights of rows are copied by four warps.
    block_m = next(size for size in (32, 64, 128) if size >= min(product.m, largest))
    if tiles.ragged_output(product):
        return Config(block_m=block_m, block_n=64, block_k=128)
    return Config(block_m=block_m)


def matmul(
    x: jax.Array,
    w: PackedWeight,
    *,
    config: Config,
    transposed: bool = False,
    execution: Execution = GPU,
) -> jax.Array:
    """See `kernel.Kernel.matmul`."""
    check_operands(x, w, config, transposed=transposed, tma=False)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    product = Product(x.shape[0], *w.shape, transposed)
    tiling = tiles.Tiling(product, block_m, block_n, block_k, GRID_TILE_WIDTH)
    steps, weight_tile = tiling.steps, tiling.weight_tile
    weight_format = w.format(x.dtype)
    primitives = execution.primitives

    def kernel(x_ref: Any, codes: Any, *refs: Any) -> None:
        *scale_refs, layer_ref, out, w_tile, scale_map = refs
        layer = layer_ref[0]
        m0, n0 = tiling.output_tile_origin(lax.axis_index("tile"))
        weight_tile_origin = functools.partial(tiling.weight_tile_origin, n0=n0)
        scales = primitives.Scales.of(weight_format, weight_tile, layer, scale_refs, scale_map)

        def body(indices: Any, x_tile: Any, codes_tile: Any, carry: Any) -> Any:
            (step,) = indices
            acc, scale = carry
            upcoming = scales.fetch(*weight_tile_origin(lax.min(step + 1, steps - 1)))
            primitives.barrier()  # all warps are done with the last step's tile
            primitives.dequantize_tile(weight_format, codes_tile, scale, w_tile)
            primitives.barrier()
            acc = primitives.mma(acc, x_tile, w_tile, transposed=transposed, m_warps=config.m_warps)
            return acc, scales.finish(upcoming)

        def codes_tile_index(step: Any) -> tuple[Any, Any]:
            row, column = weight_tile_origin(step)
            return row, column // 2

        primitives.barrier()  # the map of scales is in place
        zero = primitives.zero_accumulator((block_m, block_n), x.dtype, config.m_warps)
        first = scales.finish(scales.fetch(*weight_tile_origin(jnp.int32(0))))
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
                    (pl.Element(weight_tile[0]), pl.Element(weight_tile[1] // 2)),
                    codes_tile_index,
                    transforms=tiles.swizzle_of(weight_tile[1] // 2),
                    oob_fill_mode=in_bounds,
                ),
            ],
            max_concurrent_steps=config.stages,
            init_carry=(zero, first),
        )(x_ref, codes.at[layer])
        plgpu.store(out.at[pl.ds(m0, block_m), pl.ds(n0, block_n)], acc.astype(x.dtype), optimized=False)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((product.m, product.n_out), x.dtype),
        grid=(math.prod(tiling.grid),),
        grid_names=("tile",),
        scratch_types=[
            plgpu.SMEM(weight_tile, x.dtype, transforms=tiles.tile_transforms(x.dtype)),
            plgpu.SMEM((256,), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=execution.interpret,
    )(x, *w.arrays)
