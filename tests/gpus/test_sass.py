"""Reading what the compiler made of a Pallas Mosaic GPU kernel."""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fixtures import compile_in_child
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS, compile_for, sass
from qlora_jax.gpus.sass import Counts, dumped_kernels, kernel_report, kernel_reports, kind_of, program_loops

GOLDEN = Path(__file__).parents[1] / "golden" / "sass"
ROWS, COLUMNS, INNER, TILE, STEP = 64, 64, 512, 64, 64


def tiled_product(tensor_cores: str):
    """x @ w in tiles, its loop over INNER a pipeline of copies: with Ampere's mma or with Hopper's wgmma."""
    hopper = tensor_cores == "wgmma"
    transforms = (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(128)) if hopper else ()

    def mma_step(_, x, w, accumulator):
        lhs = plgpu.load(x, layout=plgpu.Layout.MMA_LHS(jnp.bfloat16))
        rhs = plgpu.load(w, layout=plgpu.Layout.MMA_RHS(jnp.bfloat16))
        return plgpu.mma(accumulator, lhs, rhs)

    def product(x, w, out):
        def piped(step, carry=None):
            return plgpu.emit_pipeline(
                step,
                grid=(INNER // STEP,),
                in_specs=[
                    plgpu.BlockSpec((TILE, STEP), lambda k: (0, k), transforms=transforms),
                    plgpu.BlockSpec((STEP, TILE), lambda k: (k, 0), transforms=transforms),
                ],
                max_concurrent_steps=2,
                init_carry=carry,
            )(x, w)

        if hopper:

            def with_accumulator(accumulator):
                def step(_, x, w):
                    plgpu.wgmma(accumulator, x, w)
                    plgpu.wgmma_wait(0)

                piped(step)
                return accumulator[...]

            out[...] = pl.run_scoped(with_accumulator, plgpu.ACC((TILE, TILE), jnp.float32))
        else:
            zeros = jnp.zeros((TILE, TILE), jnp.float32)
            out[...] = piped(mma_step, plgpu.layout_cast(zeros, plgpu.Layout.MMA_ACC(jnp.bfloat16)))

    return plgpu.kernel(product, out_type=jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32))


def compile_and_report(chip: str, tensor_cores: str, directory: str) -> dict[str, Any]:
    """Report of `tiled_product` for a chip, and what another architecture says after it; runs in a child."""
    x, w = jax.ShapeDtypeStruct((ROWS, INNER), jnp.bfloat16), jax.ShapeDtypeStruct((INNER, COLUMNS), jnp.bfloat16)
    with dumped_kernels(Path(directory)):
        compile_for(CHIPS[chip], tiled_product(tensor_cores), x, w)
    report = kernel_report(Path(directory))
    try:
        compile_for(CHIPS["l4"], tiled_product("mma"), x, w)
        refusal = ""
    except UserError as error:
        refusal = str(error)
    return {
        "name": report.name,
        "arch": report.arch,
        "threads": report.threads,
        "registers": report.registers,
        "spills": report.spill_stores + report.spill_loads,
        "shared_bytes": report.shared_bytes,
        "opcodes": report.main_loop.counts.opcodes,
        "tensor": report.main_loop.counts.tensor,
        "alu_per_weight": report.main_loop.counts.alu_per_weight(threads=report.threads, weights=STEP * TILE),
        "refusal": refusal,
    }


def recorded(arch: str) -> str:
    """SASS of `tiled_product`, as this file's last lines wrote it."""
    return (GOLDEN / f"{arch}.sass").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "opcodes"),
    [
        ("tensor", "HMMA.16816.F32.BF16 IMMA HGMMA.64x64x16.F32.BF16 UTCHMMA QGMMA DMMA UTCQMMA"),
        ("alu", "IADD3 LOP3.LUT SHF.R.U32.HI PRMT FMUL FADD FFMA F2FP.BF16.F32.PACK_AB I2F MOV SEL ISETP.NE.AND"),
        ("alu", "IMAD.MOV.U32 LEA HFMA2.MMA HMUL2.BF16 HADD2 CS2R PLOP3 LOP3 MUFU.EX2 I2FP VIADD VOTE FSEL IDP BMSK"),
        (
            "memory",
            "LDS.128 STS LDG.E.128 LDGSTS.E.BYPASS.128 LDSM.16.M88.4 ATOMS RED STG LDC UTMALDG.2D LDTM STTM SHFL",
        ),
        ("control", "BRA EXIT BAR.SYNC SYNCS.PHASECHK.TRANS64.TRYWAIT WARPGROUP.ARRIVE LDGDEPBAR DEPBAR NOP UTCBAR"),
        ("uniform", "UIADD3 ULOP3.LUT UMOV R2UR S2UR VOTEU.ANY USHF UISETP UIMAD"),
    ],
)
def test_what_an_instruction_keeps_busy(kind, opcodes):
    assert {opcode: kind_of(opcode) for opcode in opcodes.split()} == dict.fromkeys(opcodes.split(), kind)


