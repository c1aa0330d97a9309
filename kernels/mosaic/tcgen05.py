"""The kernel for data-center Blackwell (sm_100a): tcgen05 tensor cores with the accumulator in tensor memory.

Roles within a CTA, in a ring of steps along the contraction:

    warp 0 of the last warpgroup     copies tiles of x and of codes to shared memory (TMA)
    the other `decoders` warpgroups  decode codes into one of two 16-bit tiles, each warpgroup its share of the rows
    warp 1 of the last warpgroup     starts the products of a decoded tile; they run while the next tile is decoded

The same decoded tile is multiplied with block_m / 128 tiles of x, so decoding costs each product that much less.
"""

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

# Rows of one tcgen05.mma, and lanes of tensor memory.
MMA_ROWS = 128
# Decoded tiles: one is multiplied while the other is written.
DECODED = 2
# Columns of the output that leave through shared memory at a time.
OUT_COLUMNS = 64

# See `tiles.place`.
_BAND = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes. The defaults take 218 of an SM's 228 KiB of shared memory and all of its tensor memory.

    Products with too few such tiles to fill the GPU want smaller ones: with Config(128, 128, decoders=1) two CTAs fit
    an SM. If K is an odd multiple of 64, the transposed product needs block_n=64: Config(block_n=64, block_k=128,
    stages=2, decoders=1).

    Attributes:
        block_m: rows of x of one CTA, a multiple of 128.
        block_n: columns of the output of one CTA: 64, 128 or 256. block_m / 128 * block_n float32
            columns of tensor memory are used, of 512.
        block_k: contracted elements of one step: 64, 128 or 256.
        stages: tiles of x and of codes in flight, at least 2.
        decoders: warpgroups that decode. block_n * block_k must be a multiple of 128 runs of 64 codes for each.

    Raises:
        ValueError: if the sizes do not go together.
    """

    block_m: int = 256
    block_n: int = 256
    block_k: int = 64
    stages: int = 3
    decoders: int = 2

    def __post_init__(self) -> None:
        """Check the sizes."""
        runs = self.block_n * self.block_k // tiles.RUN
        if (
            self.block_m % MMA_ROWS
            or self.block_n not in (64, 128, 256)
            or self.block_k not in (64, 128, 256)
            or self.block_m // MMA_ROWS * self.block_n > 512
            or self.stages < DECODED
            or runs % (tiles.WARPGROUP * self.decoders)
            or self.block_m // MMA_ROWS * self.block_n // OUT_COLUMNS % self.decoders
        ):
            raise ValueError(f"not a possible tiling: {self}")


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
    same bits: nothing is masked and nothing of W is padded. Copies move whole groups of 8 rows, so M and N must be
    multiples of 8: the caller pads x to that with rows whose products it drops.

    Args:
        x: bfloat16 or float16 [M, K], M >= block_m and a multiple of 8; if transposed [M, N'], as
            `operands.pad_contraction` makes it.
        w: the weight, N a multiple of 8 and N >= block_n (block_k if transposed).
        config: tile sizes; K a multiple of block_k, or of block_n if transposed.
        transposed: multiply by W instead of W^T.
        seam: `machine`, or `reference` in interpret mode.
        interpret: Pallas interpret parameters.

    Raises:
        ValueError: if M or N is not a multiple of 8 or less than a tile, or K not a multiple of a tile.
    """
    block_m, block_n, block_k, decoders = config.block_m, config.block_n, config.block_k, config.decoders
    m = x.shape[0]
    n, k = w.shape
    if m % 8 or n % 8:
        raise ValueError(f"rows of x ({m}) and of the weight ({n}) must be multiples of 8")
    if m < block_m or n < (block_k if transposed else block_n):
        raise ValueError(f"{m} rows of x and {n} of the weight are less than a tile of {config}")
    if k % (block_n if transposed else block_k):
        raise ValueError(f"{k} columns of the weight are not whole tiles of {config}")
    tiling = tiles.Tiling(m, n, k, transposed, block_m, block_n, block_k, _BAND)
    n_out, steps, tile = tiling.n_out, tiling.steps, tiling.tile
    stages = min(config.stages, steps)
    # The part of a tile of W that one warpgroup decodes.
    share = (tile[0] // decoders, tile[1])
    decoding = w.decoding(x.dtype)
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
        dynamic_map: Any,
        acc: Any,
        loaded: Any,
        decoded: Any,
        consumed: Any,
        done: Any,
    ) -> None:
        *scale_refs, layer_ref, out = refs
        layer = layer_ref[0]
        m0, n0 = tiling.origin(lax.axis_index("tile"))
        warpgroup = lax.axis_index("warpgroup")

        corner = functools.partial(tiling.corner, n0=n0)

        def following(slot: Any) -> Any:
            """The slot of the next step: remainders by 3 can be a fifth of the decoders' instructions."""
            return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)

        def copy_in() -> None:
            def body(step: Any, slot: Any) -> Any:
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                row, column = corner(step)
                x_slice = x_ref.at[pl.ds(m0, block_m), pl.ds(step * block_k, block_k)]
                codes_slice = codes.at[layer, pl.ds(row, tile[0]), pl.ds(column // 2, tile[1] // 2)]
                plgpu.copy_gmem_to_smem(codes_slice, codes_tiles.at[slot], loaded.at[slot])
                plgpu.copy_gmem_to_smem(x_slice, x_tiles.at[slot], loaded.at[slot])
                return following(slot)

            lax.fori_loop(0, steps, body, jnp.int32(0))

        def multiply() -> None:
            def body(step: Any, slot: Any) -> Any:
                decoded_slot = lax.rem(step, DECODED)
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.barrier_wait(decoded.at[decoded_slot])
                w_tile = w_tiles.at[decoded_slot]
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

        def decode() -> None:
            scales = seam.Scales.of(decoding, share, layer, scale_refs, dynamic_map.at[warpgroup])
            seam.barrier()  # the table of scales is in place
            first_row = warpgroup * share[0]
            rows = pl.ds(first_row, share[0])

            def fetch(step: Any) -> tuple[jax.Array, ...]:
                row, column = corner(step)
                return scales.fetch(row + first_row, column)

            def body(step: Any, carry: Any) -> Any:
                slot, reused, scale = carry
                decoded_slot = lax.rem(step, DECODED)
                upcoming = fetch(lax.min(step + 1, steps - 1))
                plgpu.barrier_wait(loaded.at[slot])
                # What the products of the step before last read is overwritten.
                pl.when(step >= DECODED)(lambda: plgpu.barrier_wait(consumed.at[reused]))
                seam.decode(decoding, codes_tiles.at[slot, rows], scale, w_tiles.at[decoded_slot, rows])
                plgpu.commit_smem()
                plgpu.barrier_arrive(decoded.at[decoded_slot])
                return following(slot), following(reused), scales.finish(upcoming)

            first = scales.finish(fetch(jnp.int32(0)))
            lax.fori_loop(0, steps, body, (jnp.int32(0), jnp.int32(-DECODED % stages), first))

        def copy_out() -> None:
            plgpu.barrier_wait(done)
            tile = out_tiles.at[warpgroup]

            def body(i: Any, _: None) -> None:
                chunk = i * decoders + warpgroup
                row = m0 + lax.div(chunk, out_chunks) * MMA_ROWS
                column = n0 + lax.rem(chunk, out_chunks) * OUT_COLUMNS
                values = plgpu.async_load_tmem(acc.at[:, pl.ds(chunk * OUT_COLUMNS, OUT_COLUMNS)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.store(tile, values.astype(x.dtype), optimized=bool(out_transforms))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, out.at[pl.ds(row, MMA_ROWS), pl.ds(column, OUT_COLUMNS)])

            lax.fori_loop(0, m_tiles * out_chunks // decoders, body, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == decoders)
        def _() -> None:
            @plgpu.warp_map
            def _(warp: Any) -> None:
                pl.when(warp == 0)(copy_in)
                pl.when(warp == 1)(multiply)

        @pl.when(warpgroup < decoders)
        def _() -> None:
            decode()
            copy_out()

    transforms = tiles.tile_transforms(x.dtype)
    # Copies of the output need subtiles that divide its rows; 16 bytes are too few to swizzle.
    columns = math.gcd(n_out, OUT_COLUMNS)
    out_transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)) if columns > 8 else ()
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n_out), x.dtype),
        grid=(math.prod(tiling.grid),),
        grid_names=("tile",),
        num_threads=decoders + 1,
        thread_name="warpgroup",
        scratch_types={
            "x_tiles": plgpu.SMEM((stages, block_m, block_k), x.dtype, transforms=transforms),
            "codes_tiles": plgpu.SMEM(
                (stages, tile[0], tile[1] // 2), jnp.uint8, transforms=tiles.swizzle_of(tile[1] // 2)
            ),
            "w_tiles": plgpu.SMEM((DECODED, *tile), x.dtype, transforms=transforms),
            "out_tiles": plgpu.SMEM((decoders, MMA_ROWS, OUT_COLUMNS), x.dtype, transforms=out_transforms),
            "dynamic_map": plgpu.SMEM((decoders, 256), jnp.float32),
            "acc": plgpu.TMEM((MMA_ROWS, m_tiles * block_n), jnp.float32),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "decoded": plgpu.Barrier(num_arrivals=decoders, num_barriers=DECODED),
            "consumed": plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
            "done": plgpu.Barrier(orders_tensor_core=True),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(x, *w.arrays)
