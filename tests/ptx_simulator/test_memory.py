"""Memory accesses and what is wrong with them: bounds, alignment, initialisation."""

import numpy as np
import pytest

from ptx_simulator import PtxError
from ptx_simulator.programs import addr, go

pytestmark = pytest.mark.simulator


def test_global_bounds_and_alignment():
    x, o = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    go(addr(0, 4) + addr(1, 4) + "ld.global.u32 %r1, [%A0]; st.global.u32 [%A1], %r1;", [x, o])
    np.testing.assert_array_equal(x, o)
    with pytest.raises(PtxError, match=r"thread 31.*out of bounds"):
        go(addr(0, 4) + "ld.global.u32 %r1, [%A0+4];", [x])
    with pytest.raises(PtxError, match=r"thread 0 .*out of bounds"):
        go(addr(0, 4) + "st.global.u32 [%A0+-4], %t;", [x])
    with pytest.raises(PtxError, match="misaligned 16-byte"):
        go("ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%P0+8];", [x])
    with pytest.raises(PtxError, match="different values"):
        go("st.global.u32 [%P0], %t;", [o])
    with pytest.raises(PtxError, match="line"):
        go(addr(0, 4) + "ld.u32 %r1, [%A0+4];", [x])  # generic


def test_shared_faults():
    o = np.zeros(32, np.uint32)
    st = "mov.u32 %r9, sm; shl.b32 %r8, %t, 2; add.u32 %r9, %r9, %r8; "
    go(
        st + "st.shared.u32 [%r9], %t; ld.shared.u32 %r1, [%r9];" + addr(0, 4) + "st.global.u32 [%A0], %r1;",
        [o],
        smem=128,
    )
    np.testing.assert_array_equal(o, np.arange(32))
    with pytest.raises(PtxError, match="uninitialised"):
        go(st + "ld.shared.u32 %r1, [%r9];", [o], smem=128)
    with pytest.raises(PtxError, match=r"thread 31.*out of bounds"):
        go(st + "st.shared.u32 [%r9+4], %t;", [o], smem=128)
    with pytest.raises(PtxError, match="misaligned"):
        go(st + "st.shared.v2.u32 [%r9], {%t, %t};", [o], smem=256)


def test_local_and_generic_window():
    o = np.zeros(32, np.uint32)
    dep = ".local .align 8 .b8 dep[16]; mov.u64 %d1, dep; cvta.local.u64 %d2, %d1;"
    np.testing.assert_array_equal(
        go(dep + "st.u32 [%d2+4], %t; ld.local.u32 %r1, [%d1+4];" + addr(0, 4) + "st.global.u32 [%A0], %r1;", [o]),
        np.arange(32),
    )
    with pytest.raises(PtxError, match="uninitialised local"):
        go(dep + "ld.local.u32 %r1, [%d1];", [o])
    with pytest.raises(PtxError, match="local access out"):
        go(dep + "st.local.u32 [%d1+16], %t;", [o])


def test_atomics():
    o = np.zeros(4, np.uint32)
    go(
        "and.b32 %r1, %t, 3; mul.wide.u32 %A0, %r1, 4; add.s64 %A0, %A0, %P0; red.global.add.u32 [%A0], %t;",
        [o],
        threads=128,
    )
    np.testing.assert_array_equal(o, [np.arange(128)[k::4].sum() for k in range(4)])
    f = np.zeros(1, np.float32)
    go("cvt.rn.f32.u32 %f1, %t; atom.global.add.f32 %f2, [%P0], %f1;", [f], threads=64)
    assert f[0] == 64 * 63 / 2
