"""Primitives of the kernels on a GPU, each executed by all 128 threads of a warpgroup.

A kernel is written in plain Pallas around these names; `interpret` has the same names in jax.numpy. Instructions that
Pallas cannot express are written in `ptx`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic.scales import Scales
from qlora_jax.kernels.mosaic.shared_memory_dequantize import dequantize_tile
from qlora_jax.kernels.mosaic.small_m_fragments import load_codes, multiply_codes, store_fragments, zero_fragments

__all__ = [
    "Scales",
    "barrier",
    "dequantize_tile",
    "load_codes",
    "mma",
    "multiply_codes",
    "store_fragments",
    "zero_accumulator",
    "zero_fragments",
]


def barrier() -> None:
    """Wait for all threads of this warpgroup and make their writes to shared memory visible."""

    @plgpu.inline_mgpu()
    def barrier(_: Any) -> None:
        mgpu.utils.warpgroup_barrier()

    barrier()


def zero_accumulator(shape: tuple[int, int], dtype: Any, m_warps: int) -> jax.Array:
    """Zeros [block_m, block_n] in the layout of mma.sync's accumulators."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.MMA_ACC(dtype, m_warps=m_warps))


def mma(acc: jax.Array, x: Any, w: Any, *, transposed: bool, m_warps: int) -> jax.Array:
    """Return acc + x @ w^T, or + x @ w if transposed, of shared-memory tiles, with mma.sync."""
    lhs = plgpu.load(x, layout=plgpu.Layout.MMA_LHS(x.dtype, m_warps=m_warps))
    rhs = plgpu.load(w if transposed else w.T, layout=plgpu.Layout.MMA_RHS(w.dtype, m_warps=m_warps))
    return plgpu.mma(acc, lhs, rhs)
