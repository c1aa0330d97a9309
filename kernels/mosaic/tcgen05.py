"""The kernel for data-center Blackwell (sm_100a): tcgen05 tensor cores with the accumulator in tensor memory.

Roles within a CTA, in a ring of steps along the contraction:

    warp 0 of the last warpgroup   copies tiles of x and of codes to shared memory (TMA)
    the `dequantizers` warpgroups  dequantize codes into one of two 16-bit tiles, each its share of the rows
    warp 1 of the last warpgroup   issues the products of a dequantized tile; they run while the next is dequantized

The same dequantized tile is multiplied with block_m / 128 tiles of x, which share the cost of dequantizing it.
"""

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

# Other warps than those that dequantize issue the products.
COST = Cost(alu_per_weight=3.5, tensor_fraction=0.65, overlap=0.9, mma_sync=False)

# Rows of one tcgen05.mma, and lanes of tensor memory.
MMA_ROWS = 128
# Dequantized tiles: one is multiplied while the other is written.
DEQUANTIZED = 2
# Columns of the output that leave through shared memory at a time.
OUT_COLUMNS = 64

# See `tiles.rasterize`.
GRID_TILE_WIDTH = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes. The defaults take 218 of an SM's 228 KiB of shared memory and all of its tensor memory.

    Products with too few such tiles to fill the GPU want smaller ones: with Config(128, 128, dequantizers=1) two CTAs
    fit an SM. If K is an odd multiple of 64, the transposed product needs block_n=64: Config(block_n=64, block_k=128,
    stages=2, dequantizers=1).

    Attributes:
        block_m: rows of x of one CTA, a multiple of 128.
        block_n: columns of the output of one CTA: 64, 128 or 256. block_m / 128 * block_n float32
            columns of tensor memory are used, of 512.
        block_k: contracted elements of one step: 64, 128 or 256.
        stages: tiles of x and of codes in flight, at least 2.
        dequantizers: warpgroups that dequantize a tile together. block_n * block_k must be a multiple of 128 groups of
            64 codes for each.

    Raises:
        ValueError: the sizes do not go together.
    """

    block_m: int = 256
    block_n: int = 256
    block_k: int = 64
    stages: int = 3
    dequantizers: int = 2

    def __post_init__(self) -> None:
        """Check the sizes."""
        groups = self.block_n * self.block_k // tiles.GROUP
        if (
            self.block_m % MMA_ROWS
            or self.block_n not in (64, 128, 256)
            or self.block_k not in (64, 128, 256)
            or self.block_m // MMA_ROWS * self.block_n > 512
            or self.stages < DEQUANTIZED
            or groups % (tiles.WARPGROUP * self.dequantizers)
            or self.block_m // MMA_ROWS * self.block_n // OUT_COLUMNS % self.dequantizers
        ):
            raise ValueError(f"not a possible tiling: {self}")


pad_activations = pad_to_tiles


def supports(chip: Chip, product: Product) -> bool:
    """Accept every product on sm_100a: `mma`'s small tiles are never predicted to take less time there."""
    del product
    return chip.arch == "sm_100a"


