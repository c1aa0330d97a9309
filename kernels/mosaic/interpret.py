"""The primitives of `warpgroup` in jax.numpy, for Pallas' interpret mode, which executes no inline PTX."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic import scales, tiles
from qlora_jax.kernels.mosaic.kernel import Execution
from qlora_jax.quantization.blockwise import lookup


class Scales(scales.Scales):
    """`scales.Scales` for interpret mode; scales are float32 [rows, columns / 64, scales per group] of a tile."""

    @staticmethod
    def _of_layer(ref: Any, layer: Any) -> Any:
        return ref[layer]

    @staticmethod
    def _publish(dynamic_map: Any, scratch: Any) -> None:
        scratch[...] = dynamic_map[...]

    def fetch(self, row: Any, column: Any) -> tuple[jax.Array, ...]:
        """See `scales.Scales.fetch`."""
        rows, columns = self.tile
        per_group, size = self.weight_format.scales_per_group, self.weight_format.block_size
        r = jnp.arange(rows)[:, None, None] + row
        c = _first_columns(self.weight_format, columns // tiles.GROUP, column)[None, :, None]
        block = (r * self.weight_format.n_inputs + c) // size + jnp.arange(per_group)
        if not self.weight_format.double_quant:
            return (self.absmax[block],)
        return self.absmax[block], self.nested[block >> 8]

    def finish(self, read: tuple[jax.Array, ...]) -> jax.Array:
        """See `scales.Scales.finish`."""
        if not self.weight_format.double_quant:
            return read[0]
        codes, nested = read
        table = self.dynamic_map[...]
        # An exact product by 1 keeps XLA from contracting product and sum, see `quantization.block_scales`.
        product = jnp.where(codes == 255, nested, table[codes.astype(jnp.int32)] * nested)
        return product + self.offset


def _first_columns(weight_format: tiles.WeightFormat, groups: int, column: Any) -> jax.Array:
    """First column of each group; beyond the last column the last group is repeated."""
    return jnp.minimum(column + jnp.arange(groups) * tiles.GROUP, weight_format.n_inputs - tiles.GROUP)


def _dequantized(weight_format: tiles.WeightFormat, packed: jax.Array, scales: jax.Array) -> jax.Array:
    """Weights [*scales.shape, codes a scale] of packed codes and scales [rows, groups, scales_per_group]."""
    code = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(*scales.shape, -1)
    return (lookup(code, weight_format.quant_type) * scales[..., None]).astype(weight_format.dtype)


def dequantize_tile(weight_format: tiles.WeightFormat, codes: Any, scales: jax.Array, out: Any) -> None:
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
    weight_format: tiles.WeightFormat, acc: jax.Array, words: jax.Array, scales: jax.Array, x: Any, column: Any
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
