"""PTX of one thread: loads, stores, the dequantization of eight codes, and the assignment of codes to threads.

A thread dequantizes groups of 64 codes, one block of the default size:

    table[c] = bf16(float32 codebook[c] * float32 scale)      16 FMUL, 8 CVT, 8 PRMT that part high and low bytes
    value    = table[code]                                    byte permutes (PRMT), four codes at a time

A PRMT selects four of eight bytes by the four low nibbles of a register, and packed codes *are* nibbles: the word as
it lies in memory is the selector. Entries 0-7 and 8-15 are looked up apart and a third PRMT chooses between them by the
top bits of the codes: 21 instructions for 8 codes. Each product is rounded once, as bitsandbytes rounds it. A minimum
turns the 16 FMUL into 16 FFMA; blocks of 32 have two tables a group, half an instruction more for each weight, and
blocks of 16 four.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from qlora_jax.kernels.mosaic import tiles
from qlora_jax.quantization.codebooks import TABLES


def i32() -> ir.Type:
    """32-bit integers: words and indices."""
    return ir.IntegerType.get_signless(32)


def const(value: int) -> ir.Value:
    """A constant of 32 bits, given signed or unsigned."""
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), value - (1 << 32) if value >= 1 << 31 else value))


def thread_index() -> ir.Value:
    """Index of this thread within its warpgroup, 0 .. 127."""
    return arith.andi(arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x)), const(tiles.WARPGROUP - 1))


def asm(text: str, results: list[ir.Type], operands: list[ir.Value], constraints: str) -> list[ir.Value]:
    """Inline PTX without side effects, $0 ... its results and then its operands; `constraints` as LLVM writes them."""
    if len(results) == 1:
        return [llvm.inline_asm(results[0], operands, text, constraints, has_side_effects=False)]
    struct = llvm.StructType.get_literal(results)
    value = llvm.inline_asm(struct, operands, text, constraints, has_side_effects=False)
    return [llvm.extractvalue(result, value, [i]) for i, result in enumerate(results)]


def scaled_codebook(scale: ir.Value, minimum: ir.Value | None, quant_type: str, dtype: Any) -> list[ir.Value]:
    """Codebook times scale, plus a minimum: 16 values of 16 bits.

    As eight registers: low bytes of entries 0-3 ... 12-15, then high. One asm block, so that nothing contracts,
    reorders or flushes the products. With a minimum they are exact (`quantization.FORMATS`), so that fusing rounds as
    often.
    """
    kind = "bf16x2" if jnp.dtype(dtype) == jnp.bfloat16 else "f16x2"
    lines = ["{ .reg .f32 e<16>; .reg .b32 p<8>;"]
    for i, bits in enumerate(TABLES[quant_type].view(np.uint32)):
        product = f"$8, 0f{bits:08X}"
        lines.append(f"mul.rn.f32 e{i}, {product};" if minimum is None else f"fma.rn.f32 e{i}, {product}, $9;")
    for i in range(8):
        lines.append(f"cvt.rn.{kind}.f32 p{i}, e{2 * i + 1}, e{2 * i};")
    for i in range(4):
        lines.append(f"prmt.b32 ${i}, p{2 * i}, p{2 * i + 1}, 0x6420;")
        lines.append(f"prmt.b32 ${4 + i}, p{2 * i}, p{2 * i + 1}, 0x7531;")
    operands = [scale] if minimum is None else [scale, minimum]
    # Outputs are written before the last input is read: "early clobber".
    return asm(" ".join([*lines, "}"]), [i32()] * 8, operands, ",".join(["=&r"] * 8 + ["f"] * len(operands)))


def codebook_of(weight_format: tiles.WeightFormat, scales: Sequence[Any], register: int, index: int) -> list[ir.Value]:
    """Build the table of a block, whose scale and minimum are element `index` of a register of the arrays `scales`."""
    scale, *minimum = (llvm.extractelement(each.registers[register], const(index)) for each in scales)
    return scaled_codebook(scale, minimum[0] if minimum else None, weight_format.quant_type, weight_format.dtype)


_LOOK_UP = """{{ .reg .b32 la, lb, ha, hb, l, h;
prmt.b32 la, $4, $5, {codes}; prmt.b32 lb, $6, $7, {codes};
prmt.b32 ha, $8, $9, {codes}; prmt.b32 hb, $10, $11, {codes};
prmt.b32 l, la, lb, {choice}; prmt.b32 h, ha, hb, {choice};
prmt.b32 ${first}, l, h, 0x4051; prmt.b32 ${second}, l, h, 0x6273; }}"""
_DEQUANTIZE = " ".join(
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


def dequantize_word(word: ir.Value, codebook: list[ir.Value]) -> list[ir.Value]:
    """Four registers of two 16-bit weights each, from eight codes in bitsandbytes' order (even element high)."""
    return asm(_DEQUANTIZE, [i32()] * 4, [*codebook, word], ",".join(["=&r"] * 4 + ["r"] * 9))


