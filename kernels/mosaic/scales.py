"""Scales of tiles of a 4-bit weight, read from global memory one step ahead and dequantized in registers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from qlora_jax.kernels.mosaic import ptx, tiles


def fetch_scales(
    weight_format: tiles.WeightFormat,
    absmax: Any,
    nested: Any,
    row: Any,
    column: Any,
    tile: tuple[int, int],
    *,
    fragments: bool = False,
) -> tuple[jax.Array, ...]:
    """Start reading the scales of a tile of codes from global memory; `finish_scales` dequantizes them.

    Args:
        weight_format: of the weight.
        absmax: ref [N K / block_size], uint8 codes or float32 scales; N K < 2^32.
        nested: ref [N K / block_size / 256 or more] float32 (double quantization), else None.
        row: first row of the tile.
        column: first column of the tile, in elements, a multiple of 64.
        tile: (rows, columns) of the tile, columns in elements; beyond the last column the last group is repeated.
        fragments: groups are assigned to threads by `ptx.groups_of_fragments`, not by `ptx.groups_of_thread`.

    Returns:
        Arrays in `scale_layout`: elements of absmax as int32 bits, and of nested as float32.
    """
    rows, columns = tile
    n_groups = rows * columns // tiles.GROUP
    layout = weight_format.scale_layout(n_groups)
    size = (n_groups * weight_format.scales_per_group,)
    scalar = plgpu.Layout.WG_SPLAT(())
    raw = plgpu.ShapeDtypeStruct(size, jnp.int32, layout=layout)
    floats = plgpu.ShapeDtypeStruct(size, jnp.float32, layout=layout)

    def indices(row: Any, column: Any) -> list[list[ir.Value]]:
        """Index of the block of every scale of this thread, within the flattened weight."""
        row, column = (value.registers.item() for value in (row, column))
        out = []
        for group_row, group in (ptx.groups_of_fragments if fragments else ptx.groups_of_thread)(n_groups, rows):
            first = arith.addi(column, arith.muli(group, ptx.const(tiles.GROUP)))
            if fragments:
                first = arith.minsi(first, ptx.const(weight_format.n_inputs - tiles.GROUP))
            row_start = arith.muli(arith.addi(row, group_row), ptx.const(weight_format.n_inputs))
            block = arith.divui(arith.addi(row_start, first), ptx.const(weight_format.block_size))
            out.append([arith.addi(block, ptx.const(i)) for i in range(weight_format.scales_per_group)])
        return out

    def read(ref: ir.Value, index: ir.Value, dtype: ir.Type) -> ir.Value:
        return llvm.load(dtype, mgpu.utils.getelementptr(ptx.global_pointer(ref), [index], dtype))

    f32, u8 = ir.F32Type.get, functools.partial(ir.IntegerType.get_signless, 8)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=raw)
    def read_absmax(_: Any, ref: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        values = []
        for blocks in indices(row, column):
            if weight_format.double_quant:
                values.append([arith.extui(ptx.i32(), read(ref, block, u8())) for block in blocks])
            else:
                values.append([arith.bitcast(ptx.i32(), read(ref, block, f32())) for block in blocks])
        return ptx.array([ptx.pack(scales, ptx.i32()) for scales in values], layout, signed=True)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=floats)
    def read_nested(_: Any, ref: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        values = [
            [read(ref, arith.shrui(block, ptx.const(8)), f32()) for block in blocks] for blocks in indices(row, column)
        ]
        return ptx.array([ptx.pack(scales, f32()) for scales in values], layout, signed=None)

    codes = read_absmax(absmax, row, column)
    return (codes, read_nested(nested, row, column)) if weight_format.double_quant else (codes,)


def finish_scales(
    weight_format: tiles.WeightFormat, groups: int, read: tuple[jax.Array, ...], dynamic_map: Any, offset: Any
) -> jax.Array:
    """Return float32 scales in `scale_layout` from the result of `fetch_scales`.

    Args:
        weight_format: of the weight.
        groups: groups of 64 codes in the tile.
        read: arrays of `fetch_scales`.
        dynamic_map: shared-memory ref float32 [256] (double quantization), else None.
        offset: float32 scalar (double quantization), else None.
    """
    layout = weight_format.scale_layout(groups)
    floats = plgpu.ShapeDtypeStruct((groups * weight_format.scales_per_group,), jnp.float32, layout=layout)
    f32 = ir.F32Type.get

    def each(function: Callable[..., ir.Value], *arrays: Any) -> mgpu.FragmentedArray:
        vectors = []
        for registers in zip(*(array.registers for array in arrays), strict=True):
            scalars = zip(
                *(ptx.unpack(register, weight_format.scales_per_group) for register in registers), strict=True
            )
            vectors.append(ptx.pack([function(*operands) for operands in scalars], f32()))
        return ptx.array(vectors, layout, signed=None)

    if not weight_format.double_quant:

        @plgpu.inline_mgpu(arg_types=(layout,), return_type=floats)
        def as_floats(_: Any, bits: Any) -> mgpu.FragmentedArray:
            return each(lambda bits: arith.bitcast(f32(), bits), bits)

        return as_floats(*read)

    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(layout, layout, plgpu.RefType(), scalar), return_type=floats)
    def dequantize(_: Any, codes: Any, nested: Any, dynamic_map: ir.Value, offset: Any) -> mgpu.FragmentedArray:
        pointer = mgpu.utils.memref_ptr(dynamic_map)

        def scale(code: ir.Value, nested: ir.Value) -> ir.Value:
            entry = llvm.load(f32(), mgpu.utils.getelementptr(pointer, [code], f32()))
            # As text, so that product and sum are not contracted to one fused operation with another rounding.
            text = "{ .reg .f32 p; mul.rn.f32 p, $1, $2; add.rn.f32 $0, p, $3; }"
            return ptx.asm(text, [f32()], [entry, nested, offset.registers.item()], "=f,f,f,f")[0]

        return each(scale, codes, nested)

    return dequantize(*read, dynamic_map, offset)


@dataclasses.dataclass(frozen=True)
class Scales:
    """Reader of the scales of a weight's tiles, one step ahead of their use.

    Attributes:
        weight_format: of the weight.
        tile: (rows, columns) of a tile.
        absmax, nested: refs in global memory of this layer's scales (nested None without double quantization).
        dynamic_map: shared-memory ref float32 [256], or None.
        offset: float32 scalar, or None.
        fragments: see `fetch_scales`.
    """

    weight_format: tiles.WeightFormat
    tile: tuple[int, int]
    absmax: Any
    nested: Any
    dynamic_map: Any
    offset: Any
    fragments: bool = False

    @classmethod
    def of(
        cls,
        weight_format: tiles.WeightFormat,
        tile: tuple[int, int],
        layer: Any,
        refs: list[Any],
        scratch: Any,
        *,
        fragments: bool = False,
    ) -> "Scales":
        """Take a kernel's scale operands (`PackedWeight.scales`); the next barrier publishes the map in `scratch`."""
        if not weight_format.double_quant:
            (absmax,) = refs
            return cls(weight_format, tile, cls._of_layer(absmax, layer), None, None, None, fragments)
        absmax, nested, offset, dynamic_map = refs
        cls._publish(dynamic_map, scratch)
        absmax, nested = cls._of_layer(absmax, layer), cls._of_layer(nested, layer)
        return cls(weight_format, tile, absmax, nested, scratch, offset[layer], fragments)

    @staticmethod
    def _of_layer(ref: Any, layer: Any) -> Any:
        return ref.at[layer]

    @staticmethod
    def _publish(dynamic_map: Any, scratch: Any) -> None:
        scratch[...] = plgpu.load(dynamic_map, layout=plgpu.Layout.WG_STRIDED((256,), vec_size=2))

    def fetch(self, row: Any, column: Any) -> tuple[jax.Array, ...]:
        """Start reading the scales of the tile at (row, column)."""
        return fetch_scales(
            self.weight_format, self.absmax, self.nested, row, column, self.tile, fragments=self.fragments
        )

    def finish(self, read: tuple[jax.Array, ...]) -> jax.Array:
        """Dequantize the result of `fetch`."""
        groups = self.tile[0] * self.tile[1] // tiles.GROUP
        return finish_scales(self.weight_format, groups, read, self.dynamic_map, self.offset)
