"""cp.async and TMA copies."""

import numpy as np
import pytest

from ptx_simulator import PtxError, RaceError, TensorMap
from ptx_simulator.programs import COPY, TMA, addr, go, hopper, ints

pytestmark = pytest.mark.simulator

CPA = "mov.u32 %r9, sm; shl.b32 %r8, %t, 4; add.u32 %r9, %r9, %r8;" + addr(0, 16) + addr(1, 16)
OUT4 = "ld.shared.v4.u32 {%r1,%r2,%r3,%r4}, [%r9]; st.global.v4.u32 [%A1], {%r1,%r2,%r3,%r4};"


def test_cp_async():
    x, o = ints(np.uint32, 128), np.zeros(128, np.uint32)
    go(
        CPA + "cp.async.cg.shared.global [%r9], [%A0], 16; cp.async.commit_group; cp.async.wait_group 0;" + OUT4,
        [x, o],
        smem=512,
    )
    np.testing.assert_array_equal(o, x)
    go(CPA + "cp.async.ca.shared.global [%r9], [%A0], 16, 8; cp.async.wait_all;" + OUT4, [x, o], smem=512)
    np.testing.assert_array_equal(o.reshape(-1, 4), x.reshape(-1, 4) * [1, 1, 0, 0])  # zfill
    for wait in (
        "",
        "cp.async.commit_group;",
        "cp.async.commit_group; cp.async.wait_group 1;",
        "cp.async.wait_group 0;",
    ):
        with pytest.raises(RaceError, match="missing wait"):
            go(CPA + "cp.async.cg.shared.global [%r9], [%A0], 16;" + wait + OUT4, [x, o], smem=512)
    with pytest.raises(RaceError, match="asynchronously"):
        go(CPA + "cp.async.cg.shared.global [%r9], [%A0], 16; st.shared.u32 [%r9], %t;", [x, o], smem=512)
    with pytest.raises(PtxError, match="out of bounds"):
        go(CPA + "cp.async.cg.shared.global [%r9], [%A0+16], 16;", [x, o], smem=512)


@pytest.mark.parametrize("span", [16, 32, 64, 128])
def test_tma_swizzle_and_oob(span):
    """A (32, span/2) box at column/row offset -> chunk c of row r at 16*(c ^ swz(r)); out-of-range reads are 0."""
    cols = span // 2
    g = np.arange(40 * 3 * cols, dtype=np.uint16).reshape(40, 3 * cols)
    o = np.zeros(32 * cols, np.uint16)
    tm = TensorMap(g, g.shape, (3 * cols, 1), (32, cols), span)
    body = TMA.format(
        bytes=32 * span, copies=f"mov.s32 %r5, {cols}; mov.s32 %r6, 16; " + COPY.format(d=1, m=2, x="%r5", y="%r6")
    )
    n = 32 * span // 16
    body += (
        f"setp.ge.u32 %p3, %t, {n}; @%p3 bra Z; shl.b32 %r8, %t, 4; add.u32 %r8, %r8, %r1; "
        f"ld.shared.v4.u32 {{%r11,%r12,%r13,%r14}}, [%r8]; mul.wide.u32 %d5, %t, 16; "
        f"add.s64 %d5, %d5, %P0; st.global.v4.u32 [%d5], {{%r11,%r12,%r13,%r14}}; Z:"
    )
    hopper(body, [tm], o, threads=256)
    want = np.zeros((32, cols), np.uint16)
    want[:24] = g[16:40, cols : 2 * cols]
    got = o.reshape(32, span // 16, 8)
    f = {16: lambda r: 0 * r, 32: lambda r: r // 4 % 2, 64: lambda r: r // 2 % 4, 128: lambda r: r % 8}[span]
    for r in range(32):
        for c in range(span // 16):
            np.testing.assert_array_equal(got[r, c ^ int(f(np.int64(r)))], want[r, 8 * c : 8 * c + 8])


def test_bulk_tensor_store_and_proxy_fence():
    """st.shared -> fence.proxy.async -> barrier -> TMA store; without the fence it is an error."""
    g = np.zeros((16, 64), np.uint16)
    tm = TensorMap(g, g.shape, (64, 1), (16, 64), 128)
    dummy = np.zeros(4, np.uint32)
    body = """mov.u64 %d1, tm; cvta.param.u64 %d2, %d1; mov.u32 %r1, sm; shr.u32 %r3, %t, 3;
and.b32 %r4, %r3, 7; and.b32 %r5, %t, 7; xor.b32 %r4, %r4, %r5;
shl.b32 %r3, %r3, 7; shl.b32 %r4, %r4, 4; add.u32 %r3, %r3, %r4; add.u32 %r3, %r3, %r1;
st.shared.v4.u32 [%r3], {%t,%t,%t,%t}; FENCE bar.sync 0;
setp.ne.u32 %p1, %t, 0; @%p1 bra E; mov.u32 %r9, 0;
cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d2, {%r9, %r9}], [%r1]; cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0; E:"""
    hopper(body.replace("FENCE", "fence.proxy.async.shared::cta;"), [tm], dummy)
    np.testing.assert_array_equal(g.view(np.uint32).reshape(128, 4), np.repeat(np.arange(128), 4).reshape(128, 4))
    with pytest.raises(RaceError, match=r"fence.proxy.async"):
        hopper(body.replace("FENCE", ""), [tm], dummy)
    with pytest.raises(RaceError, match="exited with bulk stores"):
        hopper(
            body.replace("FENCE", "fence.proxy.async.shared::cta;").replace("wait_group.read 0;", "wait_group.read 1;"),
            [tm],
            dummy,
        )


@pytest.mark.parametrize("waits", ["ab", "a", "b"])
def test_tma_copies_complete_in_any_order(waits):
    """Two copies on two mbarriers: that the second is complete says nothing of the first, nor the other way round."""
    g = np.arange(2 * 32 * 64, dtype=np.uint16).reshape(64, 64)
    o = np.zeros((2, 128), np.uint32)
    tm = TensorMap(g, g.shape, (64, 1), (32, 64), 128)
    wait = "{0}: mbarrier.try_wait.parity.shared.b64 %p2, [%r{1}], 0, 1000; @!%p2 bra {0};"
    body = f"""mov.u64 %d1, tm; cvta.param.u64 %d2, %d1; mov.u32 %r1, sm; mov.u32 %r7, 0; mov.u32 %r8, 32;
add.u32 %r2, %r1, 65520; add.u32 %r3, %r1, 65528; add.u32 %r4, %r1, 4096; setp.eq.u32 %p1, %t, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
fence.mbarrier_init.release.cluster; bar.sync 0; @!%p1 bra W;
mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], 4096;
mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r3], 4096;
{COPY.format(d=1, m=2, x="%r7", y="%r7")} {COPY.format(d=4, m=2, x="%r7", y="%r8").replace("[%r2]", "[%r3]")} W:
{wait.format("A", 2) if "a" in waits else ""} {wait.format("B", 3) if "b" in waits else ""}
shl.b32 %r5, %t, 2; add.u32 %r5, %r5, %r1; ld.shared.u32 %r11, [%r5]; ld.shared.u32 %r12, [%r5+4096];
{addr(0, 4)} st.global.u32 [%A0], %r11; st.global.u32 [%A0+512], %r12;"""
    if waits == "ab":
        hopper(body, [tm], o)
        # Row 0 is not swizzled.
        np.testing.assert_array_equal(o[:, :32], np.stack([g[0], g[32]]).view(np.uint32))
    else:
        with pytest.raises(PtxError, match=r"not ordered after write|being written|uninitialised"):
            hopper(body, [tm], o)