def load_shared(pointer: ir.Value, offset: ir.Value) -> list[ir.Value]:
    """Sixteen bytes of shared memory as four words."""
    return unpack(llvm.load(ir.VectorType.get((4,), i32()), byte_pointer(pointer, offset), alignment=16), 4)


def store_shared(pointer: ir.Value, offset: ir.Value, words: list[ir.Value]) -> None:
    """Write four words to shared memory."""
    llvm.store(pack(words, i32()), byte_pointer(pointer, offset), alignment=16)


def byte_pointer(pointer: ir.Value, offset: ir.Value) -> ir.Value:
    """Add `offset` bytes to a pointer."""
    return mgpu.utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def swizzled(offset: ir.Value, row_bytes: int) -> ir.Value:
    """`tiles.swizzled` for an offset in a register."""
    chunk = arith.andi(arith.shrui(offset, const(3)), const(row_bytes - 16))
    return arith.xori(offset, chunk)


def groups_of_thread(n_groups: int, rows: int) -> list[tuple[ir.Value, ir.Value]]:
    """(row, group within it) of each group this thread dequantizes: neighbouring threads take neighbouring rows."""
    thread = thread_index()
    out = []
    for j in range(n_groups // tiles.WARPGROUP):
        group = arith.addi(thread, const(j * tiles.WARPGROUP))
        out.append((arith.remui(group, const(rows)), arith.divui(group, const(rows))))
    return out


def groups_of_fragments(n_groups: int, rows: int) -> list[tuple[ir.Value, ir.Value]]:
    """(row, group) of the two groups of this thread in a tile of 16 rows x 16 groups, 4 groups per warp.

    Lane 4 g + c holds group c of rows g and g + 8, as an operand of mma.sync holds its columns (PTX ISA, "Matrix
    Fragments for mma.m16n8k16").
    """
    if (n_groups, rows) != (2 * tiles.WARPGROUP, 16):
        raise ValueError(f"fragments are of 16 rows and 16 groups, not {rows} and {n_groups // rows}.")
    thread = thread_index()
    row = arith.andi(arith.shrui(thread, const(2)), const(7))
    group = arith.addi(arith.muli(arith.shrui(thread, const(5)), const(4)), arith.andi(thread, const(3)))
    return [(row, group), (arith.addi(row, const(8)), group)]


def load_global(pointer: ir.Value, offset: ir.Value, keep: ir.Value | None = None) -> list[ir.Value]:
    """Sixteen bytes of global memory as four words; zeros, and no access, where `keep` is 0."""
    address = llvm.ptrtoint(ir.IntegerType.get_signless(64), byte_pointer(pointer, offset))
    if keep is None:
        text, operands, constraints = "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", [address], "l"
    else:
        text = (
            "{ .reg .pred p; setp.ne.b32 p, $5, 0; "
            "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
            "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }"
        )
        operands, constraints = [address, keep], "l,r"
    return asm(text, [i32()] * 4, operands, "=&r,=&r,=&r,=&r," + constraints)


def global_pointer(ref: ir.Value) -> ir.Value:
    """Pointer to the first byte of a ref in global memory."""
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(ref))


def pack(values: Sequence[ir.Value], dtype: ir.Type) -> ir.Value:
    """A vector of scalars."""
    vector = llvm.mlir_undef(ir.VectorType.get((len(values),), dtype))
    for i, value in enumerate(values):
        vector = llvm.insertelement(vector, value, const(i))
    return vector


def unpack(vector: ir.Value, size: int) -> list[ir.Value]:
    """The scalars of a vector."""
    return [llvm.extractelement(vector, const(i)) for i in range(size)]


def array(vectors: Sequence[ir.Value], layout: Any, *, signed: bool | None) -> mgpu.FragmentedArray:
    """Build an array in a WG_STRIDED layout from the vectors that this thread holds of it, one for each register."""
    registers = np.empty(len(vectors), object)
    for i, vector in enumerate(vectors):
        registers[i] = vector
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=signed)
