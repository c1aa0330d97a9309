"""Conventions shared by all kernels: layout of codes and weights in tiles, and which thread dequantizes which codes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels.product import Product
from qlora_jax.quantization import FORMATS, Format

WARPGROUP = 128
# A group: 64 consecutive codes of one row, dequantized by one thread; it has one scale, two or four (blocks of 32, 16).
GROUP = 64


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """Compile-time facts about the codes that a kernel dequantizes.

    Attributes:
        quant_type: a 4-bit type of `quantization.FORMATS`.
        dtype: bfloat16 or float16, of the dequantized weights.
        block_size: elements of one scale, 16, 32 or a multiple of 64.
        double_quant: scales are 8-bit codes of the dynamic map.
        n_inputs: K, elements of a row of the weight.
    """

    quant_type: str
    dtype: Any
    block_size: int
    double_quant: bool
    n_inputs: int

    @property
    def format(self) -> Format:
        """Row of `FORMATS`: storage of scales and minima."""
        return FORMATS[self.quant_type]

    @property
    def scales_per_group(self) -> int:
        """1, or 2 or 4 if blocks are of 32 or 16."""
        return max(1, GROUP // self.block_size)

    def scale_layout(self, groups: int) -> Any:
        """Layout of the array of the scales of `groups` groups: group t + 128 j belongs to thread t."""
        return plgpu.Layout.WG_STRIDED((groups * self.scales_per_group,), vec_size=self.scales_per_group)


def swizzled(offset: Any, row_bytes: int) -> Any:
    """Swizzle the byte offset within a shared-memory tile whose rows have 32, 64 or 128 bytes.

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


def rasterize(cta: Any, rows: int, columns: int, *, grid_tile_width: int) -> tuple[Any, Any]:
    """Return the row and column, in tiles, of the output tile of a CTA; CTAs are numbered in the order they start.

    The grid is cut into strips of `grid_tile_width` rows of tiles, each gone through column by column. CTAs that run at
    the same time then form a block of the output and share rows of x and columns of W in the level-two cache; a whole
    row or column of tiles would read one of the two from memory again and again.

    Args:
        cta: 0 .. rows * columns - 1.
        rows: tiles along M.
        columns: tiles along the other dimension of the output.
        grid_tile_width: about the square root of the number of CTAs that run at a time, times the ratio of the bytes of
            a tile's codes to those of its rows of x.
    """
    first = cta // (grid_tile_width * columns) * grid_tile_width
    height = jnp.minimum(grid_tile_width, rows - first)
    within = cta - first * columns
    return first + within % height, within // height


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Division of a product into tiles: x [M, K] @ W^T -> [M, N] or, transposed, x [M, N] @ W -> [M, K].

    Tiles that would reach over an edge are moved back inside.

    Attributes:
        product: the product.
        block_m: rows of x of one CTA.
        block_n: columns of the output of one CTA.
        block_k: contracted elements of one step.
        grid_tile_width: see `rasterize`.
    """

    product: Product
    block_m: int
    block_n: int
    block_k: int
    grid_tile_width: int

    @property
    def steps(self) -> int:
        """Steps of block_k along the contraction."""
        return -(-self.product.contracted // self.block_k)

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the output, along its rows and its columns."""
        return -(-self.product.m // self.block_m), -(-self.product.n_out // self.block_n)

    @property
    def weight_tile(self) -> tuple[int, int]:
        """Shape of a step's tile of W, in the orientation of W: rows of N, columns of K."""
        return (self.block_k, self.block_n) if self.product.transposed else (self.block_n, self.block_k)

    def output_tile_origin(self, cta: Any) -> tuple[Any, Any]:
        """First row and first column of the output tile of a CTA."""
        row, column = rasterize(cta, *self.grid, grid_tile_width=self.grid_tile_width)
        m0 = lax.min(row * self.block_m, self.product.m - self.block_m)
        return m0, lax.min(column * self.block_n, self.product.n_out - self.block_n)

    def weight_tile_origin(self, step: Any, n0: Any) -> tuple[Any, Any]:
        """First row and first column, within W, of the tile of a step of a CTA whose output begins at column n0."""
        if self.product.transposed:
            return lax.min(step * self.block_k, self.product.n - self.block_k), n0
        return n0, step * self.block_k


def ragged_output(product: Product) -> bool:
    """Return True if the output is not whole tiles of 128 columns, so that a kernel needs tiles of 64."""
    return product.transposed and product.k % 128 != 0
