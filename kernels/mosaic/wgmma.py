"""The kernel for sm_90a (H100, H200): asynchronous `wgmma` on decoded tiles, specialised warpgroups, TMA.

One warpgroup moves tiles of x and of codes into shared memory, two compute. The two share the decoding by turns, tile
by tile: the even ones fall to the first, the odd ones to the second, some steps before they are multiplied. So each
has two steps' time for a tile, and decodes while the tensor cores work on what was decoded before: a step begins with
issuing its product, and only the product before that one is waited for.

    memory:   codes[t] -> codes_full    x[t] -> x_full
    decoder:  codes_full, w_free -> decode w[t] -> w_full, codes_free
    both:     x_full, w_full -> product of step t -> (one step later) x_free, w_free
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

COMPUTE_WARPGROUPS = 2
# Registers a thread: 128 x (40 + 2 x 232) of the 65,536 of a multiprocessor.
_MEMORY_REGISTERS, _COMPUTE_REGISTERS = 40, 232

# See `tiles.place`.
_BAND = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes.

    Attributes:
        block_m: rows of x of one CTA, 128 or 256; each of the two computing warpgroups multiplies half of them.
        block_n: columns of the output of one CTA.
        block_k: contracted elements of one step. block_n * block_k must be a multiple of 128 runs of 64 codes.
        stages: tiles of x, and of codes, in flight; even, and stages * block_k >= block_n.
        decoded: decoded tiles held; even. A tile is decoded decoded / 2 steps before it is multiplied.
    """

    block_m: int = 256
    block_n: int = 128
    block_k: int = 64
    stages: int = 4
    decoded: int = 4

    def __post_init__(self) -> None:
        """Raise ValueError for sizes the kernel cannot have."""
        if self.block_m % 128 or self.block_n % 64 or self.block_k % 64:
            raise ValueError(f"block_m must be a multiple of 128, block_n and block_k of 64: {self}")
        if self.block_n * self.block_k % (tiles.WARPGROUP * tiles.RUN):
            raise ValueError(f"block_n * block_k must be a multiple of {tiles.WARPGROUP * tiles.RUN}: {self}")
        # A barrier is waited for by one warpgroup, always the same: slots of even tiles and of odd ones are apart.
        if self.stages % COMPUTE_WARPGROUPS or self.decoded % COMPUTE_WARPGROUPS:
            raise ValueError(f"stages and decoded must be even: {self}")
        if self.stages * self.block_k < self.block_n:
            raise ValueError(f"stages * block_k must be block_n or more: the output is staged where x was: {self}")


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
        x: bfloat16 or float16 [M, K], M >= block_m and a multiple of 8 (TMA moves tiles of 8 rows: the caller pads x);
            if transposed [M, N'], as `operands.pad_contraction` makes it.
        w: the weight, N >= block_n (block_k if transposed) and a multiple of 8.
        config: tile sizes; K a multiple of block_k, or of block_n if transposed.
        transposed: multiply by W instead of W^T.
        seam: `machine`, or `reference` in interpret mode.
        interpret: Pallas interpret parameters.

    Raises:
        ValueError: x or the weight does not fit the tiles.
    """
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    stages, decoded = config.stages, config.decoded
    ahead = decoded // 2
    m = x.shape[0]
    n, k = w.shape
    tiling = tiles.Tiling(m, n, k, transposed, block_m, block_n, block_k, _BAND)
    n_out, contracted, steps, tile = tiling.n_out, tiling.contracted, tiling.steps, tiling.tile
    if m % 8 or n % 8 or m < block_m or n_out < block_n or contracted < block_k:
        raise ValueError(f"x {x.shape} and W {w.shape} need multiples of 8 rows and at least {config}")
    if k % (block_n if transposed else block_k):
        raise ValueError(f"K = {k} is no multiple of {'block_n' if transposed else 'block_k'}: {config}")
    if x.shape[1] != steps * block_k:
        raise ValueError(f"x {x.shape} needs {steps * block_k} columns for W {w.shape} and {config}")
    rows = block_m // COMPUTE_WARPGROUPS
    decoding = w.decoding(x.dtype)

    def kernel(x_ref: Any, codes: Any, *refs: Any) -> None:
        *scale_refs, layer_ref, out, x_tiles, code_tiles, w_tiles, scale_scratch, barriers = refs
        x_full, x_free, codes_full, codes_free, w_full, w_free = barriers
        layer = layer_ref[0]
        m0, n0 = tiling.origin(lax.axis_index("tile"))
        warpgroup = lax.axis_index("warpgroup")

        corner = functools.partial(tiling.corner, n0=n0)

        def move() -> None:
            plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")

            def move_codes(step: Any) -> None:
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(codes_free.at[slot]))
                row, column = corner(step)
                source = codes.at[layer, pl.ds(row, tile[0]), pl.ds(column // 2, tile[1] // 2)]
                plgpu.copy_gmem_to_smem(source, code_tiles.at[slot], codes_full.at[slot])

            for step in range(min(ahead, steps)):
                move_codes(jnp.int32(step))

            @pl.loop(0, steps)
            def _(step: Any) -> None:
                pl.when(step + ahead < steps)(lambda: move_codes(step + ahead))
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(x_free.at[slot]))
                source = x_ref.at[pl.ds(m0, block_m), pl.ds(step * block_k, block_k)]
                plgpu.copy_gmem_to_smem(source, x_tiles.at[slot], x_full.at[slot])

        def compute(acc: Any) -> None:
            scales = seam.Scales.of(decoding, tile, layer, scale_refs, scale_scratch.at[warpgroup])
            seam.barrier()  # the table of scales is in place

            def fetch(step: Any) -> Any:
                return scales.fetch(*corner(lax.min(step, steps - 1)))

            def decode(step: Any, scale: Any) -> Any:
                """Decode the tile of a step; return the scales of the next tile of this warpgroup."""
                slot, target = lax.rem(step, stages), lax.rem(step, decoded)
                upcoming = fetch(step + COMPUTE_WARPGROUPS)
                plgpu.barrier_wait(codes_full.at[slot])
                pl.when(step >= decoded)(lambda: plgpu.barrier_wait(w_free.at[target]))
                seam.decode(decoding, code_tiles.at[slot], scale, w_tiles.at[target])
                plgpu.commit_smem()  # wgmma reads past the caches of ordinary stores
                plgpu.barrier_arrive(codes_free.at[slot])
                plgpu.barrier_arrive(w_full.at[target])
                return scales.finish(upcoming)

            def decode_if_mine(step: Any, scale: Any) -> Any:
                mine = jnp.logical_and(lax.rem(step, COMPUTE_WARPGROUPS) == warpgroup, step < steps)
                return lax.cond(mine, decode, lambda step, scale: scale, step, scale)

            def body(step: Any, scale: Any) -> Any:
                slot, source = lax.rem(step, stages), lax.rem(step, decoded)
                plgpu.barrier_wait(x_full.at[slot])
                plgpu.barrier_wait(w_full.at[source])
                w_tile = w_tiles.at[source]
                plgpu.wgmma(acc, x_tiles.at[slot, pl.ds(warpgroup * rows, rows)], w_tile if transposed else w_tile.T)
                plgpu.wgmma_wait(1)

                @pl.when(step > 0)
                def _() -> None:
                    plgpu.barrier_arrive(x_free.at[lax.rem(step - 1, stages)])
                    plgpu.barrier_arrive(w_free.at[lax.rem(step - 1, decoded)])

                return decode_if_mine(step + ahead, scale)

            scale = scales.finish(fetch(warpgroup))
            for step in range(ahead):
                scale = decode_if_mine(jnp.int32(step), scale)
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
                staged = x_tiles.at[slot, pl.ds(warpgroup * rows, rows)]
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
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n_out), x.dtype),
        grid=(math.prod(tiling.grid),),
        grid_names=("tile",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((stages, block_m, block_k), x.dtype, transforms=transforms),
            plgpu.SMEM((stages, tile[0], tile[1] // 2), jnp.uint8, transforms=tiles.swizzle_of(tile[1] // 2)),
            plgpu.SMEM((decoded, *tile), x.dtype, transforms=transforms),
            plgpu.SMEM((COMPUTE_WARPGROUPS, 256), jnp.float32),
            (
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=decoded),
                plgpu.Barrier(num_barriers=decoded, num_arrivals=COMPUTE_WARPGROUPS),
            ),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(x, *w.arrays)
