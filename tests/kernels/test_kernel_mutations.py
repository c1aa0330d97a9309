"""Errors put into the kernels' emitted PTX: what compares and executes them must notice.

Each mutation is one that a kernel's author could make: a wrong selector or constant, a wrong address, another
rounding, a missing wait or barrier.
"""

import dataclasses
import re

import numpy as np
import pytest
from fixtures.simulated_kernels import Case, Problem, differences, execute, expected
from ptx_simulator import PtxError, RaceError
from ptx_simulator.programs import nth

pytestmark = pytest.mark.compile

MMA = Case("a6000", "mma", 32, 128, 256)
SMALL_M = Case("a6000", "small_m", 5, 16, 1088)
WGMMA = Case("h100", "wgmma", 128, 128, 640)
TCGEN05 = Case("b200", "tcgen05", 128, 128, 640)
DEQUANTIZE = Case("a6000", "dequantize", 0, 64, 256)
ALL = (MMA, SMALL_M)


def change(pattern, replacement, match=0.0):
    """Changes one match of a pattern: the first, or that at a fraction of all."""

    def mutate(text):
        found = len(re.findall(pattern, text))
        assert found, f"{pattern} does not occur"
        return nth(pattern, replacement, int(match * found))(text)

    return mutate


def drop_barriers(after, before):
    """Removes every bar.sync between the first match of `after` and the next of `before`."""

    def mutate(text):
        start = re.search(after, text).end()
        stop = start + re.search(before, text[start:]).start()
        kept, removed = re.subn(r"bar\.sync[^;]*;", "", text[start:stop])
        assert removed
        return text[:start] + kept + text[stop:]

    return mutate


# name, cases, mutation
CHANGES = [
    # The table: products, rounding, its low and high bytes.
    ("codebook", ALL, change(r"mul\.rn\.f32 (e3, %r\d+), 0f\w+", r"mul.rn.f32 \1, 0fBECB32A1")),
    ("negated scale", ALL, change(r"mul\.rn\.f32 (e9, %r\d+), 0f3", r"mul.rn.f32 \1, 0fB")),
    ("halves", ALL, change(r"cvt\.rn\.bf16x2\.f32 p2, e5, e4", "cvt.rn.bf16x2.f32 p2, e4, e5")),
    ("low bytes", ALL, change("0x6420", "0x6402")),
    ("high bytes", ALL, change("0x7531", "0x7513", 0.5)),
    # The look-up: four codes at a time.
    ("mask", (*ALL, WGMMA, TCGEN05), change("0x77777777", "0x7777777f")),
    ("no mask", ALL, change("0x77777777", "0xffffffff", 0.5)),
    ("choice's bits", ALL, change("0x44444444", "0x4444444c")),
    ("choice's lanes", ALL, change("0x32103210", "0x32103201")),
    ("choice's operation", ALL, change("0xEA", "0xAE", 0.5)),
    ("choice's shift", ALL, change(r"shr\.u32 (choice, %r\d+), 1;", r"shr.u32 \1, 2;")),
    ("second half of a word", ALL, change(r"shr\.u32 codes, codes, 16", "shr.u32 codes, codes, 12")),
    ("first pair", ALL, change("0x4051", "0x4151")),
    ("second pair", ALL, change("0x6273", "0x6237", 0.5)),
    # The scales.
    ("offset's sign", ALL, change(r"add\.rn\.f32 (%r\d+), p,", r"sub.rn.f32 \1, p,")),
    ("nested scale", ALL, change(r"mul\.rn\.f32 p, (%r\d+), (%r\d+)", r"mul.rn.f32 p, \1, \1", 0.5)),
    (
        "next scale",
        (*ALL, WGMMA, TCGEN05),
        change(r"ld\.global\.b8 (\s*%\w+), \[(%rd\d+)\]", r"ld.global.b8 \1, [\2+1]"),
    ),
    ("block of a column", (SMALL_M,), change(r"shr\.u32 (\s*%r\d+, %r\d+, )6;", r"shr.u32 \g<1>5;")),
    ("block of a block", (SMALL_M,), change(r"shr\.u32 (\s*%r\d+, %r\d+, )14;", r"shr.u32 \g<1>13;")),
    # The product.
    ("fragments of B", (MMA, SMALL_M), change(r"(mma\.sync\S+ \{[^}]*\}), \{(%\w+),(%\w+)", r"\1, {\3,\2", 0.5)),
    ("transposed load", (MMA,), change(r"ldmatrix(\S+)x4\.shared", r"ldmatrix\1x4.trans.shared", 0.5)),
    ("fewer columns", (SMALL_M,), change(r"setp\.lt\.u32 (\s*%p\d+, %r\d+, )1088", r"setp.lt.u32 \g<1>1024")),
    ("a warp's sum twice", (SMALL_M,), change(r"(ld\.shared\.b32 \s*%r\d+, \[%rd\d+)\+1024\]", r"\1+512]")),
    # Swizzles: of copied tiles, of decoded ones, of reading.
    ("swizzle's bits", (MMA,), change(r"and\.b32 (\s*%r\d+, %r\d+, )112;", r"and.b32 \g<1>96;")),
    ("swizzle read", (MMA,), change(r"and\.b32 (\s*%r\d+, %r\d+, )28;", r"and.b32 \g<1>12;")),
    ("no swizzle", (MMA,), change(r"xor\.b32 \t?(%r\d+), (%r\d+), (%r\d+);", r"mov.b32 \1, \2;", 0.5)),
]


