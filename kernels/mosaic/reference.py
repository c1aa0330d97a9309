"""The steps of `machine` in jax.numpy, for Pallas' interpret mode: it executes neither inline code nor `mma.sync`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.mosaic import tiles
from qlora_jax.quantization.codebooks import TABLES


@dataclasses.dataclass(frozen=True)
class Scales:
    """`machine.Scales` for interpret mode; scales are float32 [rows, columns / 64, scales per run] of a tile."""

    decoding: tiles.Decoding
    tile: tuple[int, int]
    absmax: Any
    nested: Any
    dynamic_map: Any
    offset: Any

    @classmethod
    def of(cls, decoding: tiles.Decoding, tile: tuple[int, int], layer: Any, refs: list[Any], scratch: Any) -> "Scales":
        """See `machine.Scales.of`."""
        if not decoding.double_quant:
            return cls(decoding, tile, refs[0][layer], None, None, None)
        absmax, nested, offset, dynamic_map = refs
        scratch[...] = dynamic_map[...]
        return cls(decoding, tile, absmax[layer], nested[layer], scratch, offset[layer])

    def fetch(self, row: Any, column: Any) -> tuple[jax.Array, ...]:
        """See `machine.Scales.fetch`."""
        rows, columns = self.tile
        per_run, size = self.decoding.scales_per_run, self.decoding.block_size
        r = jnp.arange(rows)[:, None, None] + row
        c = jnp.arange(columns // tiles.RUN)[None, :, None] * tiles.RUN + column
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


def decode(decoding: tiles.Decoding, codes: Any, scales: jax.Array, out: Any) -> None:
    """`machine.decode` for interpret mode."""
    rows, columns = out.shape
    packed = codes[...]
    code = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(*scales.shape, -1)
    value = jnp.zeros(code.shape, jnp.float32)
    for i, entry in enumerate(TABLES[decoding.quant_type]):  # a kernel cannot hold the table as a constant
        value = jnp.where(code == i, float(entry), value)
    out[...] = (value * scales[..., None]).astype(decoding.dtype).reshape(rows, columns)


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
