"""The steps of `machine` in jax.numpy, for Pallas' interpret mode: it executes neither inline code nor `mma.sync`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic import machine, tiles
from qlora_jax.quantization.blockwise import lookup


class Scales(machine.Scales):
    """`machine.Scales` for interpret mode; scales are float32 [rows, columns / 64, scales per run] of a tile."""

    @staticmethod
    def _of_layer(ref: Any, layer: Any) -> Any:
        return ref[layer]

    @staticmethod
    def _publish(dynamic_map: Any, scratch: Any) -> None:
        scratch[...] = dynamic_map[...]

    def fetch(self, row: Any, column: Any) -> tuple[jax.Array, ...]:
        """See `machine.Scales.fetch`."""
        rows, columns = self.tile
        per_run, size = self.decoding.scales_per_run, self.decoding.block_size
        r = jnp.arange(rows)[:, None, None] + row
        c = _first_columns(self.decoding, columns // tiles.RUN, column)[None, :, None]
        block = (r * self.decoding.n_inputs + c) // size + jnp.arange(per_run)
        if not self.decoding.double_quant:
            return (self.absmax[block],)
        return self.absmax[block], self.nested[block >> 8]

    def finish(self, read: tuple[jax.Array, ...]) -> jax.Array:
        """See `machine.Scales.finish`."""
        if not self.decoding.double_quant:
            return read[0]
        codes, nested = read
        table = self.dynamic_map[...]
        # An exact product by 1 keeps XLA from contracting product and sum, see `quantization.block_scales`.
        product = jnp.where(codes == 255, nested, table[codes.astype(jnp.int32)] * nested)
        return product + self.offset


def _first_columns(decoding: tiles.Decoding, runs: int, column: Any) -> jax.Array:
    """First column of each run; beyond the edge, that of the last run again."""
    return jnp.minimum(column + jnp.arange(runs) * tiles.RUN, decoding.n_inputs - tiles.RUN)


def _decoded(decoding: tiles.Decoding, packed: jax.Array, scales: jax.Array) -> jax.Array:
    """Weights [*scales.shape, codes a scale] of packed codes and scales [rows, runs, scales_per_run]."""
    code = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(*scales.shape, -1)
    return (lookup(code, decoding.quant_type) * scales[..., None]).astype(decoding.dtype)


def decode(decoding: tiles.Decoding, codes: Any, scales: jax.Array, out: Any) -> None:
    """`machine.decode` for interpret mode."""
    out[...] = _decoded(decoding, codes[...], scales).reshape(out.shape)


def mma(acc: jax.Array, x: Any, w: Any, *, transposed: bool, m_warps: int) -> jax.Array:
    """`machine.mma` for interpret mode."""
    del m_warps
    contracted = (((1,), (0 if transposed else 1,)), ((), ()))
    product = jax.lax.dot_general(x[...], w[...], contracted, preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # stands for the barrier that the pipeline itself has before it fills a slot again
    return acc + product


def barrier() -> None:
    """See `machine.barrier`: interpreted threads of a warpgroup are one, but copies run beside them."""
    plgpu.commit_smem()


def zero_accumulator(shape: tuple[int, int], dtype: Any, m_warps: int) -> jax.Array:
    """Zeros [block_m, block_n]."""
    del dtype, m_warps
    return jnp.zeros(shape, jnp.float32)


def stream_codes(decoding: tiles.Decoding, codes: Any, row: Any, column: Any) -> jax.Array:
    """Codes of `machine.stream_codes` as they lie in the rows, uint8 [16, 16, 32]."""
    columns = _first_columns(decoding, 16, column)[:, None] // 2 + jnp.arange(tiles.RUN // 2)
    return codes[...][row + jnp.arange(16)[:, None, None], columns]


def zero_fragments(m_tiles: int) -> jax.Array:
    """Zeros [8 * m_tiles, 16]."""
    return jnp.zeros((8 * m_tiles, 16), jnp.float32)


def stream_multiply(
    decoding: tiles.Decoding, acc: jax.Array, words: jax.Array, scales: jax.Array, x: Any, column: Any
) -> jax.Array:
    """See `machine.stream_multiply`."""
    w = _decoded(decoding, words, scales).reshape(16, -1)
    columns = column + jnp.arange(w.shape[1])
    rows = x[...][:, jnp.minimum(columns, decoding.n_inputs - 1)]
    rows = jnp.where(columns < decoding.n_inputs, rows, 0)
    rows = jnp.pad(rows, ((0, acc.shape[0] - rows.shape[0]), (0, 0)))
    return acc + jnp.einsum("mk,nk->mn", rows, w, preferred_element_type=jnp.float32)


def store_fragments(acc: jax.Array, partial: Any, out: Any, column: Any) -> None:
    """See `machine.store_fragments`."""
    del partial
    out[:, pl.ds(column, 16)] = acc[: out.shape[0]].astype(out.dtype)
