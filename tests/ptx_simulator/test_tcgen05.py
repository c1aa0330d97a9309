"""Blackwell's tensor memory and tcgen05: kernels as Mosaic GPU compiled them, mutations of them, and small programs.

The README describes the kernels; their source is data/b200_kernels.py.
"""

import numpy as np
import pytest

from ptx_simulator import PtxError, RaceError, mosaic_args
from ptx_simulator.programs import BF, DATA, FAULTS, RNG, agrees, go, nth

pytestmark = pytest.mark.simulator

WIDTHS = dict(
    b200_b_k_major=128,
    b200_b_n_major=128,
    b200_transposed_a_swizzle_64=128,
    b200_a_in_tensor_memory=128,
    b200_warp_specialized=256,
)


def execute(name, mutate=lambda text: text, dtype=BF, **kw):
    launch = mosaic_args(DATA / name)
    launch.ptx = mutate(launch.ptx)
    a = RNG.standard_normal((128, 256)).astype(dtype)
    b = RNG.standard_normal((256, WIDTHS[name])).astype(dtype)
    out = np.full((128, WIDTHS[name]), np.nan, BF)
    stored_a = np.ascontiguousarray(a.T) if name == "b200_transposed_a_swizzle_64" else a
    stored_b = np.ascontiguousarray(b.T) if name in ("b200_b_k_major", "b200_a_in_tensor_memory") else b
    launch.run([stored_a, stored_b, out], **kw)
    a, b = a.astype(np.float64), b.astype(np.float64)
    return out.astype(np.float64), a @ b, np.abs(a) @ np.abs(b)


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("kw", [{}, dict(reverse=True), dict(warps_per_bundle=4)])
def test_kernel(name, kw):
    assert agrees(*execute(name, **kw))


def test_float16():
    """The same kernel with the two types in its instruction descriptor changed from bfloat16 to float16."""

    def mutate(text):
        assert text.count("136316048") == 4
        return text.replace("136316048", str(136316048 - (1 << 7) - (1 << 10)))

    assert agrees(*execute("b200_b_k_major", mutate, np.float16))


WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, \[%r\d+\], %r\d+, %r\d+; \s*@P1 bra"
AFTER = r"tcgen05\.fence::after_thread_sync;"


