"""What all kernels agree on: how codes and weights lie in tiles, and which thread decodes what."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP = 128
# One thread decodes runs of 64 consecutive codes of one row; a run has one scale, or two if the blocks are of 32.
RUN = 64


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What a kernel knows at compile time about the codes it decodes.

    Attributes:
        quant_type: "nf4" or "fp4".
        dtype: bfloat16 or float16, of the decoded weights.
        block_size: elements a scale belongs to, 32 or a multiple of 64.
        double_quant: whether scales are 8-bit codes of the dynamic map.
        n_inputs: K, elements of a row of the weight.
    """

    quant_type: str
    dtype: Any
    block_size: int
    double_quant: bool
    n_inputs: int

    @property
    def scales_per_run(self) -> int:
        """1, or 2 where the blocks are of 32."""
        return max(1, RUN // self.block_size)

    def scale_layout(self, runs: int) -> Any:
        """Layout of an array with the scales of `runs` runs: run t + 128 j belongs to thread t."""
        return plgpu.Layout.WG_STRIDED((runs * self.scales_per_run,), vec_size=self.scales_per_run)


def swizzled(offset: Any, row_bytes: int) -> Any:
    """The shared-memory byte where the swizzle of rows of 32, 64 or 128 bytes puts the byte `offset` of a tile.

    The pattern of TMA and of the tensor cores: bits 4..6 of the address are exclusive-ored with bits 7..9, as many of
    them as the row has 16-byte chunks (PTX ISA, "Swizzling modes").
    """
    return offset ^ ((offset >> 3) & (row_bytes - 16))


def swizzle_of(row_bytes: int) -> tuple[Any, ...]:
    """Pallas transforms of a byte tile with rows of 32, 64 or 128 bytes, swizzled over the whole row."""
    return (plgpu.TilingTransform((8, row_bytes)), plgpu.SwizzleTransform(row_bytes))


def tile_transforms(dtype: Any) -> tuple[Any, ...]:
    """Pallas transforms of a 16-bit tile: subtiles of 8 rows x 64 elements (128 bytes), swizzled."""
    return (plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128))


def place(cta: Any, rows: int, columns: int, *, band: int) -> tuple[Any, Any]:
    """Row and column, in tiles, of the output tile that a CTA computes, CTAs being numbered in the order they start.

    They go through bands of `band` rows column by column, so that those which run at a time form a block of the output:
    they share rows of x and columns of W in the level-two cache, where a whole row or column of tiles would read one of
    the two from memory again and again.

    Args:
        cta: 0 .. rows * columns - 1.
        rows: tiles along M.
        columns: tiles along the other dimension of the output.
        band: about the square root of the CTAs that run at a time, times the ratio of a tile's codes to its rows of x.
    """
    first = cta // (band * columns) * band
    height = jnp.minimum(band, rows - first)
    within = cta - first * columns
    return first + within % height, within // height


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut into tiles: x [M, K] @ W^T -> [M, N] or, transposed, x [M, N] @ W -> [M, K].

    Tiles that would reach over an edge are moved back inside.

    Attributes:
        m: rows of x.
        n, k: of the weight [N, K].
        transposed: the product is with W instead of W^T.
        block_m: rows of x of one CTA.
        block_n: columns of the output of one CTA.
        block_k: contracted elements of one step.
        band: see `place`.
    """

    m: int
    n: int
    k: int
    transposed: bool
    block_m: int
    block_n: int
    block_k: int
    band: int

    @property
    def n_out(self) -> int:
        """Columns of the output."""
        return self.k if self.transposed else self.n

    @property
    def contracted(self) -> int:
        """Elements that are summed over."""
        return self.n if self.transposed else self.k

    @property
    def steps(self) -> int:
        """Steps of block_k along the contraction."""
        return -(-self.contracted // self.block_k)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the output, along its rows and its columns."""
        return -(-self.m // self.block_m), -(-self.n_out // self.block_n)

    @property
    def tile(self) -> tuple[int, int]:
        """Shape of a step's tile of W, in its own orientation: rows of N, columns of K."""
        return (self.block_k, self.block_n) if self.transposed else (self.block_n, self.block_k)

    def origin(self, cta: Any) -> tuple[Any, Any]:
        """First row and first column of the output tile of a CTA."""
        row, column = place(cta, *self.grid, band=self.band)
        m0 = lax.min(row * self.block_m, self.m - self.block_m)
        return m0, lax.min(column * self.block_n, self.n_out - self.block_n)

    def corner(self, step: Any, n0: Any) -> tuple[Any, Any]:
        """Row and column of W where the tile of a step begins, of a CTA whose output begins at column n0."""
        if self.transposed:
            return lax.min(step * self.block_k, self.n - self.block_k), n0
        return n0, step * self.block_k
