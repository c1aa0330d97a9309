"""Barriers, races and deadlocks."""

import numpy as np
import pytest

from ptx_simulator import DeadlockError, PtxError, RaceError
from ptx_simulator.programs import addr, go

pytestmark = pytest.mark.simulator

XCHG = (
    (
        "mov.u32 %r9, sm; shl.b32 %r8, %t, 2; add.u32 %r7, %r9, %r8; xor.b32 %r6, %r8, 256; "
        "add.u32 %r6, %r9, %r6; st.shared.u32 [%r7], %t; {bar} ld.shared.u32 %r1, [%r6];"
    )
    + addr(0, 4)
    + "st.global.u32 [%A0], %r1;"
)


@pytest.mark.parametrize("kw", [{}, dict(reverse=True), dict(warps_per_bundle=4)])
def test_barrier_and_races(kw):
    o = np.zeros(128, np.uint32)
    bar = "bar.sync 0;"
    np.testing.assert_array_equal(go(XCHG.format(bar=bar), [o], 128, 512, **kw), np.arange(128) ^ 64)
    with pytest.raises(PtxError, match=r"uninitialised|race"):
        go(XCHG.format(bar=""), [o], 128, 512, **kw)
    with pytest.raises(RaceError, match=r"not ordered after (read|write)"):
        go(XCHG.format(bar=bar) + "st.shared.u32 [%r7], %t;", [o], 128, 512, **kw)  # write-after-read
    go(XCHG.format(bar=bar) + "bar.sync 0; st.shared.u32 [%r7], %t;", [o], 128, 512, **kw)
    with pytest.raises(DeadlockError):
        go("setp.lt.u32 %p1, %t, 32; @%p1 bra L; bar.sync 1, 128; L:", [o], 128, 512, **kw)
    with pytest.raises(PtxError, match="counts"):
        go("setp.lt.u32 %p1, %t, 32; @%p1 bra L; bar.sync 1, 128; bra M; L: bar.sync 1, 64; M:", [o], 128, 512, **kw)


def test_producer_consumer_arrive():
    """Named barrier: warps 0-1 bar.arrive, warps 2-3 bar.sync; the data flows one way."""
    body = (
        """mov.u32 %r9, sm; and.b32 %r3, %t, 63; shl.b32 %r3, %r3, 2; add.u32 %r9, %r9, %r3;
setp.ge.u32 %p1, %t, 64; @%p1 bra C;
st.shared.u32 [%r9], %t; bar.arrive 3, 128; bra E; C: bar.sync 3, 128; ld.shared.u32 %r1, [%r9];"""
        + addr(0, 4)
        + "st.global.u32 [%A0], %r1; E:"
    )
    o = np.zeros(128, np.uint32)
    go(body, [o], 128, 256)
    np.testing.assert_array_equal(o[64:], np.arange(64))
    with pytest.raises(PtxError, match=r"uninitialised|race"):
        go(body.replace("bar.arrive 3, 128;", "").replace("bar.sync 3, 128;", ""), [o], 128, 256, reverse=True)
