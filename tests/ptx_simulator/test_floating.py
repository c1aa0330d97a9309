"""Floating-point instructions and conversions against exact rationals."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ptx_simulator.programs import BF, RNG, ew, floats, ints

# References overflow on purpose; the simulator silences its own.
pytestmark = [pytest.mark.simulator, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def round_fraction(x, p, emin, emax):
    """Exact rational -> nearest-even float with p significant bits (returned as float64)."""
    if x == 0:
        return 0.0
    s, x = (-1 if x < 0 else 1), abs(x)
    e = max(math.floor(math.log2(x.numerator) - math.log2(x.denominator)) + 2, emin)
    while e > emin and x < Fraction(2) ** e:
        e -= 1
    q = x / Fraction(2) ** (e - p + 1)
    n = q.numerator // q.denominator
    r = q - n
    n += (r > Fraction(1, 2)) or (r == Fraction(1, 2) and n & 1)
    v = Fraction(n) * Fraction(2) ** (e - p + 1)
    return s * (math.inf if v >= Fraction(2) ** (emax + 1) else float(v))


FMT = {"f32": (24, -126, 127), "f16": (11, -14, 15), "bf16": (8, -126, 127)}


def test_fma_f32_exact():
    """Includes cases where rounding a float64 sum would double-round."""
    a, b = floats(2048)
    c = floats(2048, seed=9)[0]
    a[:512] = 1 + RNG.integers(0, 1 << 23, 512) * 2.0**-23
    b[:512] = 1 + 2.0**-12
    c[:512] = np.float32(2.0**24) * (1 + RNG.integers(0, 64, 512) * 2.0**-20)
    a[512], b[512], c[512] = 1 + 2**-12, 1 + 2**-12, 2**-60  # tie broken only by c
    c[600:900] = -(a[600:900] * b[600:900])  # cancellation
    c[~np.isfinite(c)] = 0
    out = []
    for k in range(0, 2048, 256):
        out.append(ew("fma.rn.f32 {o}, {a}, {b}, {c};", [a[k : k + 256], b[k : k + 256], c[k : k + 256]], np.float32))
    out = np.concatenate(out)
    ref = np.array(
        [
            round_fraction(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), *FMT["f32"])
            for x, y, z in zip(a, b, c, strict=True)
        ]
    )
    np.testing.assert_array_equal(out.astype(np.float64), ref)
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (naive != out).any()


@pytest.mark.parametrize("ty,dt", [("f16", np.float16), ("bf16", BF)])
@pytest.mark.parametrize("op", ["fma", "mul", "add", "sub"])
def test_half_exact(ty, dt, op):
    a, b = floats(512, dt)
    c = floats(512, dt, seed=5)[0]

    def p(x):
        return np.ascontiguousarray(x).view(np.uint32)

    ins = f"{op}.rn.{ty}x2 {{o}}, {{a}}, {{b}}" + (", {c};" if op == "fma" else ";")
    out = ew(ins, [p(x) for x in ([a, b, c] if op == "fma" else [a, b])], np.uint32).view(dt).astype(np.float64)

    def F(x):
        return Fraction(float(x))

    f = {
        "fma": lambda x, y, z: F(x) * F(y) + F(z),
        "mul": lambda x, y, z: F(x) * F(y),
        "add": lambda x, y, z: F(x) + F(y),
        "sub": lambda x, y, z: F(x) - F(y),
    }[op]
    np.testing.assert_array_equal(out, [round_fraction(f(x, y, z), *FMT[ty]) for x, y, z in zip(a, b, c, strict=True)])


def test_f32_arith_and_special():
    a, b = floats()
    b[b == 0] = 1
    eq = np.testing.assert_array_equal
    with np.errstate(all="ignore"):
        for o, r in (("add", a + b), ("sub", a - b), ("mul", a * b), ("div", a / b)):
            eq(ew(f"{o}.rn.f32 {{o}}, {{a}}, {{b}};", [a, b], np.float32), r)
        eq(ew("sqrt.rn.f32 {o}, {a};", [abs(a)], np.float32), np.sqrt(abs(a)))
        eq(ew("neg.f32 {o}, {a};", [a], np.float32), -a)
        np.testing.assert_allclose(ew("ex2.approx.ftz.f32 {o}, {a};", [a % 10], np.float32), np.exp2(a % 10), rtol=1e-6)
        np.testing.assert_allclose(ew("rcp.approx.f32 {o}, {a};", [a % 7 + 1], np.float32), 1 / (a % 7 + 1), rtol=1e-6)
    n = a.copy()
    n[::2] = np.nan
    eq(ew("max.f32 {o}, {a}, {b};", [n, b], np.float32), np.fmax(n, b))
    r = ew("min.NaN.f32 {o}, {a}, {b};", [n, b], np.float32)
    assert (r.view(np.uint32)[::2] == 0x7FFFFFFF).all()
    eq(r[1::2], np.minimum(a, b)[1::2])
    z = np.array([0.0, -0.0] * 16, np.float32)
    eq(ew("max.f32 {o}, {a}, {b};", [z, -z], np.float32).view(np.uint32), np.zeros(32))
    tiny = np.full(32, 1e-40, np.float32)
    eq(ew("mul.rn.ftz.f32 {o}, {a}, {b};", [tiny, np.ones(32, np.float32)], np.float32), np.zeros(32))


def test_cvt():
    a, b = floats()
    eq = np.testing.assert_array_equal

    def F(x):
        return Fraction(float(x))

    for ty, dt in (("f16", np.float16), ("bf16", BF)):
        o = ew(f"cvt.rn.{ty}x2.f32 {{o}}, {{a}}, {{b}};", [a, b], np.uint32).view(dt).reshape(-1, 2).astype(np.float64)
        eq(o[:, 1], [round_fraction(F(x), *FMT[ty]) for x in a])
        eq(o[:, 0], [round_fraction(F(x), *FMT[ty]) for x in b])  # a: upper half
        eq(
            ew(f"cvt.f32.{ty} {{o}}, {{a}};", [a.astype(dt).view(np.uint16)], np.float32),
            a.astype(dt).astype(np.float32),
        )
    eq(ew("cvt.rn.bf16.f32 {o}, {a};", [a], np.uint16), a.astype(BF).view(np.uint16))
    eq(ew("cvt.rz.bf16.f32 {o}, {a};", [a], np.uint16), a.view(np.uint32) >> 16)
    eq(ew("cvt.rn.f16.f32 {o}, {a};", [a], np.uint16), a.astype(np.float16).view(np.uint16))
    c = np.concatenate([a % 300 - 150, [1e30, -1e30, np.nan, 2.5, 3.5, -2.5]]).astype(np.float32)
    eq(
        ew("cvt.rzi.s32.f32 {o}, {a};", [c], np.int32),
        [0 if x != x else int(min(max(math.trunc(x), -(2**31)), 2**31 - 1)) for x in c.astype(float)],
    )
    eq(ew("cvt.rni.s32.f32 {o}, {a};", [c[:-6]], np.int32), np.rint(c[:-6]))
    i = ints(np.int32)
    eq(ew("cvt.rn.f32.s32 {o}, {a};", [i], np.float32), i.astype(np.float32))
    eq(ew("cvt.s64.s32 {o}, {a};", [i], np.int64), i)
    eq(ew("cvt.u64.u32 {o}, {a};", [i], np.uint64), i.view(np.uint32))
    eq(ew("cvt.s32.s8 {o}, {a};", [i], np.int32), i.astype(np.int8))
    eq(ew("cvt.u16.u32 {o}, {a};", [i], np.uint16), i.astype(np.uint16))
    eq(
        ew("cvt.sat.s8.s32 %h9, {a}; cvt.s32.s8 {o}, %h9;", [i % 1000 - 500], np.int32),
        np.clip(i % 1000 - 500, -128, 127),
    )