def between(text: str, label: str) -> list[str]:
    """Opcodes from a label to the branch back to it."""
    body = text[text.index(f"{label}:") :]
    body = body[: body.index(f"BRA `({label})") + 3]
    return re.findall(r"\*/ +(?:@\S+ +)?([A-Z]\w*)", body)


def test_ampere_main_loop():
    text = recorded("sm_86")
    loops, main, total = program_loops(text)
    assert [loop.label for loop in loops] == [main.label]
    body = between(text, main.label)
    assert sum(main.counts.opcodes.values()) == len(body)
    for opcode in set(body):
        assert main.counts.opcodes[opcode] == body.count(opcode)
    # 64 x 64 x 64 in products of 16 x 8 x 16 by four warps.
    assert main.counts.tensor == main.counts.opcodes["HMMA"] == 64 * 64 * 64 // (16 * 8 * 16) // 4
    # Both 64 x 64 bfloat16 tiles, 16 bytes a thread and instruction, by 128 threads.
    assert main.counts.opcodes["LDGSTS"] == 2 * 64 * 64 * 2 // 16 // 128
    # The last step stands by itself behind the loop: nothing is left to copy.
    assert total.tensor == 2 * main.counts.tensor
    assert sum(total.opcodes.values()) == len(re.findall(r"/\*[0-9a-f]{4}\*/", text))
    parts = total.alu + total.memory + total.tensor + total.control + total.uniform
    assert parts == sum(total.opcodes.values())


def test_hopper_main_loop_leaves_out_the_waiting():
    text = recorded("sm_90a")
    loops, main, _ = program_loops(text)
    assert main in loops and main.inner_loops == 0
    assert main.counts.opcodes["HGMMA"] == main.counts.tensor == 64 // 16
    # A late tile is waited for in a loop of its own behind the program; the first look and the two arrivals count.
    assert text.count("TRYWAIT") == 2
    assert main.counts.opcodes["SYNCS"] == 1 + 2
    assert [loop.label for loop in loops] == [main.label]


def test_scheduling_codes_make_no_difference():
    text = recorded("sm_86")
    assert re.search(r"^ *\S+:\S+ */\*0010\*/", text, re.MULTILINE)
    plain = re.sub(r"^ *[-\d&]+:[-\d]:[-\d]:\S+ */\*", "/*", text, flags=re.MULTILINE)
    assert plain != text
    assert program_loops(plain) == program_loops(text)


def listing(*lines: str) -> str:
    """A program as nvdisasm prints it; a line that ends with a colon is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * number:04x}*/                   {line} ;"
        for number, line in enumerate(lines)
    )


NESTED = listing(
    "MOV R1, R2",
    ".L_x_0:",
    "IADD3 R1, R1, 0x1, RZ",
    "@!P0 BRA `(.L_x_7)",
    ".L_x_8:",
    "LDS R4, [R1]",
    ".L_x_1:",
    "PRMT R4, R4, R5, R6",
    "FMUL R4, R4, R4",
    "@P1 BRA `(.L_x_1)",
    "HMMA.16816.F32 R8, R4, R6, R8",
    "@P2 BRA `(.L_x_0)",
    ".L_x_2:",
    "STG.E [R2], R8",
    "@P2 BRA `(.L_x_2)",
    "EXIT",
    # Cold: runs when a barrier is late, and jumps back.
    ".L_x_7:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3], R2",
    "@!P0 BRA `(.L_x_7)",
    "BRA `(.L_x_8)",
    ".L_x_9:",
    "BRA `(.L_x_9)",
)


def test_loops_within_loops():
    loops, main, total = program_loops(NESTED)
    assert [(loop.label, loop.inner_loops) for loop in loops] == [(".L_x_0", 1), (".L_x_1", 0), (".L_x_2", 0)]
    assert main is loops[0]
    opcodes = {"IADD3": 1, "BRA": 4, "LDS": 1, "PRMT": 1, "FMUL": 1, "HMMA": 1}
    assert main.counts == Counts(alu=3, memory=1, tensor=1, control=4, uniform=0, opcodes=opcodes)
    assert main.counts.alu_per_weight(threads=128, weights=256) == 1.5
    assert total.opcodes["BRA"] == 7


def test_without_tensor_instructions_the_loop_with_most_loads_is_the_main_one():
    copy = ("LDG.E R1, [R2]", "STG.E [R4], R1", "@P0 BRA `(.L_x_0)")
    longer = ("LDS R1, [R2]", "LDS R2, [R4]", "STG.E [R4], R1", "@P0 BRA `(.L_x_1)")
    loops, main, _ = program_loops(listing(".L_x_0:", *copy, ".L_x_1:", *longer, "EXIT"))
    assert (len(loops), main.label) == (2, ".L_x_1")
    lone, main, total = program_loops(listing("LDG.E R1, [R2]", "@!PT LDS RZ, [RZ]", "EXIT"))
    assert lone == () and main is None
    assert (total.memory, total.control) == (1, 2)


def test_a_branch_may_have_its_condition_for_an_operand():
    _, main, _ = program_loops(
        listing(".L_x_0:", "LDS R1, [R2]", "BRA.U UP0, `(.L_x_0)", "HMMA R1, R2, R3, R1", "EXIT")
    )
    assert main.counts.opcodes == {"LDS": 1, "BRA": 1}


PTXAS = """\
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to spills
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'product_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for product_mosaic_gpu_kernel
    784 bytes stack frame, 784 bytes spill stores, 800 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 784 bytes cumulative stack size
