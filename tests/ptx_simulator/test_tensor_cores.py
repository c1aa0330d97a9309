"""ldmatrix, mma and wgmma."""

import numpy as np
import pytest

from ptx_simulator import PtxError, TensorMap
from ptx_simulator.programs import BF, COPY, RNG, TMA, addr, go, hopper, ints

pytestmark = pytest.mark.simulator


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_stmatrix(n, trans):
    x = ints(np.uint16, 8 * 8 * n)
    o = np.zeros((32, 4), np.uint32)
    regs = ", ".join(f"%r{i + 1}" for i in range(n))
    lane = "mov.u32 %r9, sm; shl.b32 %r8, %t, 4; add.u32 %r9, %r9, %r8;"
    fill = (
        lane
        + f"setp.ge.u32 %p1, %t, {8 * n}; @%p1 bra S;"
        + addr(0, 16)
        + "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%A0]; st.shared.v4.u32 [%r9], {%r1,%r2,%r3,%r4}; S: bar.sync 0;"
    )
    ld = f"ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {{{regs}}}, [%r9];"
    go(
        fill
        + "mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0; mov.u32 %r4, 0;"
        + ld
        + addr(1, 16)
        + "st.global.v4.u32 [%A1], {%r1,%r2,%r3,%r4};",
        [x, o],
        smem=512,
    )
    m = x.reshape(n, 8, 8)
    m = m.transpose(0, 2, 1) if trans else m
    want = np.zeros((32, 4), np.uint32)
    for t in range(32):
        for i in range(n):
            want[t, i] = int(m[i, t // 4, t % 4 * 2]) | int(m[i, t // 4, t % 4 * 2 + 1]) << 16
    np.testing.assert_array_equal(o, want)
    back = np.zeros(64 * n, np.uint16)  # stmatrix is the inverse
    go(
        fill
        + ld
        + (
            f"add.u32 %r10, %r9, 512; stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%r10], {{{regs}}}; "
            "bar.sync 0; @%p1 bra Z;"
        )
        + addr(1, 16)
        + "ld.shared.v4.u32 {%r1,%r2,%r3,%r4}, [%r10]; st.global.v4.u32 [%A1], {%r1,%r2,%r3,%r4}; Z:",
        [x, back],
        smem=1024,
    )
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("ty,dt", [("bf16", BF), ("f16", np.float16)])
@pytest.mark.parametrize("k", [16, 8])
def test_mma_fragments(ty, dt, k):
    """A, B, C, D moved element by element following the fragment formulas of the PTX ISA."""
    a, b = RNG.integers(-8, 8, (16, k)).astype(dt), RNG.integers(-8, 8, (k, 8)).astype(dt)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    d = np.zeros((16, 8), np.float32)
    body = "shr.u32 %r1, %t, 2; and.b32 %r2, %t, 3;"  # groupID, threadID_in_group
    for i in range(k // 2):  # a_i: row g + 8*(i in odd pair), col 2t + (i&1) + 8*(i>=4)
        body += (
            f"add.u32 %r3, %r1, {8 if i // 2 % 2 else 0}; shl.b32 %r4, %r2, 1; "
            f"add.u32 %r4, %r4, {(i & 1) + (8 if i >= 4 else 0)}; mad.lo.u32 %r5, %r3, {k}, %r4; "
            f"mul.wide.u32 %d1, %r5, 2; add.s64 %d1, %d1, %P0; ld.global.b16 %h{i}, [%d1];\n"
        )
    for i in range(k // 4):  # b_i: row 2t + (i&1) + 8*(i>=2), col g
        body += (
            f"shl.b32 %r4, %r2, 1; add.u32 %r4, %r4, {(i & 1) + (8 if i >= 2 else 0)}; "
            "mad.lo.u32 %r5, %r4, 8, %r1; mul.wide.u32 %d1, %r5, 2; add.s64 %d1, %d1, %P1; "
            f"ld.global.b16 %h{10 + i}, [%d1];\n"
        )
    for i in range(4):
        body += (
            f"add.u32 %r3, %r1, {8 * (i // 2)}; shl.b32 %r4, %r2, 1; add.u32 %r4, %r4, {i & 1}; "
            f"mad.lo.u32 %r5, %r3, 8, %r4; mul.wide.u32 %d{10 + i}, %r5, 4; add.s64 %d1, %d{10 + i}, %P2; "
            f"ld.global.f32 %f{i}, [%d1];\n"
        )
    body += "".join(f"mov.b32 %r{20 + i}, {{%h{2 * i}, %h{2 * i + 1}}};" for i in range(k // 4)) + "".join(
        f"mov.b32 %r{30 + i}, {{%h{10 + 2 * i}, %h{11 + 2 * i}}};" for i in range(k // 8)
    )
    a_regs = ",".join(f"%r{20 + i}" for i in range(k // 4))
    b_regs = ",".join(f"%r{30 + i}" for i in range(k // 8))
    body += (
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{ty}.{ty}.f32 {{%f10,%f11,%f12,%f13}}, {{{a_regs}}}, {{{b_regs}}}, "
        "{%f0,%f1,%f2,%f3};\n"
    )
    body += "".join(f"add.s64 %d1, %d{10 + i}, %P3; st.global.f32 [%d1], %f{10 + i};" for i in range(4))
    go(body, [a, b, c, d])
    np.testing.assert_array_equal(d, (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32))


def test_gemm_ldmatrix_mma():
    """16x8x32 GEMM: row-major A and B through shared memory, ldmatrix(.trans) and two mma; == numpy."""
    a, b = RNG.integers(-9, 9, (16, 32)).astype(BF), RNG.integers(-9, 9, (32, 8)).astype(BF)
    d = np.zeros((16, 8), np.float32)
    body = "mov.u32 %r9, sm; mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;"
    for off, pp, half in ((0, 0, 0), (512, 0, 512), (1024, 1, 0)):  # 64 x 16B of A, 32 x 16B of B
        body += (
            f"mul.wide.u32 %d1, %t, 16; add.s64 %d1, %d1, %P{pp}; "
            f"ld.global.v4.u32 {{%r1,%r2,%r3,%r4}}, [%d1+{half}]; shl.b32 %r8, %t, 4; add.u32 %r8, %r8, %r9; "
            f"st.shared.v4.u32 [%r8+{off}], {{%r1,%r2,%r3,%r4}};"
        )
    body += (
        "bar.sync 0; and.b32 %r10, %t, 15; shr.u32 %r11, %t, 4; shl.b32 %r12, %r10, 6; "
        "shl.b32 %r13, %r11, 4; add.u32 %r14, %r12, %r13; add.u32 %r14, %r14, %r9; shl.b32 %r15, %r10, 4; "
        "add.u32 %r15, %r15, %r9;"
    )
    for kk in range(2):
        body += (
            f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20,%r21,%r22,%r23}}, [%r14+{32 * kk}]; "
            f"ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r24,%r25}}, [%r15+{1024 + 256 * kk}]; "
            f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f0,%f1,%f2,%f3}}, {{%r20,%r21,%r22,%r23}}, "
            f"{{%r24,%r25}}, {{%f0,%f1,%f2,%f3}};"
        )
    body += (
        "shr.u32 %r1, %t, 2; and.b32 %r2, %t, 3; shl.b32 %r1, %r1, 5; shl.b32 %r2, %r2, 3; "
        "add.u32 %r1, %r1, %r2; cvt.u64.u32 %d1, %r1; add.s64 %d1, %d1, %P2; "
        "st.global.v2.f32 [%d1], {%f0,%f1}; st.global.v2.f32 [%d1+256], {%f2,%f3};"
    )
    go(body, [a, b, d], smem=1536)
    np.testing.assert_array_equal(d, a.astype(np.float32) @ b.astype(np.float32))


@pytest.mark.parametrize("span,layout", [(32, 3), (64, 2), (128, 1)])
@pytest.mark.parametrize("btrans", [0, 1])
@pytest.mark.parametrize("mut", [None, "wait", "fence", "tx", "wg_wait"])
def test_wgmma_tma(span, layout, btrans, mut):
    """64 x N x 16 wgmma with TMA-swizzled operands; B K-major or N-major; result == numpy; faults are caught."""
    e = span // 2
    N = 2 * e if btrans else 16
    kw = e  # inner box = one swizzle span
    a = RNG.integers(-9, 9, (64, kw)).astype(BF)
    b = RNG.integers(-9, 9, (16, N) if btrans else (N, kw)).astype(BF)
    d = np.zeros((64, N), np.float32)
    ta = TensorMap(a.view(np.uint16), a.shape, (kw, 1), (64, kw), span)
    tb = TensorMap(b.view(np.uint16), b.shape, (b.shape[1], 1), (b.shape[0], e), span)
    copies = (
        "mov.s32 %r5, 0; "
        + COPY.format(d=1, m=2, x="%r5", y="%r5")
        + "add.u32 %r7, %r1, 16384; "
        + COPY.format(d=7, m=3, x="%r5", y="%r5")
    )
    nbytes = a.nbytes + (b.shape[0] * span)
    if btrans:
        copies += f"add.u32 %r8, %r7, 4096; mov.s32 %r6, {e}; " + COPY.format(d=8, m=3, x="%r6", y="%r5")
        nbytes += b.shape[0] * span
    body = TMA.format(bytes=nbytes - (16 if mut == "tx" else 0), copies=copies)
    if mut == "wait":
        body = body[: body.index("W: mbar")] + "W: "
    body += (
        "add.u32 %r7, %r1, 16384; shr.u32 %r20, %r1, 4; shr.u32 %r21, %r7, 4; cvt.u64.u32 %d10, %r20; "
        "cvt.u64.u32 %d11, %r21;"
    )
    da = (8 * span >> 4) << 32 | layout << 62
    db = (8 * span >> 4) << 32 | layout << 62 | ((4096 >> 4) << 16 if btrans else 0)
    body += f"or.b64 %d10, %d10, {da}; or.b64 %d11, %d11, {db}; " + "".join(
        f"mov.f32 %f{i}, 0f00000000;" for i in range(N // 2)
    )
    acc = ",".join(f"%f{i}" for i in range(N // 2))
    body += ("" if mut == "fence" else "wgmma.fence.sync.aligned;") + (
        "setp.ne.b32 %p5, 1, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{acc}}}, %d10, %d11, %p5, 1, 1, 0, {btrans}; "
        "wgmma.commit_group.sync.aligned; "
    )
    body += "" if mut == "wg_wait" else "wgmma.wait_group.sync.aligned 0;"
    body += (
        "shr.u32 %r30, %t, 5; and.b32 %r31, %t, 31; shr.u32 %r32, %r31, 2; and.b32 %r33, %r31, 3; "
        "shl.b32 %r30, %r30, 4; add.u32 %r30, %r30, %r32;"
    ) + (
        f"mul.lo.u32 %r34, %r30, {4 * N}; shl.b32 %r33, %r33, 3; add.u32 %r34, %r34, %r33; "
        "cvt.u64.u32 %d20, %r34; add.s64 %d20, %d20, %P0;"
    )
    body += "".join(
        f"st.global.f32 [%d20+{(i // 2 % 2) * 8 * 4 * N + (i // 4) * 32 + (i % 2) * 4}], %f{i};" for i in range(N // 2)
    )
    if mut:
        with pytest.raises(
            PtxError,
            match=dict(
                wait="uninitialised|asynchronously",
                fence="wgmma.fence missing",
                tx="deadlock|more|read of",
                wg_wait="in flight",
            )[mut],
        ):
            hopper(body, [ta, tb], d)
        return
    hopper(body, [ta, tb], d)
    np.testing.assert_array_equal(d, a[:, :16].astype(np.float32) @ (b if btrans else b[:, :16].T).astype(np.float32))
