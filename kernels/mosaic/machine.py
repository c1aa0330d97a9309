"""Decoding and multiplying tiles in machine terms: inline PTX on registers and shared memory.

One thread decodes runs of 64 codes, one block of the default size:

    table[c] = bf16(float32 codebook[c] * float32 absmax)     16 FMUL, 8 CVT, 8 PRMT that part high and low bytes
    value    = table[code]                                    byte permutes (PRMT), four codes at a time

A PRMT selects four of eight bytes by the four low nibbles of a register, and packed codes *are* nibbles: the word as
it lies in memory is the selector. Entries 0-7 and 8-15 are looked up apart and a third PRMT chooses between them by the
top bits of the codes: 21 instructions for 8 codes. Each product is rounded once, as bitsandbytes rounds it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from qlora_jax.kernels.mosaic import tiles
from qlora_jax.quantization.codebooks import TABLES


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _const(value: int) -> ir.Value:
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value - (1 << 32) if value >= 1 << 31 else value))


def _thread() -> ir.Value:
    """Index of this thread within its warpgroup, 0..127."""
    return arith.andi(arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x)), _const(tiles.WARPGROUP - 1))


def _asm(text: str, results: list[ir.Type], operands: list[ir.Value], constraints: str) -> list[ir.Value]:
    if len(results) == 1:
        return [llvm.inline_asm(results[0], operands, text, constraints, has_side_effects=False)]
    struct = llvm.StructType.get_literal(results)
    value = llvm.inline_asm(struct, operands, text, constraints, has_side_effects=False)
    return [llvm.extractvalue(result, value, [i]) for i, result in enumerate(results)]


def _table(scale: ir.Value, quant_type: str, dtype: Any) -> list[ir.Value]:
    """The 16 products in 16 bits, as eight registers: low bytes of entries 0-3, 4-7, 8-11, 12-15, then high bytes.

    One asm block, so that nothing contracts, reorders or flushes the products.
    """
    kind = "bf16x2" if jnp.dtype(dtype) == jnp.bfloat16 else "f16x2"
    lines = ["{ .reg .f32 e<16>; .reg .b32 p<8>;"]
    for i, bits in enumerate(TABLES[quant_type].view(np.uint32)):
        lines.append(f"mul.rn.f32 e{i}, $8, 0f{bits:08X};")
    for i in range(8):
        lines.append(f"cvt.rn.{kind}.f32 p{i}, e{2 * i + 1}, e{2 * i};")
    for i in range(4):
        lines.append(f"prmt.b32 ${i}, p{2 * i}, p{2 * i + 1}, 0x6420;")
        lines.append(f"prmt.b32 ${4 + i}, p{2 * i}, p{2 * i + 1}, 0x7531;")
    # Outputs are written before the last input is read: "early clobber".
    return _asm(" ".join([*lines, "}"]), [_i32()] * 8, [scale], ",".join(["=&r"] * 8 + ["f"]))


_LOOK_UP = """{{ .reg .b32 la, lb, ha, hb, l, h;
prmt.b32 la, $4, $5, {codes}; prmt.b32 lb, $6, $7, {codes};
prmt.b32 ha, $8, $9, {codes}; prmt.b32 hb, $10, $11, {codes};
prmt.b32 l, la, lb, {choice}; prmt.b32 h, ha, hb, {choice};
prmt.b32 ${first}, l, h, 0x4051; prmt.b32 ${second}, l, h, 0x6273; }}"""
_DECODE = " ".join(
    [
        "{ .reg .b32 codes, choice;",
        "and.b32 codes, $12, 0x77777777;",  # a selector's top bit would replicate a sign
        "shr.u32 choice, $12, 1;",
        # Nibble i: byte i of the first operand or, if the code's top bit is set, of the second.
        "lop3.b32 choice, choice, 0x44444444, 0x32103210, 0xEA;",
        _LOOK_UP.format(codes="codes", choice="choice", first=0, second=1),
        "shr.u32 codes, codes, 16; shr.u32 choice, choice, 16;",
        _LOOK_UP.format(codes="codes", choice="choice", first=2, second=3),
        "}",
    ]
).replace("\n", " ")


def _decode_word(word: ir.Value, table: list[ir.Value]) -> list[ir.Value]:
    """Four registers of two 16-bit weights each, from eight codes in bitsandbytes' order (even element high)."""
    return _asm(_DECODE, [_i32()] * 4, [*table, word], ",".join(["=&r"] * 4 + ["r"] * 9))


