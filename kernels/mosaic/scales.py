"""Scales of tiles of a 4-bit weight, read from global memory one step ahead and dequantized in registers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from qlora_jax.kernels.mosaic import ptx, tiles
from qlora_jax.kernels.mosaic.scale_operands import ScaleOperands


def fetch_scales(
    weight_format: tiles.WeightFormat,
    stored: Sequence[Any],
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
        stored: refs [N K / block_size] of the stored scales and, of a format that has them, of the minima; N K < 2^32.
        nested: ref [N K / block_size / 256 or more] float32 (double quantization), else None.
        row: first row of the tile.
        column: first column of the tile, in elements, a multiple of 64.
        tile: (rows, columns) of the tile, columns in elements; beyond the last column the last group is repeated.
        fragments: groups are assigned to threads by `ptx.groups_of_fragments`, not by `ptx.groups_of_thread`.

    Returns:
        Arrays in `scale_layout`: stored scales as the bits of an int32, with minima in its upper half, and of nested
        as float32.
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

    def bits(ref: ir.Value, index: ir.Value) -> ir.Value:
        width = ir.MemRefType(ref.type).element_type.width
        value = read(ref, index, ir.IntegerType.get_signless(width))
        return value if width == 32 else arith.extui(ptx.i32(), value)

    refs = [plgpu.RefType()] * len(stored)

    @plgpu.inline_mgpu(arg_types=(scalar, scalar, *refs), return_type=raw)
    def read_stored(_: Any, row: Any, column: Any, absmax: ir.Value, *minimum: ir.Value) -> mgpu.FragmentedArray:
        def one(block: ir.Value) -> ir.Value:
            value = bits(absmax, block)
            for ref in minimum:
                value = arith.ori(value, arith.shli(bits(ref, block), ptx.const(16)))
            return value

        values = [ptx.pack([one(block) for block in blocks], ptx.i32()) for blocks in indices(row, column)]
        return ptx.array(values, layout, signed=True)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=floats)
    def read_nested(_: Any, ref: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        f32 = ir.F32Type.get()
        values = [
            [read(ref, arith.shrui(block, ptx.const(8)), f32) for block in blocks] for blocks in indices(row, column)
        ]
        return ptx.array([ptx.pack(scales, f32) for scales in values], layout, signed=None)

    codes = read_stored(row, column, *stored)
    return (codes, read_nested(nested, row, column)) if weight_format.double_quant else (codes,)


def finish_scales(
    weight_format: tiles.WeightFormat, groups: int, read: tuple[jax.Array, ...], scale_map: Any, offset: Any
) -> tuple[jax.Array, ...]:
    """Return scales and, of a format that has them, minima, float32 in `scale_layout`, from `fetch_scales`' result.

    Args:
        weight_format: of the weight.
        groups: groups of 64 codes in the tile.
        read: arrays of `fetch_scales`.
        scale_map: shared-memory ref float32 [256] (double quantization and "e4m3"), else None.
        offset: float32 scalar (double quantization), else None.
    """
    layout = weight_format.scale_layout(groups)
    floats = plgpu.ShapeDtypeStruct((groups * weight_format.scales_per_group,), jnp.float32, layout=layout)
    f32, kind = ir.F32Type.get, weight_format.format

    def each(function: Callable[..., ir.Value], *arrays: Any) -> mgpu.FragmentedArray:
        vectors = []
        for registers in zip(*(array.registers for array in arrays), strict=True):
            scalars = zip(
                *(ptx.unpack(register, weight_format.scales_per_group) for register in registers), strict=True
            )
            vectors.append(ptx.pack([function(*operands) for operands in scalars], f32()))
        return ptx.array(vectors, layout, signed=None)

    def entry(scale_map: ir.Value, code: ir.Value) -> ir.Value:
        return llvm.load(f32(), mgpu.utils.getelementptr(mgpu.utils.memref_ptr(scale_map), [code], f32()))

    scalar = plgpu.Layout.WG_SPLAT(())
    if weight_format.double_quant:

        @plgpu.inline_mgpu(arg_types=(layout, layout, plgpu.RefType(), scalar), return_type=floats)
        def dequantize(_: Any, codes: Any, nested: Any, dynamic_map: ir.Value, offset: Any) -> mgpu.FragmentedArray:
            def scale(code: ir.Value, nested: ir.Value) -> ir.Value:
                # As text, so that product and sum are not contracted to one fused operation with another rounding.
                text = "{ .reg .f32 p; mul.rn.f32 p, $1, $2; add.rn.f32 $0, p, $3; }"
                operands = [entry(dynamic_map, code), nested, offset.registers.item()]
                return ptx.asm(text, [f32()], operands, "=f,f,f,f")[0]

            return each(scale, codes, nested)

        return (dequantize(*read, scale_map, offset),)

    if kind.scale == "e4m3":

        @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=floats)
        def look_up(_: Any, codes: Any, scale_map: ir.Value) -> mgpu.FragmentedArray:
            return each(functools.partial(entry, scale_map), codes)

        return (look_up(*read, scale_map),)

    def half(bits: ir.Value) -> ir.Value:
        """The float16 number in the lower half of 32 bits."""
        lower = arith.trunci(ir.IntegerType.get_signless(16), bits)
        return arith.extf(f32(), arith.bitcast(ir.F16Type.get(), lower))

    def scale_of(bits: ir.Value) -> ir.Value:
        if kind.scale == "float16":
            return half(bits)
        if kind.scale == "e8m0":
            smallest = arith.cmpi(arith.CmpIPredicate.eq, bits, ptx.const(0))  # 2^-127 has no exponent of its own
            bits = arith.select(smallest, ptx.const(1 << 22), arith.shli(bits, ptx.const(23)))
        return arith.bitcast(f32(), bits)

    def minimum_of(bits: ir.Value) -> ir.Value:
        upper = arith.shrui(bits, ptx.const(16))
        if kind.minimum == "zero_point":
            return arith.negf(arith.mulf(arith.uitofp(f32(), upper), half(bits)))
        return half(upper)

    def finished(function: Callable[[ir.Value], ir.Value]) -> jax.Array:
        @plgpu.inline_mgpu(arg_types=(layout,), return_type=floats)
        def finish(_: Any, bits: Any) -> mgpu.FragmentedArray:
            return each(function, bits)

        return finish(*read)

    return (finished(scale_of),) if kind.minimum == "none" else (finished(scale_of), finished(minimum_of))


@dataclasses.dataclass(frozen=True)
class Scales:
    """Reader of the scales of a weight's tiles, one step ahead of their use.

    Attributes:
        weight_format: of the weight.
        tile: (rows, columns) of a tile.
        stored: refs in global memory of this layer's stored scales and, of a format that has them, minima.
        nested: ref of this layer's nested scales (double quantization), or None.
        scale_map: shared-memory ref float32 [256] (double quantization and "e4m3"), or None.
        offset: float32 scalar (double quantization), or None.
        fragments: see `fetch_scales`.
    """

    weight_format: tiles.WeightFormat
    tile: tuple[int, int]
    stored: tuple[Any, ...]
    nested: Any
    scale_map: Any
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
        """Take a kernel's operands of `ScaleOperands`; the next barrier publishes the map in `scratch`."""
        of_layer = functools.partial(cls._of_layer, layer=layer)
        given = ScaleOperands.named(refs, weight_format)
        if given.table is not None:
            cls._publish(cls._of_layer(given.table, 0), scratch)
        elif given.scale_map is not None:
            cls._publish(of_layer(given.scale_map), scratch)
        else:
            scratch = None
        return cls(
            weight_format,
            tile,
            tuple(of_layer(ref) for ref in (given.stored, given.minimum) if ref is not None),
            None if given.nested is None else of_layer(given.nested),
            scratch,
            None if given.offset is None else given.offset[layer],
            fragments,
        )

    @staticmethod
    def _of_layer(ref: Any, layer: Any) -> Any:
        return ref.at[layer]

    @staticmethod
    def _publish(scale_map: Any, scratch: Any) -> None:
        scratch[...] = plgpu.load(scale_map, layout=plgpu.Layout.WG_STRIDED((256,), vec_size=2))

    def fetch(self, row: Any, column: Any) -> tuple[jax.Array, ...]:
        """Start reading the scales of the tile at (row, column)."""
        return fetch_scales(
            self.weight_format, self.stored, self.nested, row, column, self.tile, fragments=self.fragments
        )

    def finish(self, read: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Dequantize the result of `fetch`."""
        groups = self.tile[0] * self.tile[1] // tiles.GROUP
        return finish_scales(self.weight_format, groups, read, self.scale_map, self.offset)
