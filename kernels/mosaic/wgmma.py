"""The kernel for sm_90a (H100, H200): asynchronous `wgmma` on dequantized tiles, specialized warpgroups, TMA.

One warpgroup moves tiles of x and of codes into shared memory, two compute. The two dequantize by turns, tile by tile:
the even ones fall to the first, the odd ones to the second, some steps before they are multiplied. So each has two
steps' time for a tile, and dequantizes while the tensor cores work on an earlier one: a step begins with issuing its
product, and only the product before that one is waited for.

    memory:       codes[t] -> codes_full    x[t] -> x_full
    dequantizer:  codes_full, w_free -> dequantize w[t] -> w_full, codes_free
    both:         x_full, w_full -> product of step t -> (one step later) x_free, w_free
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

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

# Dequantizing and multiplying overlap in the same warps, which only issue products.
COST = Cost(alu_per_weight=3.9, tensor_fraction=0.65, overlap=0.9, mma_sync=False)
# Up to this many rows, `mma`'s small tiles are predicted to take less time than tiles of 128 rows.
FEW_ROWS = 64

COMPUTE_WARPGROUPS = 2
# Registers a thread: 128 x (40 + 2 x 232) of the 65,536 of a multiprocessor.
_MEMORY_REGISTERS, _COMPUTE_REGISTERS = 40, 232

# See `tiles.rasterize`.
GRID_TILE_WIDTH = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes.

    Attributes:
        block_m: rows of x of one CTA, 128 or 256; each of the two computing warpgroups multiplies half of them.
        block_n: columns of the output of one CTA.
        block_k: contracted elements of one step. block_n * block_k must be a multiple of 128 groups of 64 codes.
        stages: tiles of x, and of codes, in flight; even, and stages * block_k >= block_n.
        dequantized: dequantized tiles held; even. A tile is dequantized `dequantized` / 2 steps before it is
            multiplied.
    """

    block_m: int = 256
    block_n: int = 128
    block_k: int = 64
    stages: int = 4
    dequantized: int = 4

    @property
    def dequantizers(self) -> int:
        """Warpgroups that dequantize a tile together."""
        return 1

    def __post_init__(self) -> None:
        """Raise ValueError for sizes the kernel cannot have."""
        if self.block_m % 128 or self.block_n % 64 or self.block_k % 64:
            raise ValueError(f"block_m must be a multiple of 128, block_n and block_k of 64: {self}")
        if self.block_n * self.block_k % (tiles.WARPGROUP * tiles.GROUP):
            raise ValueError(f"block_n * block_k must be a multiple of {tiles.WARPGROUP * tiles.GROUP}: {self}")
        # A barrier is waited for by one warpgroup, always the same: slots of even tiles and of odd ones are apart.
        if self.stages % COMPUTE_WARPGROUPS or self.dequantized % COMPUTE_WARPGROUPS:
            raise ValueError(f"stages and dequantized must be even: {self}")
        if self.stages * self.block_k < self.block_n:
            raise ValueError(f"stages * block_k must be block_n or more: the output is staged where x was: {self}")


class _Scratch(NamedTuple):
    """Buffers and barriers in shared memory; first index: a slot. See the data flow at the top of this file."""

    x_tiles: Any
    codes_tiles: Any
    w_tiles: Any
    scale_map: Any
    x_full: Any
    x_free: Any
    codes_full: Any
    codes_free: Any
    w_full: Any
    w_free: Any


pad_activations = pad_to_tiles


def supports(chip: Chip, product: Product) -> bool:
    """Accept products on sm_90a beyond small M."""
    return chip.arch == "sm_90a" and product.m > FEW_ROWS


def config_for(chip: Chip, product: Product) -> Config:
    """Choose 256 rows of x where there are more than 128: less dequantization for the product."""
    del chip
    if tiles.ragged_output(product):
        return Config(block_m=128, block_n=64, block_k=128, stages=2)
    return Config(block_m=256 if product.m > 128 else 128)