def _load_shared(pointer: ir.Value, offset: ir.Value) -> list[ir.Value]:
    """Sixteen bytes of shared memory as four words."""
    vector = ir.VectorType.get((4,), _i32())
    value = llvm.load(vector, _byte_pointer(pointer, offset), alignment=16)
    return [llvm.extractelement(value, _const(i)) for i in range(4)]


def _store_shared(pointer: ir.Value, offset: ir.Value, words: list[ir.Value]) -> None:
    value = llvm.mlir_undef(ir.VectorType.get((4,), _i32()))
    for i, word in enumerate(words):
        value = llvm.insertelement(value, word, _const(i))
    llvm.store(value, _byte_pointer(pointer, offset), alignment=16)


def _byte_pointer(pointer: ir.Value, offset: ir.Value) -> ir.Value:
    return mgpu.utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def _swizzled(offset: ir.Value, row_bytes: int) -> ir.Value:
    chunk = arith.andi(arith.shrui(offset, _const(3)), _const(row_bytes - 16))
    return arith.xori(offset, chunk)


def _runs_of_thread(n_runs: int, rows: int) -> list[tuple[ir.Value, ir.Value]]:
    """(row, run within the row) of each run this thread decodes: neighbouring threads take neighbouring rows."""
    thread = _thread()
    out = []
    for j in range(n_runs // tiles.WARPGROUP):
        run = arith.addi(thread, _const(j * tiles.WARPGROUP))
        out.append((arith.remui(run, _const(rows)), arith.divui(run, _const(rows))))
    return out


def _runs_of_fragments(n_runs: int, rows: int) -> list[tuple[ir.Value, ir.Value]]:
    """(row, run) of the two runs of this thread in a tile of 16 rows x 16 runs, 4 runs a warp.

    Lane 4 g + c holds run c of rows g and g + 8, as an operand of mma.sync holds its columns (PTX ISA, "Matrix
    Fragments for mma.m16n8k16").
    """
    if (n_runs, rows) != (2 * tiles.WARPGROUP, 16):
        raise ValueError(f"fragments are of 16 rows and 16 runs, not {rows} and {n_runs // rows}.")
    thread = _thread()
    row = arith.andi(arith.shrui(thread, _const(2)), _const(7))
    run = arith.addi(arith.muli(arith.shrui(thread, _const(5)), _const(4)), arith.andi(thread, _const(3)))
    return [(row, run), (arith.addi(row, _const(8)), run)]


def fetch_scales(
    decoding: tiles.Decoding,
    absmax: Any,
    nested: Any,
    row: Any,
    column: Any,
    tile: tuple[int, int],
    *,
    fragments: bool = False,
) -> tuple[jax.Array, ...]:
    """Start reading the scales of a tile of codes from global memory; `finish_scales` makes numbers of them.

    Args:
        decoding: the weight.
        absmax: ref [N K / block_size], uint8 codes or float32 scales; N K < 2^32.
        nested: ref [N K / block_size / 256 or more] float32 (double quantisation), else None.
        row: first row of the tile.
        column: first column of the tile, in elements, a multiple of 64.
        tile: (rows, columns) of the tile, columns in elements; what lies beyond the last column repeats the last run.
        fragments: the runs lie in threads as `_runs_of_fragments` says, not neighbouring rows in neighbouring threads.

    Returns:
        Arrays in `scale_layout`: what was read of absmax as int32 bits, and of nested as float32.
    """
    rows, columns = tile
    n_runs = rows * columns // tiles.RUN
    layout = decoding.scale_layout(n_runs)
    size = (n_runs * decoding.scales_per_run,)
    scalar = plgpu.Layout.WG_SPLAT(())
    raw = plgpu.ShapeDtypeStruct(size, jnp.int32, layout=layout)
    floats = plgpu.ShapeDtypeStruct(size, jnp.float32, layout=layout)

    def indices(row: Any, column: Any) -> list[list[ir.Value]]:
        """Index of the block of every scale of this thread, within the flattened weight."""
        row, column = (value.registers.item() for value in (row, column))
        out = []
        for run_row, run in (_runs_of_fragments if fragments else _runs_of_thread)(n_runs, rows):
            first = arith.addi(column, arith.muli(run, _const(tiles.RUN)))
            if fragments:
                first = arith.minsi(first, _const(decoding.n_inputs - tiles.RUN))
            row_start = arith.muli(arith.addi(row, run_row), _const(decoding.n_inputs))
            block = arith.divui(arith.addi(row_start, first), _const(decoding.block_size))
            out.append([arith.addi(block, _const(i)) for i in range(decoding.scales_per_run)])
        return out

    def read(ref: ir.Value, index: ir.Value, dtype: ir.Type) -> ir.Value:
        pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(ref))
        return llvm.load(dtype, mgpu.utils.getelementptr(pointer, [index], dtype))

    def vectors(values: list[list[ir.Value]], dtype: ir.Type) -> np.ndarray:
        registers = np.empty(len(values), object)
        for i, scalars in enumerate(values):
            vector = llvm.mlir_undef(ir.VectorType.get((len(scalars),), dtype))
            for j, scalar in enumerate(scalars):
                vector = llvm.insertelement(vector, scalar, _const(j))
            registers[i] = vector
        return registers

    f32, u8 = ir.F32Type.get, functools.partial(ir.IntegerType.get_signless, 8)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=raw)
    def read_absmax(_: Any, ref: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        values = []
        for blocks in indices(row, column):
            if decoding.double_quant:
                values.append([arith.extui(_i32(), read(ref, block, u8())) for block in blocks])
            else:
                values.append([arith.bitcast(_i32(), read(ref, block, f32())) for block in blocks])
        return mgpu.FragmentedArray(_registers=vectors(values, _i32()), _layout=layout.to_mgpu(), _is_signed=True)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=floats)
    def read_nested(_: Any, ref: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        values = [
            [read(ref, arith.shrui(block, _const(8)), f32()) for block in blocks] for blocks in indices(row, column)
        ]
        return mgpu.FragmentedArray(_registers=vectors(values, f32()), _layout=layout.to_mgpu(), _is_signed=None)

    codes = read_absmax(absmax, row, column)
    return (codes, read_nested(nested, row, column)) if decoding.double_quant else (codes,)


def finish_scales(
    decoding: tiles.Decoding, runs: int, read: tuple[jax.Array, ...], dynamic_map: Any, offset: Any
) -> jax.Array:
    """Return float32 scales in `scale_layout` from what `fetch_scales` read.

    Args:
        decoding: the weight.
        runs: runs of 64 codes in the tile.
        read: arrays of `fetch_scales`.
        dynamic_map: shared-memory ref float32 [256] (double quantisation), else None.
        offset: float32 scalar (double quantisation), else None.
    """
    layout = decoding.scale_layout(runs)
    floats = plgpu.ShapeDtypeStruct((runs * decoding.scales_per_run,), jnp.float32, layout=layout)
    f32 = ir.F32Type.get

    def each(function: Callable[..., ir.Value], *arrays: Any) -> mgpu.FragmentedArray:
        registers = np.empty(arrays[0].registers.shape, object)
        for i in np.ndindex(registers.shape):
            vector = llvm.mlir_undef(ir.VectorType.get((decoding.scales_per_run,), f32()))
            for j in range(decoding.scales_per_run):
                scalars = [llvm.extractelement(array.registers[i], _const(j)) for array in arrays]
                vector = llvm.insertelement(vector, function(*scalars), _const(j))
            registers[i] = vector
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    if not decoding.double_quant:

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
            return _asm(text, [f32()], [entry, nested, offset.registers.item()], "=f,f,f,f")[0]

        return each(scale, codes, nested)

    return dequantize(*read, dynamic_map, offset)


def decode(decoding: tiles.Decoding, codes: Any, scales: jax.Array, out: Any) -> None:
    """Decode a tile of codes in shared memory into a 16-bit tile in shared memory, by one warpgroup.

    The caller separates it with barriers from what filled `codes` and from what reads `out`.

    Args:
        decoding: the weight.
        codes: uint8 [rows, columns / 2] with transforms `swizzle_of(columns / 2)`.
        scales: float32 in `scale_layout(rows * columns / 64)`.
        out: decoding.dtype [rows, columns] with `tile_transforms`.
    """
    rows, columns = out.shape
    row_bytes = columns // 2
    n_runs = rows * columns // tiles.RUN
    layout = decoding.scale_layout(n_runs)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(tiles.swizzle_of(row_bytes)),
            layout,
            plgpu.RefType(tiles.tile_transforms(decoding.dtype)),
        )
    )
    def decode(_: Any, codes: ir.Value, scales: Any, out: ir.Value) -> None:
        source, target = mgpu.utils.memref_ptr(codes), mgpu.utils.memref_ptr(out)
        for j, (row, run) in enumerate(_runs_of_thread(n_runs, rows)):
            in_offset = arith.addi(arith.muli(row, _const(row_bytes)), arith.muli(run, _const(tiles.RUN // 2)))
            words = []
            for half in range(2):
                words += _load_shared(source, _swizzled(arith.addi(in_offset, _const(16 * half)), row_bytes))
            # Subtiles of 8 rows x 64 elements, 1024 bytes, one after another along the row.
            subtile = arith.addi(arith.muli(arith.shrui(row, _const(3)), _const(columns // tiles.RUN)), run)
            in_subtile = arith.muli(arith.andi(row, _const(7)), _const(128))
            out_offset = arith.addi(arith.muli(subtile, _const(1024)), in_subtile)
            words_per_scale = len(words) // decoding.scales_per_run
            for i, word in enumerate(words):
                if i % words_per_scale == 0:
                    scale = llvm.extractelement(scales.registers[j], _const(i // words_per_scale))
                    table = _table(scale, decoding.quant_type, decoding.dtype)
                offset = _swizzled(arith.addi(out_offset, _const(16 * i)), 128)
                _store_shared(target, offset, _decode_word(word, table))

    decode(codes, scales, out)


@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales of the tiles of a weight, read one step ahead of their use.

    Attributes:
        decoding: the weight.
        tile: (rows, columns) of a tile.
        absmax, nested: refs in global memory of this layer's scales (nested None without double quantisation).
        dynamic_map: shared-memory ref float32 [256], or None.
        offset: float32 scalar, or None.
        fragments: see `fetch_scales`.
    """

    decoding: tiles.Decoding
    tile: tuple[int, int]
    absmax: Any
    nested: Any
    dynamic_map: Any
    offset: Any
    fragments: bool = False

    @classmethod
    def of(
        cls,
        decoding: tiles.Decoding,
        tile: tuple[int, int],
        layer: Any,
        refs: list[Any],
        scratch: Any,
        *,
        fragments: bool = False,
    ) -> "Scales":
        """Take a kernel's scale operands (`Operands.scales`); the next barrier publishes the table in `scratch`."""
        if not decoding.double_quant:
            (absmax,) = refs
            return cls(decoding, tile, absmax.at[layer], None, None, None, fragments)
        absmax, nested, offset, dynamic_map = refs
        scratch[...] = plgpu.load(dynamic_map, layout=plgpu.Layout.WG_STRIDED((256,), vec_size=2))
        return cls(decoding, tile, absmax.at[layer], nested.at[layer], scratch, offset[layer], fragments)

    def fetch(self, row: Any, column: Any) -> tuple[jax.Array, ...]:
        """Start reading the scales of the tile at (row, column)."""
        return fetch_scales(self.decoding, self.absmax, self.nested, row, column, self.tile, fragments=self.fragments)

    def finish(self, read: tuple[jax.Array, ...]) -> jax.Array:
        """Make numbers of what `fetch` read."""
        runs = self.tile[0] * self.tile[1] // tiles.RUN
        return finish_scales(self.decoding, runs, read, self.dynamic_map, self.offset)


def barrier() -> None:
    """Wait for all threads of this warpgroup, and see what they wrote to shared memory."""

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


# ---------------------------------------------------------------------------------------------- few rows of x

# A warpgroup's step: 16 rows of W x 16 runs, each warp its own 4 runs (256 columns).
_WORDS = plgpu.Layout.WG_STRIDED((tiles.WARPGROUP * 16,), vec_size=16)


def _accumulator_layout(m_tiles: int) -> Any:
    return plgpu.Layout.WG_STRIDED((tiles.WARPGROUP * 4 * m_tiles,), vec_size=4 * m_tiles)


def _load_global(pointer: ir.Value, offset: ir.Value, keep: ir.Value | None = None) -> list[ir.Value]:
    """Sixteen bytes of global memory as four words; zeros, and no access, where `keep` is 0."""
    address = llvm.ptrtoint(ir.IntegerType.get_signless(64), _byte_pointer(pointer, offset))
    if keep is None:
        text, operands, constraints = "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "l"
    else:
        text = (
            "{ .reg .pred p; setp.ne.b32 p, $5, 0; "
            "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
            "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }"
        )
        operands, constraints = [address, keep], "l,r"
    return _asm(text, [_i32()] * 4, operands, "=&r,=&r,=&r,=&r," + constraints)


def _global_pointer(ref: ir.Value) -> ir.Value:
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(ref))


def stream_codes(decoding: tiles.Decoding, codes: Any, row: Any, column: Any) -> jax.Array:
    """Read the codes of 16 rows x 1024 columns from global memory into registers; the last run again beyond the edge.

    Args:
        decoding: the weight.
        codes: ref uint8 [N, K / 2].
        row: first row.
        column: first column, in elements, a multiple of 64.

    Returns:
        int32 [2048]: for each thread the 8 words of its run in row g, then those of row g + 8 (`_runs_of_fragments`).
    """
    scalar = plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((tiles.WARPGROUP * 16,), jnp.int32, layout=_WORDS)
    row_bytes = decoding.n_inputs // 2

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=result)
    def read(_: Any, codes: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        row, column = (value.registers.item() for value in (row, column))
        pointer = _global_pointer(codes)
        words = []
        for run_row, run in _runs_of_fragments(2 * tiles.WARPGROUP, 16):
            first = arith.addi(column, arith.muli(run, _const(tiles.RUN)))
            first = arith.minsi(first, _const(decoding.n_inputs - tiles.RUN))
            # Rows times bytes may pass 2^31.
            wide = ir.IntegerType.get_signless(64)
            offset = arith.muli(arith.extsi(wide, arith.addi(row, run_row)), arith.constant(wide, row_bytes))
            offset = arith.addi(offset, arith.extsi(wide, arith.shrui(first, _const(1))))
            for half in range(2):
                words += _load_global(pointer, arith.addi(offset, arith.constant(wide, 16 * half)))
        vector = llvm.mlir_undef(ir.VectorType.get((16,), _i32()))
        for i, word in enumerate(words):
            vector = llvm.insertelement(vector, word, _const(i))
        registers = np.empty(1, object)
        registers[0] = vector
        return mgpu.FragmentedArray(_registers=registers, _layout=_WORDS.to_mgpu(), _is_signed=True)

    return read(codes, row, column)


def zero_fragments(m_tiles: int) -> jax.Array:
    """Zeros for `stream_multiply`: float32, four for each thread and eight rows of x."""
    return plgpu.layout_cast(jnp.zeros(tiles.WARPGROUP * 4 * m_tiles, jnp.float32), _accumulator_layout(m_tiles))


def stream_multiply(
    decoding: tiles.Decoding, acc: jax.Array, words: jax.Array, scales: jax.Array, x: Any, column: Any
) -> jax.Array:
    """Add this warp's part of W x^T to its accumulator, from codes in registers.

    The products of a run go to mma.sync in an order of the columns that suits the codes, not the instruction: a sum
    does not mind. In step s, what the instruction calls its columns 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 are elements
    4 s .. 4 s + 3 of run c, in W and x alike.

    Args:
        decoding: the weight.
        acc: `zero_fragments` or what this returned.
        words: of `stream_codes`.
        scales: float32 [256 * scales_per_run], of the same runs.
        x: ref [M, K] in global memory, M <= 8 * m_tiles; rows beyond M and columns beyond K count as zeros.
        column: as in `stream_codes`.
    """
    scale_layout = decoding.scale_layout(2 * tiles.WARPGROUP)
    m_tiles = acc.shape[0] // (tiles.WARPGROUP * 4)
    layout = _accumulator_layout(m_tiles)
    result = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=layout)
    scalar = plgpu.Layout.WG_SPLAT(())
    rows = x.shape[0]
    kind = "bf16" if decoding.dtype == jnp.bfloat16 else "f16"
    mma_sync = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)

    @plgpu.inline_mgpu(arg_types=(layout, _WORDS, scale_layout, plgpu.RefType(), scalar), return_type=result)
    def multiply(_: Any, acc: Any, words: Any, scales: Any, x: ir.Value, column: Any) -> mgpu.FragmentedArray:
        f32 = ir.F32Type.get()
        sums = [llvm.extractelement(acc.registers[0], _const(i)) for i in range(4 * m_tiles)]
        codes = [llvm.extractelement(words.registers[0], _const(i)) for i in range(16)]
        (x_row, run), _other = _runs_of_fragments(2 * tiles.WARPGROUP, 16)
        first = arith.addi(column.registers.item(), arith.muli(run, _const(tiles.RUN)))
        within = arith.cmpi(arith.CmpIPredicate.slt, first, _const(decoding.n_inputs))
        pointer = _global_pointer(x)
        fragments = []
        for tile in range(m_tiles):
            row = arith.addi(x_row, _const(8 * tile))
            keep = arith.andi(within, arith.cmpi(arith.CmpIPredicate.slt, row, _const(rows)))
            keep = arith.extui(_i32(), keep)
            offset = arith.muli(arith.addi(arith.muli(row, _const(decoding.n_inputs)), first), _const(2))
            fragments.append(
                [_load_global(pointer, arith.addi(offset, _const(16 * i)), keep) for i in range(tiles.RUN // 8)]
            )
        words_per_scale = 8 // decoding.scales_per_run
        for i in range(8):
            if i % words_per_scale == 0:
                scale = [llvm.extractelement(r, _const(i // words_per_scale)) for r in scales.registers]
                tables = [_table(one, decoding.quant_type, decoding.dtype) for one in scale]
            upper, lower = (_decode_word(codes[8 * half + i], tables[half]) for half in range(2))
            for pair in range(2):
                a = [upper[2 * pair], lower[2 * pair], upper[2 * pair + 1], lower[2 * pair + 1]]
                for tile in range(m_tiles):
                    b = fragments[tile][i][2 * pair : 2 * pair + 2]
                    c = sums[4 * tile : 4 * tile + 4]
                    sums[4 * tile : 4 * tile + 4] = _asm(mma_sync, [f32] * 4, [*a, *b, *c], constraints)
        vector = llvm.mlir_undef(ir.VectorType.get((4 * m_tiles,), f32))
        for i, value in enumerate(sums):
            vector = llvm.insertelement(vector, value, _const(i))
        registers = np.empty(1, object)
        registers[0] = vector
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return multiply(acc, words, scales, x, column)


def store_fragments(acc: jax.Array, partial: Any, out: Any, column: Any) -> None:
    """Add the accumulators of the four warps and write columns column .. column + 15 of the output.

    Args:
        acc: of `stream_multiply`.
        partial: shared-memory ref float32 [4, 16, 8 * m_tiles].
        out: ref [M, N] in global memory, bfloat16 or float16.
        column: first row of W.
    """
    m_tiles = acc.shape[0] // (tiles.WARPGROUP * 4)
    rows, n = out.shape
    kind = "bf16" if out.dtype == jnp.bfloat16 else "f16"

    @plgpu.inline_mgpu(
        arg_types=(_accumulator_layout(m_tiles), plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(()))
    )
    def store(_: Any, acc: Any, partial: ir.Value, out: ir.Value, column: Any) -> None:
        f32, width = ir.F32Type.get(), 8 * m_tiles
        thread = _thread()
        shared = mgpu.utils.memref_ptr(partial)
        warp = arith.shrui(thread, _const(5))
        g = arith.andi(arith.shrui(thread, _const(2)), _const(7))
        c = arith.andi(thread, _const(3))
        for tile in range(m_tiles):
            for i in range(4):
                # Accumulator i: row g (+ 8 from the third on), column 2 c + i % 2 ("Matrix Fragments").
                row = arith.addi(g, _const(8 * (i // 2)))
                index = arith.addi(arith.muli(warp, _const(16)), row)
                index = arith.addi(arith.muli(index, _const(width)), arith.muli(c, _const(2)))
                index = arith.addi(index, _const(8 * tile + i % 2))
                value = llvm.extractelement(acc.registers[0], _const(4 * tile + i))
                llvm.store(value, mgpu.utils.getelementptr(shared, [index], f32))
        mgpu.utils.warpgroup_barrier()
        pointer = _global_pointer(out)
        for tile in range(m_tiles):
            # Thread t: weight row t % 16, so that neighbours write neighbours, and x row t / 16.
            w_row, x_row = arith.andi(thread, _const(15)), arith.addi(arith.shrui(thread, _const(4)), _const(8 * tile))
            parts = []
            for part in range(4):
                index = arith.addi(arith.muli(arith.addi(w_row, _const(16 * part)), _const(width)), x_row)
                parts.append(llvm.load(f32, mgpu.utils.getelementptr(shared, [index], f32)))
            total = parts[0]
            for value in parts[1:]:
                total = arith.addf(total, value)
            element = arith.addi(arith.muli(x_row, _const(n)), arith.addi(column.registers.item(), w_row))
            wide = arith.extsi(ir.IntegerType.get_signless(64), element)
            address = mgpu.utils.getelementptr(pointer, [wide], ir.IntegerType.get_signless(16))
            address = llvm.ptrtoint(ir.IntegerType.get_signless(64), address)
            keep = arith.extui(_i32(), arith.cmpi(arith.CmpIPredicate.slt, x_row, _const(rows)))
            text = (
                f"{{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; cvt.rn.{kind}.f32 h, $1; "
                "@p st.global.b16 [$0], h; }"
            )
            llvm.inline_asm(None, [address, total, keep], text, "l,f,r", has_side_effects=True)

    store(acc, partial, out, column)