@pytest.mark.parametrize(
    "name,pattern,repl,k,error",
    [
        ("b200_b_k_major", WAIT, "bra", 0, "read of"),  # does not wait for TMA: operands in flight
        ("b200_b_k_major", WAIT, "bra", 1, "being read asynchronously"),  # TMA into operands of a product
        ("b200_b_k_major", WAIT, "bra", 7, "being written asynchronously"),  # reads a product in flight
        ("b200_b_k_major", AFTER, "", 3, "after_thread_sync"),
        ("b200_b_k_major", r"tcgen05\.commit[^;]*;", "", 3, "deadlock"),
        (
            "b200_b_k_major",
            r"(tcgen05\.commit\S+\s+\[__dynamic_shmem__0\+)65544",
            r"\g<1>65536",
            0,
            "arrivals|deadlock|read",
        ),
        ("b200_b_k_major", r"fence\.proxy\.async\.shared::cta;", "", 0, "fence.proxy.async"),
        ("b200_b_k_major", r"mov\.b32 (\s*%r16, )128;", r"mov.b32 \g<1>64;", 0, "outside an allocation|columns"),
        ("b200_b_k_major", r"tcgen05\.dealloc[^;]*;", "", 0, "without tcgen05.dealloc"),
        ("b200_b_k_major", r"mov\.pred (\s*%p11, )0;", r"mov.pred \g<1>-1;", 0, "uninitialised tensor memory"),
        ("b200_b_k_major", r"mov\.pred (\s*%p12, )-1;", r"mov.pred \g<1>0;", 0, None),
        (
            "b200_b_k_major",
            r"b_desc_low, 1073741888",
            "b_desc_low, 1073741952",
            2,
            "uninitialised shared",
        ),  # stride of B's groups of 8 rows
        ("b200_b_k_major", r"b_desc_low, 1073741888", "b_desc_low, -2147483584", 2, None),  # 64-byte swizzle
        ("b200_b_k_major", r"add\.s32 a_desc_low, (%r\d+), 4;", r"add.s32 a_desc_low, \1, 6;", 1, None),
        ("b200_b_n_major", r"136\d+;", "136316048;", 0, "uninitialised shared"),  # B taken for K-major
        ("b200_a_in_tensor_memory", r"tcgen05\.wait::st\.sync\.aligned;", "", 0, "being written asynchronously"),
        ("b200_a_in_tensor_memory", r"(wait::st\.sync\.aligned;[^;]*)bar\.sync[^;]*;", r"\1", 0, "race|uninitialised"),
        ("b200_a_in_tensor_memory", r"tcgen05\.st[^;]*;", "", 0, "uninitialised"),
        ("b200_a_in_tensor_memory", r"add\.s32 a_desc_low, (%r\d+), 8;", r"add.s32 a_desc_low, \1, 4;", 1, None),
        ("b200_a_in_tensor_memory", r"16x128b", "16x256b", 0, "operands"),
        ("b200_warp_specialized", r"tcgen05\.wait::ld\.sync\.aligned;", "", 0, "being read asynchronously"),
        ("b200_warp_specialized", WAIT, "bra", 0, "race|being read|more arrivals"),  # accumulator still being read
        ("b200_warp_specialized", WAIT, "bra", 1, "read of"),
        ("b200_warp_specialized", WAIT, "bra", 2, "read of uninitialised|being written"),
        ("b200_warp_specialized", WAIT, "bra", 3, "noComplete|asynchronously"),
        ("b200_warp_specialized", r"mov\.b32 (\s*%r254, )3;", r"mov.b32 \g<1>4;", 0, "noComplete|arrivals"),
        ("b200_warp_specialized", r"tcgen05\.commit[^;]*;", "", 0, "deadlock"),
    ],
)
def test_mutation_is_caught(name, pattern, repl, k, error):
    """By an error where one is named, else by a wrong result."""
    if error:
        with pytest.raises(FAULTS, match=error):
            execute(name, nth(pattern, repl, k))
    else:
        assert not agrees(*execute(name, nth(pattern, repl, k)))


ALLOC = """mov.u32 %r1, sm; setp.ge.u32 %p1, %t, 32; @%p1 bra A;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64;
tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned; A: bar.sync 0; ld.shared.u32 %r2, [%r1];
"""
DEALLOC = "bar.sync 0; @%p1 bra Z; tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 64; Z:"
WAIT_LD, WAIT_ST = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"
REGISTERS = {"32x32b": 1, "16x128b": 2, "16x256b": 4}


def registers(first, n):
    return "{" + ",".join(f"%r{first + i}" for i in range(n)) + "}"


def numbered(columns):
    """Tensor memory filled with 512 * lane + column."""
    body = "".join(f"mad.lo.u32 %r{20 + i}, %t, 512, {i};" for i in range(columns))
    return body + f"tcgen05.st.sync.aligned.32x32b.x{columns}.b32 [%r2], {registers(20, columns)}; {WAIT_ST}"