def config_for(chip: Chip, product: Product) -> Config:
    """Choose large tiles where they fill the GPU about as well as small ones."""
    if tiles.ragged_output(product):
        return Config(block_m=128, block_n=64, block_k=128, stages=2, dequantizers=1)
    small, large = Config(block_m=128, block_n=128, dequantizers=1), Config()
    if product.m <= small.block_m or product.n_out < large.block_n:
        return small

    def waves(config: Config) -> int:
        return -(-(-(-product.m // config.block_m) * -(-product.n_out // config.block_n)) // chip.n_sms)

    # A large tile is four small ones, but twice their dequantization, which is what takes the time.
    return large if 2 * waves(large) <= waves(small) else small


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
    block_m, block_n, block_k, dequantizers = config.block_m, config.block_n, config.block_k, config.dequantizers
    product = Product(x.shape[0], *w.shape, transposed)
    tiling = tiles.Tiling(product, block_m, block_n, block_k, GRID_TILE_WIDTH)
    n_out, steps, weight_tile = product.n_out, tiling.steps, tiling.weight_tile
    primitives = execution.primitives
    stages = min(config.stages, steps)
    # The part of a tile of W that one warpgroup dequantizes.
    share = (weight_tile[0] // dequantizers, weight_tile[1])
    weight_format = w.format(x.dtype)
    m_tiles = block_m // MMA_ROWS
    out_chunks = block_n // OUT_COLUMNS

    def kernel(
        x_ref: Any,
        codes: Any,
        *refs: Any,
        x_tiles: Any,
        codes_tiles: Any,
        w_tiles: Any,
        out_tiles: Any,
        scale_map: Any,
        acc: Any,
        loaded: Any,
        dequantized: Any,
        consumed: Any,
        done: Any,
    ) -> None:
        *scale_refs, layer_ref, out = refs
        layer = layer_ref[0]
        m0, n0 = tiling.output_tile_origin(lax.axis_index("tile"))
        warpgroup = lax.axis_index("warpgroup")

        weight_tile_origin = functools.partial(tiling.weight_tile_origin, n0=n0)

        def following(slot: Any) -> Any:
            """The slot of the next step: remainders by 3 can be a fifth of the instructions that dequantize."""
            return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)

        def copy_in() -> None:
            def body(step: Any, slot: Any) -> Any:
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                row, column = weight_tile_origin(step)
                x_slice = x_ref.at[pl.ds(m0, block_m), pl.ds(step * block_k, block_k)]
                codes_slice = codes.at[layer, pl.ds(row, weight_tile[0]), pl.ds(column // 2, weight_tile[1] // 2)]
                plgpu.copy_gmem_to_smem(codes_slice, codes_tiles.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(x_slice, x_tiles.at[slot], loaded.at[slot])
                return following(slot)

            lax.fori_loop(0, steps, body, jnp.int32(0))

        def multiply() -> None:
            def body(step: Any, slot: Any) -> Any:
                target = lax.rem(step, DEQUANTIZED)
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.barrier_wait(dequantized.at[target])
                w_tile = w_tiles.at[target]
                for i in range(m_tiles):
                    plgpu.tcgen05_mma(
                        acc.at[:, pl.ds(i * block_n, block_n)],
                        x_tiles.at[slot, pl.ds(i * MMA_ROWS, MMA_ROWS)],
                        w_tile if transposed else w_tile.T,
                        accumulate=step > 0,
                    )
                plgpu.tcgen05_commit_arrive(consumed.at[slot])
                return following(slot)

            lax.fori_loop(0, steps, body, jnp.int32(0))
            plgpu.tcgen05_commit_arrive(done)

        def dequantize() -> None:
            scales = primitives.Scales.of(weight_format, share, layer, scale_refs, scale_map.at[warpgroup])
            primitives.barrier()  # the map of scales is in place
            first_row = warpgroup * share[0]
            rows = pl.ds(first_row, share[0])

            def fetch(step: Any) -> tuple[jax.Array, ...]:
                row, column = weight_tile_origin(step)
                return scales.fetch(row + first_row, column)

            def body(step: Any, carry: Any) -> Any:
                slot, reused, scale = carry
                target = lax.rem(step, DEQUANTIZED)
                upcoming = fetch(lax.min(step + 1, steps - 1))
                plgpu.barrier_wait(loaded.at[slot])
                # The tile that is overwritten was read by the products of the step before last.
                pl.when(step >= DEQUANTIZED)(lambda: plgpu.barrier_wait(consumed.at[reused]))
                primitives.dequantize_tile(weight_format, codes_tiles.at[slot, rows], scale, w_tiles.at[target, rows])
                plgpu.commit_smem()
                plgpu.barrier_arrive(dequantized.at[target])
                return following(slot), following(reused), scales.finish(upcoming)

            first = scales.finish(fetch(jnp.int32(0)))
            lax.fori_loop(0, steps, body, (jnp.int32(0), jnp.int32(-DEQUANTIZED % stages), first))

        def copy_out() -> None:
            plgpu.barrier_wait(done)
            tile = out_tiles.at[warpgroup]

            def body(i: Any, _: None) -> None:
                chunk = i * dequantizers + warpgroup
                row = m0 + lax.div(chunk, out_chunks) * MMA_ROWS
                column = n0 + lax.rem(chunk, out_chunks) * OUT_COLUMNS
                values = plgpu.async_load_tmem(acc.at[:, pl.ds(chunk * OUT_COLUMNS, OUT_COLUMNS)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.store(tile, values.astype(x.dtype), optimized=bool(out_transforms))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, out.at[pl.ds(row, MMA_ROWS), pl.ds(column, OUT_COLUMNS)])

            lax.fori_loop(0, m_tiles * out_chunks // dequantizers, body, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == dequantizers)
        def _() -> None:
            @plgpu.warp_map
            def _(warp: Any) -> None:
                pl.when(warp == 0)(copy_in)
                pl.when(warp == 1)(multiply)

        @pl.when(warpgroup < dequantizers)
        def _() -> None:
            dequantize()
            copy_out()

    transforms = tiles.tile_transforms(x.dtype)
    # Copies of the output need subtiles that divide its rows; 16 bytes are too few to swizzle.
    columns = math.gcd(n_out, OUT_COLUMNS)
    out_transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)) if columns > 8 else ()
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((product.m, n_out), x.dtype),
        grid=(math.prod(tiling.grid),),
        grid_names=("tile",),
        num_threads=dequantizers + 1,
        thread_name="warpgroup",
        scratch_types={
            "x_tiles": plgpu.SMEM((stages, block_m, block_k), x.dtype, transforms=transforms),
            "codes_tiles": plgpu.SMEM(
                (stages, weight_tile[0], weight_tile[1] // 2),
                jnp.uint8,
                transforms=tiles.swizzle_of(weight_tile[1] // 2),
            ),
            "w_tiles": plgpu.SMEM((DEQUANTIZED, *weight_tile), x.dtype, transforms=transforms),
            "out_tiles": plgpu.SMEM((dequantizers, MMA_ROWS, OUT_COLUMNS), x.dtype, transforms=out_transforms),
            "scale_map": plgpu.SMEM((dequantizers, 256), jnp.float32),
            "acc": plgpu.TMEM((MMA_ROWS, m_tiles * block_n), jnp.float32),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "dequantized": plgpu.Barrier(num_arrivals=dequantizers, num_barriers=DEQUANTIZED),
            "consumed": plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
            "done": plgpu.Barrier(orders_tensor_core=True),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=execution.interpret,
    )(x, *w.arrays)
