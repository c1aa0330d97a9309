"""The steps of the kernels in machine terms: scales, decoding and multiplying tiles, inside Pallas kernels.

Everything around them is plain Pallas; `reference` has their twins in jax.numpy. `emit` writes the instructions.
"""

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

from qlora_jax.kernels.mosaic import emit, tiles


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
        fragments: the runs lie in threads as `emit.runs_of_fragments` says, not as `emit.runs_of_thread` does.

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
        for run_row, run in (emit.runs_of_fragments if fragments else emit.runs_of_thread)(n_runs, rows):
            first = arith.addi(column, arith.muli(run, emit.const(tiles.RUN)))
            if fragments:
                first = arith.minsi(first, emit.const(decoding.n_inputs - tiles.RUN))
            row_start = arith.muli(arith.addi(row, run_row), emit.const(decoding.n_inputs))
            block = arith.divui(arith.addi(row_start, first), emit.const(decoding.block_size))
            out.append([arith.addi(block, emit.const(i)) for i in range(decoding.scales_per_run)])
        return out

    def read(ref: ir.Value, index: ir.Value, dtype: ir.Type) -> ir.Value:
        return llvm.load(dtype, mgpu.utils.getelementptr(emit.global_pointer(ref), [index], dtype))

    f32, u8 = ir.F32Type.get, functools.partial(ir.IntegerType.get_signless, 8)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=raw)
    def read_absmax(_: Any, ref: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        values = []
        for blocks in indices(row, column):
            if decoding.double_quant:
                values.append([arith.extui(emit.i32(), read(ref, block, u8())) for block in blocks])
            else:
                values.append([arith.bitcast(emit.i32(), read(ref, block, f32())) for block in blocks])
        return emit.array([emit.pack(scales, emit.i32()) for scales in values], layout, signed=True)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=floats)
    def read_nested(_: Any, ref: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        values = [
            [read(ref, arith.shrui(block, emit.const(8)), f32()) for block in blocks] for blocks in indices(row, column)
        ]
        return emit.array([emit.pack(scales, f32()) for scales in values], layout, signed=None)

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
        vectors = []
        for registers in zip(*(array.registers for array in arrays), strict=True):
            scalars = zip(*(emit.unpack(register, decoding.scales_per_run) for register in registers), strict=True)
            vectors.append(emit.pack([function(*operands) for operands in scalars], f32()))
        return emit.array(vectors, layout, signed=None)

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
            return emit.asm(text, [f32()], [entry, nested, offset.registers.item()], "=f,f,f,f")[0]

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
        for j, (row, run) in enumerate(emit.runs_of_thread(n_runs, rows)):
            in_offset = arith.addi(arith.muli(row, emit.const(row_bytes)), arith.muli(run, emit.const(tiles.RUN // 2)))
            words = []
            for half in range(2):
                words += emit.load_shared(
                    source, emit.swizzled(arith.addi(in_offset, emit.const(16 * half)), row_bytes)
                )
            # Subtiles of 8 rows x 64 elements, 1024 bytes, one after another along the row.
            subtile = arith.addi(arith.muli(arith.shrui(row, emit.const(3)), emit.const(columns // tiles.RUN)), run)
            in_subtile = arith.muli(arith.andi(row, emit.const(7)), emit.const(128))
            out_offset = arith.addi(arith.muli(subtile, emit.const(1024)), in_subtile)
            words_per_scale = len(words) // decoding.scales_per_run
            for i, word in enumerate(words):
                if i % words_per_scale == 0:
                    scale = llvm.extractelement(scales.registers[j], emit.const(i // words_per_scale))
                    table = emit.table(scale, decoding.quant_type, decoding.dtype)
                offset = emit.swizzled(arith.addi(out_offset, emit.const(16 * i)), 128)
                emit.store_shared(target, offset, emit.decode_word(word, table))

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
            return cls(decoding, tile, cls._of_layer(absmax, layer), None, None, None, fragments)
        absmax, nested, offset, dynamic_map = refs
        cls._publish(dynamic_map, scratch)
        absmax, nested = cls._of_layer(absmax, layer), cls._of_layer(nested, layer)
        return cls(decoding, tile, absmax, nested, scratch, offset[layer], fragments)

    @staticmethod
    def _of_layer(ref: Any, layer: Any) -> Any:
        return ref.at[layer]

    @staticmethod
    def _publish(dynamic_map: Any, scratch: Any) -> None:
        scratch[...] = plgpu.load(dynamic_map, layout=plgpu.Layout.WG_STRIDED((256,), vec_size=2))

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


def stream_codes(decoding: tiles.Decoding, codes: Any, row: Any, column: Any) -> jax.Array:
    """Read the codes of 16 rows x 1024 columns from global memory into registers; the last run again beyond the edge.

    Args:
        decoding: the weight.
        codes: ref uint8 [N, K / 2].
        row: first row.
        column: first column, in elements, a multiple of 64.

    Returns:
        int32 [2048]: for each thread the 8 words of its run in row g, then those of g + 8 (`emit.runs_of_fragments`).
    """
    scalar = plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((tiles.WARPGROUP * 16,), jnp.int32, layout=_WORDS)
    row_bytes = decoding.n_inputs // 2

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=result)
    def read(_: Any, codes: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        row, column = (value.registers.item() for value in (row, column))
        pointer = emit.global_pointer(codes)
        words = []
        for run_row, run in emit.runs_of_fragments(2 * tiles.WARPGROUP, 16):
            first = arith.addi(column, arith.muli(run, emit.const(tiles.RUN)))
            first = arith.minsi(first, emit.const(decoding.n_inputs - tiles.RUN))
            # Rows times bytes may pass 2^31.
            wide = ir.IntegerType.get_signless(64)
            offset = arith.muli(arith.extsi(wide, arith.addi(row, run_row)), arith.constant(wide, row_bytes))
            offset = arith.addi(offset, arith.extsi(wide, arith.shrui(first, emit.const(1))))
            for half in range(2):
                words += emit.load_global(pointer, arith.addi(offset, arith.constant(wide, 16 * half)))
        return emit.array([emit.pack(words, emit.i32())], _WORDS, signed=True)

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
        sums = emit.unpack(acc.registers[0], 4 * m_tiles)
        codes = emit.unpack(words.registers[0], 16)
        (x_row, run), _other = emit.runs_of_fragments(2 * tiles.WARPGROUP, 16)
        first = arith.addi(column.registers.item(), arith.muli(run, emit.const(tiles.RUN)))
        within = arith.cmpi(arith.CmpIPredicate.slt, first, emit.const(decoding.n_inputs))
        pointer = emit.global_pointer(x)
        fragments = []
        for tile in range(m_tiles):
            row = arith.addi(x_row, emit.const(8 * tile))
            keep = arith.andi(within, arith.cmpi(arith.CmpIPredicate.slt, row, emit.const(rows)))
            keep = arith.extui(emit.i32(), keep)
            offset = arith.muli(arith.addi(arith.muli(row, emit.const(decoding.n_inputs)), first), emit.const(2))
            fragments.append(
                [emit.load_global(pointer, arith.addi(offset, emit.const(16 * i)), keep) for i in range(tiles.RUN // 8)]
            )
        words_per_scale = 8 // decoding.scales_per_run
        for i in range(8):
            if i % words_per_scale == 0:
                scale = [llvm.extractelement(r, emit.const(i // words_per_scale)) for r in scales.registers]
                tables = [emit.table(one, decoding.quant_type, decoding.dtype) for one in scale]
            upper, lower = (emit.decode_word(codes[8 * half + i], tables[half]) for half in range(2))
            for pair in range(2):
                a = [upper[2 * pair], lower[2 * pair], upper[2 * pair + 1], lower[2 * pair + 1]]
                for tile in range(m_tiles):
                    b = fragments[tile][i][2 * pair : 2 * pair + 2]
                    c = sums[4 * tile : 4 * tile + 4]
                    sums[4 * tile : 4 * tile + 4] = emit.asm(mma_sync, [f32] * 4, [*a, *b, *c], constraints)
        return emit.array([emit.pack(sums, f32)], layout, signed=None)

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
        thread = emit.thread_index()
        shared = mgpu.utils.memref_ptr(partial)
        warp = arith.shrui(thread, emit.const(5))
        g = arith.andi(arith.shrui(thread, emit.const(2)), emit.const(7))
        c = arith.andi(thread, emit.const(3))
        for tile in range(m_tiles):
            for i in range(4):
                # Accumulator i: row g (+ 8 from the third on), column 2 c + i % 2 ("Matrix Fragments").
                row = arith.addi(g, emit.const(8 * (i // 2)))
                index = arith.addi(arith.muli(warp, emit.const(16)), row)
                index = arith.addi(arith.muli(index, emit.const(width)), arith.muli(c, emit.const(2)))
                index = arith.addi(index, emit.const(8 * tile + i % 2))
                value = llvm.extractelement(acc.registers[0], emit.const(4 * tile + i))
                llvm.store(value, mgpu.utils.getelementptr(shared, [index], f32))
        mgpu.utils.warpgroup_barrier()
        pointer = emit.global_pointer(out)
        for tile in range(m_tiles):
            # Thread t: weight row t % 16, so that neighbours write neighbours, and x row t / 16.
            w_row, x_row = (
                arith.andi(thread, emit.const(15)),
                arith.addi(arith.shrui(thread, emit.const(4)), emit.const(8 * tile)),
            )
            parts = []
            for part in range(4):
                index = arith.addi(arith.muli(arith.addi(w_row, emit.const(16 * part)), emit.const(width)), x_row)
                parts.append(llvm.load(f32, mgpu.utils.getelementptr(shared, [index], f32)))
            total = parts[0]
            for value in parts[1:]:
                total = arith.addf(total, value)
            element = arith.addi(arith.muli(x_row, emit.const(n)), arith.addi(column.registers.item(), w_row))
            wide = arith.extsi(ir.IntegerType.get_signless(64), element)
            address = mgpu.utils.getelementptr(pointer, [wide], ir.IntegerType.get_signless(16))
            address = llvm.ptrtoint(ir.IntegerType.get_signless(64), address)
            keep = arith.extui(emit.i32(), arith.cmpi(arith.CmpIPredicate.slt, x_row, emit.const(rows)))
            text = (
                f"{{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; cvt.rn.{kind}.f32 h, $1; "
                "@p st.global.b16 [$0], h; }"
            )
            llvm.inline_asm(None, [address, total, keep], text, "l,f,r", has_side_effects=True)

    store(acc, partial, out, column)