"""
PASSES = """\
    %c1 = arith.constant 1 : index loc(#loc3)
    %threads_2 = arith.constant 384 : index
    %c114752_i32 = arith.constant 114752 : i32 loc(#loc3)
    %9 = gpu.launch async [%1] blocks(%a, %b, %c) in (%d = %c1, %e = %c1, %f = %c1) threads(%g, %h, %i) in \
(%j = %threads_2, %k = %c1, %l = %c1) dynamic_shared_memory_size %c114752_i32 {
"""


def test_report_of_a_kernel_that_spills(tmp_path):
    (tmp_path / "product_0.ptxas").write_text(PTXAS)
    (tmp_path / "product_0.mlir-passes.log").write_text(PASSES)
    (tmp_path / "product_0.sass_ctrl").write_text(recorded("sm_90a"))
    report = kernel_report(tmp_path)
    assert (report.name, report.arch) == ("product", "sm_90a")
    assert (report.threads, report.shared_bytes, report.registers) == (384, 114752, 255)
    assert (report.spill_stores, report.spill_loads) == (784, 800)
    assert report.serialized and report.warnings[0].startswith("(C7511) Potential")
    assert report.main_loop in report.loops


def test_dumps_that_cannot_be_read_are_told_by_name(tmp_path):
    assert kernel_reports(tmp_path) == []
    with pytest.raises(UserError, match=r"should hold one kernel's dump and holds 0: none\."):
        kernel_report(tmp_path)
    (tmp_path / "product_0.ptxas").write_text("killed")
    with pytest.raises(UserError, match=r"product_0\.mlir-passes\.log is missing"):
        kernel_report(tmp_path)
    (tmp_path / "product_0.mlir-passes.log").write_text("")
    (tmp_path / "product_0.sass_ctrl").write_text("")
    with pytest.raises(UserError, match=r"product_0\.ptxas is not what ptxas prints"):
        kernel_report(tmp_path)
    (tmp_path / "product_0.ptxas").write_text(PTXAS)
    with pytest.raises(UserError, match=r"product_0\.mlir-passes\.log shows no kernel launch"):
        kernel_report(tmp_path)


def test_dumping_needs_the_disassembler_and_leaves_the_environment_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(sass, "_nvdisasm", lambda: Path("/cuda/bin/nvdisasm"))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", "elsewhere")
    with dumped_kernels(tmp_path / "dump"):
        assert os.environ["MOSAIC_GPU_CUDA_ROOT"] == "/cuda"
        assert os.environ["MOSAIC_GPU_DUMP_TO"] == str(tmp_path / "dump")
    assert os.environ["MOSAIC_GPU_DUMP_TO"] == "elsewhere"
    assert os.environ.get("MOSAIC_GPU_CUDA_ROOT") != "/cuda"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(UserError, match=r"needs NVIDIA's nvdisasm: pip install .*\[plan\]'\.$"),
        dumped_kernels(tmp_path),
    ):
        pass


@pytest.mark.compile
@pytest.mark.parametrize(("chip", "tensor_cores", "products"), [("a6000", "mma", 32), ("h100", "wgmma", 4)])
def test_a_kernel_compiled_here(chip, tensor_cores, products, tmp_path):
    report = compile_in_child.call("test_sass:compile_and_report", chip, tensor_cores, str(tmp_path))
    assert (report["name"], report["arch"]) == ("product", CHIPS[chip].arch)
    assert report["threads"] == 128
    assert 0 < report["registers"] <= 255 and report["spills"] == 0
    # Two 64 x 64 bfloat16 tiles in each of two steps, and their barriers.
    assert 2 * 2 * 64 * 64 * 2 <= report["shared_bytes"] <= CHIPS[chip].shared_memory_bytes
    assert report["tensor"] == products
    assert 0 < report["alu_per_weight"] < 4
    # The compiler would assemble this one for the first kernel's architecture.
    assert report["refusal"].startswith(f"This process has compiled Pallas kernels for {CHIPS[chip].arch}")


if __name__ == "__main__":
    # Writes what the tests read: PYTHONPATH=tests JAX_PLATFORMS=cpu python tests/gpus/test_sass.py CHIP mma|wgmma
    with tempfile.TemporaryDirectory() as scratch:
        summary = compile_and_report(sys.argv[1], sys.argv[2], scratch)
        GOLDEN.mkdir(parents=True, exist_ok=True)
        dumped = next(Path(scratch).glob("*.sass_ctrl")).read_text(encoding="utf-8")
        lines = (re.sub(r" {2,}", " ", line).rstrip() for line in dumped.splitlines())
        (GOLDEN / f"{summary['arch']}.sass").write_text("\n".join(filter(None, lines)) + "\n", encoding="utf-8")
        print(summary)
