"""Primitives of the kernel for small M: codes dequantized in registers, as operands of mma.sync."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from qlora_jax.kernels.mosaic import ptx, tiles

# A warpgroup's step: 16 rows of W x 16 groups, each warp its own 4 groups (256 columns).
_WORDS = plgpu.Layout.WG_STRIDED((tiles.WARPGROUP * 16,), vec_size=16)


def _accumulator_layout(m_tiles: int) -> Any:
    return plgpu.Layout.WG_STRIDED((tiles.WARPGROUP * 4 * m_tiles,), vec_size=4 * m_tiles)


def load_codes(weight_format: tiles.WeightFormat, codes: Any, row: Any, column: Any) -> jax.Array:
    """Load the codes of 16 rows x 1024 columns from global memory into registers.

    Beyond the last column the last group is repeated.

    Args:
        weight_format: of the weight.
        codes: ref uint8 [N, K / 2].
        row: first row.
        column: first column, in elements, a multiple of 64.

    Returns:
        int32 [2048]: for each thread the 8 words of its group in row g, then those in row g + 8
        (`ptx.groups_of_fragments`).
    """
    scalar = plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((tiles.WARPGROUP * 16,), jnp.int32, layout=_WORDS)
    row_bytes = weight_format.n_inputs // 2

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=result)
    def read(_: Any, codes: ir.Value, row: Any, column: Any) -> mgpu.FragmentedArray:
        row, column = (value.registers.item() for value in (row, column))
        pointer = ptx.global_pointer(codes)
        words = []
        for group_row, group in ptx.groups_of_fragments(2 * tiles.WARPGROUP, 16):
            first = arith.addi(column, arith.muli(group, ptx.const(tiles.GROUP)))
            first = arith.minsi(first, ptx.const(weight_format.n_inputs - tiles.GROUP))
            # Rows times bytes may pass 2^31.
            wide = ir.IntegerType.get_signless(64)
            offset = arith.muli(arith.extsi(wide, arith.addi(row, group_row)), arith.constant(wide, row_bytes))
            offset = arith.addi(offset, arith.extsi(wide, arith.shrui(first, ptx.const(1))))
            for half in range(2):
                words += ptx.load_global(pointer, arith.addi(offset, arith.constant(wide, 16 * half)))
        return ptx.array([ptx.pack(words, ptx.i32())], _WORDS, signed=True)

    return read(codes, row, column)


def zero_fragments(m_tiles: int) -> jax.Array:
    """Accumulators of `multiply_codes`, zeros: four float32 for each thread and eight rows of x."""
    return plgpu.layout_cast(jnp.zeros(tiles.WARPGROUP * 4 * m_tiles, jnp.float32), _accumulator_layout(m_tiles))


def multiply_codes(
    weight_format: tiles.WeightFormat,
    acc: jax.Array,
    words: jax.Array,
    scales: tuple[jax.Array, ...],
    x: Any,
    column: Any,
) -> jax.Array:
    """Add this warp's part of W x^T to its accumulator, from codes in registers.

    The K order is permuted to match the packed codes; a dot product is invariant to it. In step s, columns 2 c,
    2 c + 1, 2 c + 8 and 2 c + 9 of the instruction's operands are elements 4 s .. 4 s + 3 of group c, in W and x alike.

    Args:
        weight_format: of the weight.
        acc: `zero_fragments`, or the result of the call before.
        words: result of `load_codes`.
        scales: of the same groups, see `scales.finish_scales`.
        x: ref [M, K] in global memory, M <= 8 * m_tiles; rows beyond M and columns beyond K count as zeros.
        column: as in `load_codes`.
    """
    scale_layout = weight_format.scale_layout(2 * tiles.WARPGROUP)
    m_tiles = acc.shape[0] // (tiles.WARPGROUP * 4)
    layout = _accumulator_layout(m_tiles)
    result = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=layout)
    scalar = plgpu.Layout.WG_SPLAT(())
    rows = x.shape[0]
    kind = "bf16" if weight_format.dtype == jnp.bfloat16 else "f16"
    mma_sync = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)

    @plgpu.inline_mgpu(
        arg_types=(layout, _WORDS, plgpu.RefType(), scalar, *[scale_layout] * len(scales)), return_type=result
    )
    def multiply(_: Any, acc: Any, words: Any, x: ir.Value, column: Any, *scales: Any) -> mgpu.FragmentedArray:
        f32 = ir.F32Type.get()
        sums = ptx.unpack(acc.registers[0], 4 * m_tiles)
        codes = ptx.unpack(words.registers[0], 16)
        (x_row, group), _second = ptx.groups_of_fragments(2 * tiles.WARPGROUP, 16)
        first = arith.addi(column.registers.item(), arith.muli(group, ptx.const(tiles.GROUP)))
        within = arith.cmpi(arith.CmpIPredicate.slt, first, ptx.const(weight_format.n_inputs))
        pointer = ptx.global_pointer(x)
        fragments = []
        for tile in range(m_tiles):
            row = arith.addi(x_row, ptx.const(8 * tile))
            keep = arith.andi(within, arith.cmpi(arith.CmpIPredicate.slt, row, ptx.const(rows)))
            keep = arith.extui(ptx.i32(), keep)
            offset = arith.muli(arith.addi(arith.muli(row, ptx.const(weight_format.n_inputs)), first), ptx.const(2))
            fragments.append(
                [ptx.load_global(pointer, arith.addi(offset, ptx.const(16 * i)), keep) for i in range(tiles.GROUP // 8)]
            )
        words_per_scale = 8 // weight_format.scales_per_group
        for i in range(8):
            if i % words_per_scale == 0:
                codebooks = [ptx.codebook_of(weight_format, scales, row, i // words_per_scale) for row in range(2)]
            upper, lower = (ptx.dequantize_word(codes[8 * half + i], codebooks[half]) for half in range(2))
            for pair in range(2):
                a = [upper[2 * pair], lower[2 * pair], upper[2 * pair + 1], lower[2 * pair + 1]]
                for tile in range(m_tiles):
                    b = fragments[tile][i][2 * pair : 2 * pair + 2]
                    c = sums[4 * tile : 4 * tile + 4]
                    sums[4 * tile : 4 * tile + 4] = ptx.asm(mma_sync, [f32] * 4, [*a, *b, *c], constraints)
        return ptx.array([ptx.pack(sums, f32)], layout, signed=None)

    return multiply(acc, words, x, column, *scales)


def store_fragments(acc: jax.Array, partial: Any, out: Any, column: Any) -> None:
    """Add the accumulators of the four warps and write columns column .. column + 15 of the output.

    Args:
        acc: result of `multiply_codes`.
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
        thread = ptx.thread_index()
        shared = mgpu.utils.memref_ptr(partial)
        warp = arith.shrui(thread, ptx.const(5))
        g = arith.andi(arith.shrui(thread, ptx.const(2)), ptx.const(7))
        c = arith.andi(thread, ptx.const(3))
        for tile in range(m_tiles):
            for i in range(4):
                # Accumulator i: row g (+ 8 from the third on), column 2 c + i % 2 ("Matrix Fragments").
                row = arith.addi(g, ptx.const(8 * (i // 2)))
                index = arith.addi(arith.muli(warp, ptx.const(16)), row)
                index = arith.addi(arith.muli(index, ptx.const(width)), arith.muli(c, ptx.const(2)))
                index = arith.addi(index, ptx.const(8 * tile + i % 2))
                value = llvm.extractelement(acc.registers[0], ptx.const(4 * tile + i))
                llvm.store(value, mgpu.utils.getelementptr(shared, [index], f32))
        mgpu.utils.warpgroup_barrier()
        pointer = ptx.global_pointer(out)
        for tile in range(m_tiles):
            # Thread t: weight row t % 16, so that neighbours write neighbours, and x row t / 16.
            w_row, x_row = (
                arith.andi(thread, ptx.const(15)),
                arith.addi(arith.shrui(thread, ptx.const(4)), ptx.const(8 * tile)),
            )
            parts = []
            for part in range(4):
                index = arith.addi(arith.muli(arith.addi(w_row, ptx.const(16 * part)), ptx.const(width)), x_row)
                parts.append(llvm.load(f32, mgpu.utils.getelementptr(shared, [index], f32)))
            total = parts[0]
            for value in parts[1:]:
                total = arith.addf(total, value)
            element = arith.addi(arith.muli(x_row, ptx.const(n)), arith.addi(column.registers.item(), w_row))
            wide = arith.extsi(ir.IntegerType.get_signless(64), element)
            address = mgpu.utils.getelementptr(pointer, [wide], ir.IntegerType.get_signless(16))
            address = llvm.ptrtoint(ir.IntegerType.get_signless(64), address)
            keep = arith.extui(ptx.i32(), arith.cmpi(arith.CmpIPredicate.slt, x_row, ptx.const(rows)))
            text = (
                f"{{ .reg .pred p; .reg .b16 h; setp.ne.b32 p, $2, 0; cvt.rn.{kind}.f32 h, $1; "
                "@p st.global.b16 [$0], h; }"
            )
            llvm.inline_asm(None, [address, total, keep], text, "l,f,r", has_side_effects=True)

    store(acc, partial, out, column)