@pytest.mark.parametrize(
    "shape,half", [("32x32b", 0), ("16x128b", 0), ("16x128b", 16), ("16x256b", 0), ("16x256b", 16)]
)
@pytest.mark.parametrize("num", [1, 2, 4])
def test_fragments(shape, num, half):
    """Cell by cell: where each register of each thread comes from; and a store of the same shape is the inverse."""
    k = REGISTERS[shape] * num
    out = np.zeros((128, k), np.uint32)
    back = np.zeros((128, k), np.uint32)
    move = f"add.u32 %r3, %r2, {half << 16};"
    move += f"tcgen05.ld.sync.aligned.{shape}.x{num}.b32 {registers(60, k)}, [%r3]; {WAIT_LD}"
    move += f"add.u32 %r4, %r3, 32; tcgen05.st.sync.aligned.{shape}.x{num}.b32 [%r4], {registers(60, k)}; {WAIT_ST}"
    move += f"tcgen05.ld.sync.aligned.{shape}.x{num}.b32 {registers(76, k)}, [%r4]; {WAIT_LD}"
    for j, first in ((0, 60), (1, 76)):
        move += f"mul.wide.u32 %A{j}, %t, {4 * k}; add.s64 %A{j}, %A{j}, %P{j};"
        move += "".join(f"st.global.u32 [%A{j}+{4 * i}], %r{first + i};" for i in range(k))
    go(ALLOC + numbered(32) + move + DEALLOC, [out, back], 128, 16)
    for thread in range(128):
        warp, t = divmod(thread, 32)
        for i in range(k):
            tile, r = divmod(i, REGISTERS[shape])
            lane, column = {
                "32x32b": (t, tile),
                "16x128b": (t // 4 + 8 * r, 4 * tile + t % 4),
                "16x256b": (t // 4 + 8 * (r // 2), 8 * tile + t % 4 * 2 + r % 2),
            }[shape]
            assert out[thread, i] == 512 * (32 * warp + half + lane) + column
    np.testing.assert_array_equal(back, out)


LD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r20}, [%r2];"
ST = "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r2], {%r1};"


@pytest.mark.parametrize(
    "body,error,match",
    [
        ("mov.u32 %r2, 0;" + LD, PtxError, "tensor memory is used before"),
        (ALLOC + LD + DEALLOC, PtxError, "uninitialised tensor memory"),
        (ALLOC + ST + LD + DEALLOC, RaceError, "being written asynchronously"),
        (ALLOC + ST + WAIT_ST + LD + ST + WAIT_ST + DEALLOC, RaceError, "being read asynchronously"),
        (ALLOC + ST + DEALLOC, RaceError, "being written asynchronously"),
        (ALLOC + ST + WAIT_ST + DEALLOC.replace("bar.sync 0;", ""), RaceError, "not ordered after"),
        (ALLOC + ST + WAIT_ST, PtxError, "without tcgen05.dealloc"),
        (ALLOC + "add.u32 %r2, %r2, 64;" + ST + DEALLOC, PtxError, "outside an allocation"),
        (ALLOC + "add.u32 %r2, %r2, 0x200000;" + ST + DEALLOC, PtxError, "cannot reach lane 32"),
        (ALLOC + "add.u32 %r2, %r2, %t;" + ST + DEALLOC, PtxError, "differs between lanes"),
        (ALLOC + DEALLOC.replace("64", "32"), PtxError, "not allocated so"),
        (ALLOC.replace(" 64;", " 48;"), PtxError, "power of two"),
        (
            ALLOC + "@%p1 bra B; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32; B:",
            PtxError,
            "permit",
        ),
        (ALLOC.replace("bar.sync 0;", "") + DEALLOC, PtxError, "uninitialised|race"),
    ],
)
def test_faults(body, error, match):
    with pytest.raises(error, match=match):
        go(body, [np.zeros(4, np.uint32)], 128, 16)


def test_load_need_not_be_awaited_before_its_registers_are_used():
    out = np.zeros(128, np.uint32)
    use = "mul.wide.u32 %A0, %t, 4; add.s64 %A0, %A0, %P0; st.global.u32 [%A0], %r20;"
    go(ALLOC + ST.replace("%r1}", "%t}") + WAIT_ST + LD + use + DEALLOC, [out], 128, 16)
    np.testing.assert_array_equal(out, np.arange(128))


def test_allocation_reuses_what_was_freed():
    """Four allocations of 128 columns fill tensor memory; after one is freed there is room for another."""
    alloc = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 128; ld.shared.u32 %r{}, [%r1];"
    free = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r{}, 128;"
    fill = "mov.u32 %r1, sm;" + "".join(alloc.format(2 + i) for i in range(4))
    out = np.zeros(32, np.uint32)
    store = "mul.wide.u32 %A0, %t, 4; add.s64 %A0, %A0, %P0; st.global.u32 [%A0], %r7;"
    rest = "".join(free.format(i) for i in (2, 3, 5, 7))
    go(fill + free.format(4) + alloc.format(7) + store + rest, [out], 32, 16)
    np.testing.assert_array_equal(out, 256)
    with pytest.raises(PtxError, match="wait for ever"):
        go(fill + alloc.format(7), [out], 32, 16)
