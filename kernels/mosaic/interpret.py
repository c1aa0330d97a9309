"""The primitives of `warpgroup` in jax.numpy, for Pallas' interpret mode, which executes no inline PTX."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic import scales, tiles
from qlora_jax.kernels.mosaic.kernel import Execution
from qlora_jax.quantization.blockwise import lookup, power_of_two


class Scales(scales.Scales):
    """`scales.Scales` for interpret mode; scales and minima of a tile are float32 [rows, groups, scales per group]."""

    @staticmethod
    def _of_layer(ref: Any, layer: Any) -> Any:
        return ref[layer]

    @staticmethod
    def _publish(scale_map: Any, scratch: Any) -> None:
        scratch[...] = scale_map[...]

    def fetch(self, row: Any, column: Any) -> tuple[jax.Array, ...]:
        """See `scales.Scales.fetch`."""
        rows, columns = self.tile
        per_group, size = self.weight_format.scales_per_group, self.weight_format.block_size
        r = jnp.arange(rows)[:, None, None] + row
        c = _first_columns(self.weight_format, columns // tiles.GROUP, column)[None, :, None]
        block = (r * self.weight_format.n_inputs + c) // size + jnp.arange(per_group)
        read = tuple(ref[block] for ref in self.stored)
        return (*read, self.nested[block >> 8]) if self.weight_format.double_quant else read

    def finish(self, read: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """See `scales.Scales.finish`."""
        absmax, *rest = read
        if self.weight_format.double_quant:
            (nested,) = rest
            table = self.scale_map[...]
            # An exact product by 1 keeps XLA from contracting product and sum, see `quantization.block_scales`.
            product = jnp.where(absmax == 255, nested, table[absmax.astype(jnp.int32)] * nested)
            return (product + self.offset,)
        kind = self.weight_format.format
        if kind.scale == "e4m3":
            return (self.scale_map[...][absmax.astype(jnp.int32)],)
        if kind.scale == "e8m0":
            return (power_of_two(absmax),)
        scales = absmax.astype(jnp.float32)
        if kind.minimum == "none":
            return (scales,)
        minimum = rest[0].astype(jnp.float32)
        return scales, -minimum * scales if kind.minimum == "zero_point" else minimum


def _first_columns(weight_format: tiles.WeightFormat, groups: int, column: Any) -> jax.Array:
    """First column of each group; beyond the last column the last group is repeated."""
    return jnp.minimum(column + jnp.arange(groups) * tiles.GROUP, weight_format.n_inputs - tiles.GROUP)


def _dequantized(weight_format: tiles.WeightFormat, packed: jax.Array, scales: tuple[jax.Array, ...]) -> jax.Array:
    """Weights [rows, groups, scales_per_group, codes a scale] of packed codes and of `Scales.finish`' result."""
    scale, *minimum = (each[..., None] for each in scales)
    code = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(*scale.shape[:-1], -1)
    values = lookup(code, weight_format.quant_type) * scale
    for each in minimum:
        values = values + each
    return values.astype(weight_format.dtype)


def dequantize_tile(weight_format: tiles.WeightFormat, codes: Any, scales: tuple[jax.Array, ...], out: Any) -> None:
    """`warpgroup.dequantize_tile` for interpret mode."""
    out[...] = _dequantized(weight_format, codes[...], scales).reshape(out.shape)


def mma(acc: jax.Array, x: Any, w: Any, *, transposed: bool, m_warps: int) -> jax.Array:
    """`warpgroup.mma` for interpret mode."""
    del m_warps
    contracted = (((1,), (0 if transposed else 1,)), ((), ()))
    product = jax.lax.dot_general(x[...], w[...], contracted, preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # stands for the barrier that the pipeline itself has before it fills a slot again
    return acc + product


def barrier() -> None:
    """See `warpgroup.barrier`: interpreted threads of a warpgroup are one, but copies run beside them."""
    plgpu.commit_smem()


def zero_accumulator(shape: tuple[int, int], dtype: Any, m_warps: int) -> jax.Array:
    """Zeros [block_m, block_n]."""
    del dtype, m_warps
    return jnp.zeros(shape, jnp.float32)


def load_codes(weight_format: tiles.WeightFormat, codes: Any, row: Any, column: Any) -> jax.Array:
    """Codes of `warpgroup.load_codes` as they lie in the rows, uint8 [16, 16, 32]."""
    columns = _first_columns(weight_format, 16, column)[:, None] // 2 + jnp.arange(tiles.GROUP // 2)
    return codes[...][row + jnp.arange(16)[:, None, None], columns]


def zero_fragments(m_tiles: int) -> jax.Array:
    """Zeros [8 * m_tiles, 16]."""
    return jnp.zeros((8 * m_tiles, 16), jnp.float32)


def multiply_codes(
    weight_format: tiles.WeightFormat,
    acc: jax.Array,
    words: jax.Array,
    scales: tuple[jax.Array, ...],
    x: Any,
    column: Any,
) -> jax.Array:
    """See `warpgroup.multiply_codes`."""
    w = _dequantized(weight_format, words, scales).reshape(16, -1)
    columns = column + jnp.arange(w.shape[1])
    rows = x[...][:, jnp.minimum(columns, weight_format.n_inputs - 1)]
    rows = jnp.where(columns < weight_format.n_inputs, rows, 0)
    rows = jnp.pad(rows, ((0, acc.shape[0] - rows.shape[0]), (0, 0)))
    return acc + jnp.einsum("mk,nk->mn", rows, w, preferred_element_type=jnp.float32)


def store_fragments(acc: jax.Array, partial: Any, out: Any, column: Any) -> None:
    """See `warpgroup.store_fragments`."""
    del partial
    out[:, pl.ds(column, 16)] = acc[: out.shape[0]].astype(out.dtype)


def execution(*, detect_races: bool = False) -> Execution:
    """Run kernels in Pallas' interpret mode, on any platform.

    Args:
        detect_races: fail where two threads access the same memory without a barrier between them.
    """
    return Execution(sys.modules[__name__], plgpu.InterpretGPUParams(detect_races=detect_races))
