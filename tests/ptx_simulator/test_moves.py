"""Comparison, selection, moves, module constants, and strictness about what is not modelled."""

import numpy as np
import pytest

from ptx_simulator import PtxError, run, unsupported
from ptx_simulator.programs import ew, floats, ints, kernel

pytestmark = pytest.mark.simulator


def test_setp_selp_bool():
    a, b = ints(np.int32), ints(np.int32)
    b[::3] = a[::3]
    o = ew(
        (
            "setp.lt.s32 %p1, {a}, 0; setp.le.and.u32 %p2|%p3, {a}, {b}, !%p1; selp.b32 %r30, 1, 0, %p2; "
            "selp.b32 %r31, 2, 0, %p3; or.b32 {o}, %r30, %r31;"
        ),
        [a, b],
        np.uint32,
    )
    le = a.view(np.uint32) <= b.view(np.uint32)
    np.testing.assert_array_equal(o, (le & (a >= 0)) + 2 * (~le & (a >= 0)))
    f, g = floats()
    f[::4] = np.nan
    for c, r in (
        ("lt", f < g),
        ("geu", ~(f < g)),
        ("ne", (f != g) & ~np.isnan(f) & ~np.isnan(g)),
        ("nan", np.isnan(f) | np.isnan(g)),
    ):
        np.testing.assert_array_equal(
            ew(f"setp.{c}.f32 %p1, {{a}}, {{b}}; selp.u32 {{o}}, 1, 0, %p1;", [f, g], np.uint32), r
        )


def test_mov_pack_unpack():
    a = ints(np.uint64)
    np.testing.assert_array_equal(
        ew("mov.b64 {{%r1, %r2}}, {a}; mov.b64 {o}, {{%r2, %r1}};", [a], np.uint64),
        (a >> np.uint64(32)) | (a << np.uint64(32)),
    )
    b = ints(np.uint32)
    np.testing.assert_array_equal(
        ew("mov.b32 {{%h1, %h2}}, {a}; mov.b32 {o}, {{%h2, %h1}};", [b], np.uint32), (b >> 16) | (b << 16)
    )


def test_module_constants_and_cta_sampling():
    o = np.zeros((3, 4), np.uint32)
    decl = ".visible .const .align 4 .b8 tab[8] = {1, 2, 3, 4, 250, 0, 0, 0};"
    t = kernel(
        (
            "mov.u64 %d1, tab; ld.const.u32 %r1, [%d1]; ld.const.s8 %r2, [tab+4]; mov.u32 %r3, %ctaid.x; "
            "mad.lo.u32 %r4, %r3, 4, %t; mul.wide.u32 %d2, %r4, 4; add.s64 %d2, %d2, %P0; "
            "add.u32 %r1, %r1, %r2; st.global.u32 [%d2], %r1;"
        ),
        1,
        decl=decl,
    )
    run(t, "k", 3, 4, [o], ctas=[(2,)])
    np.testing.assert_array_equal(o[2], 0x04030201 - 6)
    assert not o[:2].any()


def test_strictness():
    for bad in (
        "mul.rz.f32 %f1, %f2, %f3;",
        "addc.u32 %r1, %r2, %r3;",
        "add.u32.foo %r1, %r2, %r3;",
        "wmma.load.a %r1;",
        "mov.u32 %r1, %clock;",
        "tcgen05.cp.cta_group::1.128x256b [%r1], %d1;",
    ):
        with pytest.raises(NotImplementedError):
            run(kernel(bad, 0), "k", 1, 32, [])
    assert (
        len(unsupported(kernel("mul.rz.f32 %f1, %f2, %f3; addc.u32 %r1, %r2, %r3; add.u32 %r1, %r2, %r3;", 0))["k"])
        == 2
    )
    with pytest.raises(PtxError, match="size mismatch"):
        run(kernel("add.u32 %r1, %d1, %r2;", 0), "k", 1, 32, [])