def matmul(
    x: jax.Array,
    w: PackedWeight,
    *,
    config: Config,
    transposed: bool = False,
    execution: Execution = GPU,
) -> jax.Array:
    """See `kernel.Kernel.matmul`; rows of x a multiple of 8."""
    check_operands(x, w, config, transposed=transposed, tma=True)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    stages, dequantized = config.stages, config.dequantized
    ahead = dequantized // 2
    product = Product(x.shape[0], *w.shape, transposed)
    tiling = tiles.Tiling(product, block_m, block_n, block_k, GRID_TILE_WIDTH)
    n_out, steps, weight_tile = product.n_out, tiling.steps, tiling.weight_tile
    primitives = execution.primitives
    rows = block_m // COMPUTE_WARPGROUPS
    weight_format = w.format(x.dtype)

    def kernel(x_ref: Any, codes: Any, *refs: Any) -> None:
        scratch: _Scratch
        *scale_refs, layer_ref, out, scratch = refs
        layer = layer_ref[0]
        m0, n0 = tiling.output_tile_origin(lax.axis_index("tile"))
        warpgroup = lax.axis_index("warpgroup")

        weight_tile_origin = functools.partial(tiling.weight_tile_origin, n0=n0)

        def move() -> None:
            plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")

            def move_codes(step: Any) -> None:
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(scratch.codes_free.at[slot]))
                row, column = weight_tile_origin(step)
                source = codes.at[layer, pl.ds(row, weight_tile[0]), pl.ds(column // 2, weight_tile[1] // 2)]
                plgpu.copy_gmem_to_smem(source, scratch.codes_tiles.at[slot], scratch.codes_full.at[slot])

            for step in range(min(ahead, steps)):
                move_codes(jnp.int32(step))

            @pl.loop(0, steps)
            def _(step: Any) -> None:
                pl.when(step + ahead < steps)(lambda: move_codes(step + ahead))
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(scratch.x_free.at[slot]))
                source = x_ref.at[pl.ds(m0, block_m), pl.ds(step * block_k, block_k)]
                plgpu.copy_gmem_to_smem(source, scratch.x_tiles.at[slot], scratch.x_full.at[slot])

        def compute(acc: Any) -> None:
            scales = primitives.Scales.of(
                weight_format, weight_tile, layer, scale_refs, scratch.scale_map.at[warpgroup]
            )
            primitives.barrier()  # the map of scales is in place

            def fetch(step: Any) -> Any:
                return scales.fetch(*weight_tile_origin(lax.min(step, steps - 1)))

            def dequantize(step: Any, scale: Any) -> Any:
                """Dequantize the tile of a step; return the scales of the next tile of this warpgroup."""
                slot, target = lax.rem(step, stages), lax.rem(step, dequantized)
                upcoming = fetch(step + COMPUTE_WARPGROUPS)
                plgpu.barrier_wait(scratch.codes_full.at[slot])
                pl.when(step >= dequantized)(lambda: plgpu.barrier_wait(scratch.w_free.at[target]))
                primitives.dequantize_tile(
                    weight_format, scratch.codes_tiles.at[slot], scale, scratch.w_tiles.at[target]
                )
                plgpu.commit_smem()  # wgmma reads past the caches of ordinary stores
                plgpu.barrier_arrive(scratch.codes_free.at[slot])
                plgpu.barrier_arrive(scratch.w_full.at[target])
                return scales.finish(upcoming)

            def dequantize_if_mine(step: Any, scale: Any) -> Any:
                mine = jnp.logical_and(lax.rem(step, COMPUTE_WARPGROUPS) == warpgroup, step < steps)
                return lax.cond(mine, dequantize, lambda step, scale: scale, step, scale)

            def body(step: Any, scale: Any) -> Any:
                slot, source = lax.rem(step, stages), lax.rem(step, dequantized)
                plgpu.barrier_wait(scratch.x_full.at[slot])
                plgpu.barrier_wait(scratch.w_full.at[source])
                w_tile = scratch.w_tiles.at[source]
                plgpu.wgmma(
                    acc, scratch.x_tiles.at[slot, pl.ds(warpgroup * rows, rows)], w_tile if transposed else w_tile.T
                )
                plgpu.wgmma_wait(1)

                @pl.when(step > 0)
                def _() -> None:
                    plgpu.barrier_arrive(scratch.x_free.at[lax.rem(step - 1, stages)])
                    plgpu.barrier_arrive(scratch.w_free.at[lax.rem(step - 1, dequantized)])

                return dequantize_if_mine(step + ahead, scale)

            scale = scales.finish(fetch(warpgroup))
            for step in range(ahead):
                scale = dequantize_if_mine(jnp.int32(step), scale)
            lax.fori_loop(0, steps, body, scale)

        def multiply_and_store(acc: Any) -> None:
            compute(acc)
            result = acc[...].astype(x.dtype)  # waits for the products
            row = m0 + warpgroup * rows
            if n_out % 64 or block_n % block_k:  # not whole tiles of TMA
                plgpu.store(out.at[pl.ds(row, rows), pl.ds(n0, block_n)], result, optimized=False)
                return
            # Staged where this warpgroup's rows of x were: it has waited for all tiles, and read them all.
            for slot in range(block_n // block_k):
                staged = scratch.x_tiles.at[slot, pl.ds(warpgroup * rows, rows)]
                plgpu.store(staged, result[:, slot * block_k : (slot + 1) * block_k])
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(row, rows), pl.ds(n0 + slot * block_k, block_k)])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.when(warpgroup == COMPUTE_WARPGROUPS)(move)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            pl.run_scoped(multiply_and_store, plgpu.ACC((rows, block_n)))

    transforms = tiles.tile_transforms(x.dtype)
    codes_tiles = (stages, weight_tile[0], weight_tile[1] // 2)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((product.m, n_out), x.dtype),
        grid=(math.prod(tiling.grid),),
        grid_names=("tile",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            _Scratch(
                x_tiles=plgpu.SMEM((stages, block_m, block_k), x.dtype, transforms=transforms),
                codes_tiles=plgpu.SMEM(codes_tiles, jnp.uint8, transforms=tiles.swizzle_of(codes_tiles[2])),
                w_tiles=plgpu.SMEM((dequantized, *weight_tile), x.dtype, transforms=transforms),
                scale_map=plgpu.SMEM((COMPUTE_WARPGROUPS, 256), jnp.float32),
                x_full=plgpu.Barrier(num_barriers=stages),
                x_free=plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS),
                codes_full=plgpu.Barrier(num_barriers=stages),
                codes_free=plgpu.Barrier(num_barriers=stages),
                w_full=plgpu.Barrier(num_barriers=dequantized),
                w_free=plgpu.Barrier(num_barriers=dequantized, num_arrivals=COMPUTE_WARPGROUPS),
            )
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=execution.interpret,
    )(x, *w.arrays)