@pytest.mark.parametrize(
    "case, mutate",
    [pytest.param(case, mutate, id=f"{case.kernel}: {name}") for name, cases, mutate in CHANGES for case in cases],
)
def test_a_wrong_result_is_noticed(case, mutate, launch):
    problem = Problem(case)
    try:
        assert differences(execute(launch, problem, mutate=mutate), expected(problem))
    except PtxError:
        pass


# Mosaic emits more barriers than are needed: all that order the same accesses must go.
ORDERS = [
    ("table of scales", MMA, drop_barriers(r"st\.shared\.v2\.b32[^;]*;", r"ld\.shared\.b32")),
    ("table of scales", SMALL_M, drop_barriers(r"st\.shared\.v2\.b32[^;]*;", r"ld\.shared\.b32")),
    ("partial sums", SMALL_M, drop_barriers(r"mma\.sync(?s:.*)st\.shared[^;]*;", r"ld\.shared")),
    ("copied tile", MMA, drop_barriers(r"cp\.async\.wait_group", r"ld\.shared\.v4")),
    ("decoded tile", MMA, drop_barriers(r"st\.shared\.v4[^;]*;", r"ldmatrix")),
    ("multiplied tile", MMA, drop_barriers(r"ldmatrix", r"cp\.async\.cg")),
    ("copies of a step", MMA, change(r"cp\.async\.wait_group \s*2;", "cp.async.wait_group 3;")),
    ("copies, not waited for", MMA, change(r"cp\.async\.wait_group \s*2;", "")),
    ("last copies", MMA, change(r"cp\.async\.wait_group \s*0;", "")),
    ("copies of no group", MMA, change(r"cp\.async\.commit_group;", "", 0.5)),
    ("last product", WGMMA, change(r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;")),
    ("product before", WGMMA, change(r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;")),
    ("accumulators", WGMMA, change(r"wgmma\.fence\.sync\.aligned;", "")),
    *(("tile's fence", WGMMA, change(r"fence\.proxy\.async\S*;", "", i / 5)) for i in range(5)),
    *(("tile's fence", TCGEN05, change(r"fence\.proxy\.async\S*;", "", i / 2)) for i in range(2)),
    ("accumulators", TCGEN05, change(r"tcgen05\.fence::after_thread_sync;", "", 0.99)),
    *(("last stores", case, change(r"cp\.async\.bulk\.wait_group[^;]*;", "", 0.99)) for case in (WGMMA, TCGEN05)),
]


@pytest.mark.parametrize(
    "case, mutate", [pytest.param(case, mutate, id=f"{case.kernel}: {name}") for name, case, mutate in ORDERS]
)
def test_a_missing_wait_is_noticed(case, mutate, launch):
    with pytest.raises(RaceError):
        execute(launch, Problem(case), mutate=mutate)


def subnormal_products(case):
    """Scales so small that most of the 16 products of a block are subnormal, and x so large that they still count."""
    problem = Problem(case)
    drawn = problem.scales
    problem.scales = dataclasses.replace(
        drawn, nested=drawn.nested * np.float32(2.0**-127), offset=np.zeros_like(drawn.offset)
    )
    problem.x = (problem.x.astype(np.float32) * np.float32(2.0**100)).astype(problem.x.dtype)
    return problem


def cancelling_scales(case):
    """Scales that are exactly zero: the product of code and nested scale is rounded before the offset is added."""
    problem = Problem(case)
    drawn = problem.scales
    drawn.nested[:] = factor = drawn.nested[0, 0]
    product = drawn.table[0, 200] * factor
    assert float(drawn.table[0, 200]) * float(factor) != float(product)  # what a fused multiply-add would leave
    problem.scales = dataclasses.replace(
        drawn, stored=np.full_like(drawn.stored, 200), offset=np.full_like(drawn.offset, -product)
    )
    return problem


FUSED = r"mul\.rn\.f32 p, (\S+), (\S+); add\.rn\.f32 (\S+), p, (\S+);"
ROUNDING = [
    ("flushed products", subnormal_products, r"mul\.rn\.f32 (e\d+),", r"mul.rn.ftz.f32 \1,"),
    ("contracted scales", cancelling_scales, FUSED, r"fma.rn.f32 \3, \1, \2, \4;"),
]


@pytest.mark.parametrize("case", [MMA, SMALL_M, DEQUANTIZE], ids=str)
@pytest.mark.parametrize(
    "make, pattern, replacement", [each[1:] for each in ROUNDING], ids=[each[0] for each in ROUNDING]
)
def test_another_rounding_is_noticed(case, make, pattern, replacement, launch):
    """On random scales these would change nothing, or too little to see."""
    problem = make(case)
    wanted = expected(problem)
    assert not differences(execute(launch, problem), wanted)
    found, changed = re.subn(pattern, replacement, launch.ptx)
    assert changed
    assert differences(execute(launch, problem, mutate=lambda text: found), wanted)


TRY_WAIT = r"mbarrier\.try_wait[^;]*;\s*@P1 bra\.uni DONE;"


# With waits that are implied by others. tcgen05: that of the products for the copies, which the dequantizing warps did.
@pytest.mark.parametrize("case, redundant", [(WGMMA, 0), (TCGEN05, 1)], ids=str)
def test_every_wait_for_a_barrier_is_needed(case, redundant, launch):
    waits = len(re.findall(TRY_WAIT, launch.ptx))
    assert waits >= 6
    unnoticed = []
    for k in range(waits):
        try:
            execute(launch, Problem(case), mutate=nth(TRY_WAIT, "bra.uni DONE;", k))
            unnoticed.append(k)
        except PtxError:
            pass
    assert len(unnoticed) == redundant, unnoticed


@pytest.mark.parametrize("case", [WGMMA, TCGEN05], ids=str)
def test_every_arrival_at_a_barrier_is_needed(case, launch):
    pattern = r"(mbarrier\.arrive\.release|tcgen05\.commit)[^;]*;"
    for k in range(len(re.findall(pattern, launch.ptx))):
        with pytest.raises(PtxError):
            execute(launch, Problem(case), mutate=nth(pattern, "", k))
