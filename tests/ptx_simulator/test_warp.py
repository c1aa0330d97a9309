"""Communication within a warp, and divergence."""

import numpy as np
import pytest

from ptx_simulator.programs import addr, ew, go, ints

pytestmark = pytest.mark.simulator


@pytest.mark.parametrize("width", [32, 16, 8])
@pytest.mark.parametrize("mode,arg", [("idx", 3), ("up", 5), ("down", 6), ("bfly", 5)])
def test_shfl(mode, arg, width):
    x = ints(np.uint32, 64)
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    o = ew(
        f"shfl.sync.{mode}.b32 {{o}}|%p1, {{a}}, {arg}, {c}, -1; @!%p1 xor.b32 {{o}}, {{o}}, 0xffffffff;",
        [x],
        np.uint32,
    )
    v = x.reshape(-1, width)
    i = np.arange(width)
    j = {"idx": np.full(width, arg % width), "up": i - arg, "down": i + arg, "bfly": i ^ arg}[mode]
    ok = (j >= 0) & (j < width)
    np.testing.assert_array_equal(o.reshape(-1, width), np.where(ok, v[:, np.where(ok, j, i)], ~v))


def test_vote_redux_elect():
    x = ints(np.uint32, 64)
    w = x.reshape(2, 32)

    def rep(v):
        return np.repeat(v, 32)

    o = ew("and.b32 %r3, {a}, 1; setp.eq.u32 %p1, %r3, 1; vote.sync.ballot.b32 {o}, %p1, -1;", [x], np.uint32)
    np.testing.assert_array_equal(o, rep(((w & 1) << np.arange(32, dtype=np.uint32)).sum(1)))
    np.testing.assert_array_equal(ew("redux.sync.max.u32 {o}, {a}, -1;", [x], np.uint32), rep(w.max(1)))
    np.testing.assert_array_equal(
        ew("redux.sync.add.u32 {o}, {a}, -1;", [x], np.uint32), rep(w.sum(1, dtype=np.uint32))
    )
    np.testing.assert_array_equal(
        ew("elect.sync %r3|%p1, -1; selp.u32 {o}, 1, 0, %p1;", [x], np.uint32), np.tile([1] + [0] * 31, 2)
    )
    np.testing.assert_array_equal(
        ew(
            "and.b32 %r3, %t, 3; setp.eq.u32 %p1, %r3, 1; mov.u32 {o}, 0; @!%p1 bra J; activemask.b32 {o}; J:",
            [x],
            np.uint32,
        ),
        np.where(np.arange(64) % 4 == 1, 0x22222222, 0),
    )


def test_divergent_loop_reconverges():
    """Collatz lengths (per-lane trip counts) followed by a warp-collective that needs all lanes."""
    x = np.arange(1, 129, dtype=np.uint32)
    o = ew(
        """mov.u32 %r2, 0; mov.u32 %r3, {a};
L: setp.eq.u32 %p1, %r3, 1; @%p1 bra D; and.b32 %r4, %r3, 1; setp.eq.u32 %p2, %r4, 0; @%p2 bra E;
mad.lo.u32 %r3, %r3, 3, 1; bra.uni N; E: shr.u32 %r3, %r3, 1; N: add.u32 %r2, %r2, 1; bra L;
D: shfl.sync.bfly.b32 {o}, %r2, 1, 31, -1;""",
        [x],
        np.uint32,
    )

    def steps(v):
        k = 0
        while v != 1:
            v = v // 2 if v % 2 == 0 else 3 * v + 1
            k += 1
        return k

    np.testing.assert_array_equal(o, np.array([steps(int(v)) for v in x])[np.arange(128) ^ 1])


def test_reconvergence_by_backward_branch():
    """Lanes >= 16 reach the collective at S only through a later block that jumps back."""
    x = np.arange(32, dtype=np.uint32)
    o = ew(
        (
            "mov.u32 %r2, {a}; setp.ge.u32 %p1, %t, 16; @%p1 bra F; "
            "S: shfl.sync.idx.b32 {o}, %r2, 20, 31, -1; bra.uni X; F: add.u32 %r2, %r2, 100; bra.uni S; X:"
        ),
        [x],
        np.uint32,
    )
    np.testing.assert_array_equal(o, 120)


def test_divergent_mbarrier_wait():
    """Lane 0 of warp 0 waits for an arrival of warp 1, then the warp reconverges for a shuffle."""
    o = np.zeros(64, np.uint32)
    go(
        """mov.u32 %r9, sm; setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared.b64 [%r9], 1; bar.sync 0;
mov.u32 %r5, 7; @!%p1 bra N;
W: mbarrier.try_wait.parity.shared.b64 %p2, [%r9], 0; @!%p2 bra W; ld.shared.u32 %r5, [%r9+8];
N: setp.ne.u32 %p3, %t, 32; @%p3 bra M;
st.shared.u32 [%r9+8], 42; mbarrier.arrive.shared.b64 %d1, [%r9]; M: shfl.sync.idx.b32 %r6, %r5, 0, 31, -1;"""
        + addr(0, 4)
        + "st.global.u32 [%A0], %r6;",
        [o],
        64,
        64,
    )
    np.testing.assert_array_equal(o, [42] * 32 + [7] * 32)
