"""Integer instructions against Python's integers."""

import struct

import numpy as np
import pytest

from ptx_simulator.programs import RNG, SUF, ew, ints, pyints

pytestmark = pytest.mark.simulator


@pytest.mark.parametrize("dt", [np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64])
@pytest.mark.parametrize(
    "op,f",
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("mul.hi", None),
        ("min", min),
        ("max", max),
        ("div", lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
        ("rem", lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1)),
    ],
)
def test_int_binary(op, f, dt):
    a, b = ints(dt), ints(dt)
    if op in ("div", "rem"):
        b[b == 0] = 7
    if f is None:
        w = 8 * np.dtype(dt).itemsize

        def f(x, y):
            return (x * y) >> w

    np.testing.assert_array_equal(
        ew(f"{op}.{SUF[np.dtype(dt).name]} {{o}}, {{a}}, {{b}};", [a, b], dt), pyints(f, dt, a, b)
    )


@pytest.mark.parametrize(
    "dt,wide", [(np.uint16, np.uint32), (np.int16, np.int32), (np.uint32, np.uint64), (np.int32, np.int64)]
)
def test_mul_mad_wide(dt, wide):
    a, b, c = ints(dt), ints(dt), ints(wide)
    s = SUF[np.dtype(dt).name]
    np.testing.assert_array_equal(
        ew(f"mul.wide.{s} {{o}}, {{a}}, {{b}};", [a, b], wide), pyints(lambda x, y: x * y, wide, a, b)
    )
    np.testing.assert_array_equal(
        ew(f"mad.wide.{s} {{o}}, {{a}}, {{b}}, {{c}};", [a, b, c], wide),
        pyints(lambda x, y, z: x * y + z, wide, a, b, c),
    )
    d = ints(dt)
    np.testing.assert_array_equal(
        ew(f"mad.lo.{s} {{o}}, {{a}}, {{b}}, {{c}};", [a, b, d], dt), pyints(lambda x, y, z: x * y + z, dt, a, b, d)
    )


@pytest.mark.parametrize("dt", [np.uint32, np.uint64])
def test_logic_shift(dt):
    a, b = ints(dt), ints(dt)
    w = 8 * np.dtype(dt).itemsize
    n = RNG.integers(0, w + 9, 256).astype(np.uint32)
    T = f"b{w}"
    eq = np.testing.assert_array_equal
    eq(ew(f"and.{T} {{o}}, {{a}}, {{b}};", [a, b], dt), a & b)
    eq(ew(f"or.{T} {{o}}, {{a}}, {{b}};", [a, b], dt), a | b)
    eq(ew(f"xor.{T} {{o}}, {{a}}, {{b}};", [a, b], dt), a ^ b)
    eq(ew(f"not.{T} {{o}}, {{a}};", [a], dt), ~a)
    eq(ew(f"shl.{T} {{o}}, {{a}}, {{b}};", [a, n], dt), pyints(lambda x, k: x << k, dt, a, n))
    eq(ew(f"shr.u{w} {{o}}, {{a}}, {{b}};", [a, n], dt), pyints(lambda x, k: x >> k, dt, a, n))
    sa = a.view(np.dtype(f"i{w // 8}"))
    eq(ew(f"shr.s{w} {{o}}, {{a}}, {{b}};", [sa, n], sa.dtype), pyints(lambda x, k: x >> k, sa.dtype, sa, n))
    eq(ew(f"popc.{T} {{o}}, {{a}};", [a], np.uint32), [int(x).bit_count() for x in a])
    eq(ew(f"clz.{T} {{o}}, {{a}};", [a], np.uint32), [w - int(x).bit_length() for x in a])
    eq(ew(f"brev.{T} {{o}}, {{a}};", [a], dt), [int(f"{int(x):0{w}b}"[::-1], 2) for x in a])
    p = RNG.integers(0, 70, 256).astype(np.uint32)

    def bfe_s(x, p, length):  # sign bit: msb of the field, or of the word if the field is cut
        if length == 0:
            return 0
        bits = f"{x & (1 << w) - 1:0{w}b}"[::-1]
        sb = bits[min(p + length - 1, w - 1)]
        return int("".join((bits[p + i] if p + i < w and i < length else sb) for i in range(w))[::-1], 2)

    for length in (0, 1, 7, w - 1, w):
        eq(
            ew(f"bfe.u{w} {{o}}, {{a}}, {{b}}, {length};", [a, p], dt),
            pyints(lambda x, k, length=length: (x >> k) & ((1 << length) - 1), dt, a, p),
        )
        eq(
            ew(f"bfe.s{w} {{o}}, {{a}}, {{b}}, {length};", [sa, p], sa.dtype),
            pyints(lambda x, k, length=length: bfe_s(x, k, length), sa.dtype, sa, p),
        )
        eq(
            ew(f"bfi.{T} {{o}}, {{a}}, {{b}}, {{c}}, {length};", [a, b, p], dt),
            pyints(
                lambda x, y, k, length=length: (y & ~(((1 << length) - 1) << k)) | ((x & ((1 << length) - 1)) << k),
                dt,
                a,
                b,
                p,
            ),
        )


def test_prmt_random():
    a, b, c = ints(np.uint32), ints(np.uint32), ints(np.uint32)

    def ref(a, b, c):
        by = list(struct.pack("<II", a, b))
        r = []
        for i in range(4):
            n = c >> 4 * i & 15
            v = by[n & 7]
            r.append((0xFF if v & 0x80 else 0) if n & 8 else v)
        return int.from_bytes(bytes(r), "little")

    np.testing.assert_array_equal(
        ew("prmt.b32 {o}, {a}, {b}, {c};", [a, b, c], np.uint32), pyints(ref, np.uint32, a, b, c)
    )
    np.testing.assert_array_equal(
        ew("prmt.b32 {o}, {a}, {b}, 0x9D8C;", [a, b], np.uint32),
        pyints(lambda x, y: ref(x, y, 0x9D8C), np.uint32, a, b),
    )


@pytest.mark.parametrize("lut", [0xCA, 0xAC, 0x96, 0x80, 0xFE, 0x1B, 0x00, 0xFF])
def test_lop3(lut):
    a, b, c = ints(np.uint32), ints(np.uint32), ints(np.uint32)

    def ref(x, y, z):
        return sum((lut >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i for i in range(32))

    np.testing.assert_array_equal(
        ew(f"lop3.b32 {{o}}, {{a}}, {{b}}, {{c}}, {lut};", [a, b, c], np.uint32), pyints(ref, np.uint32, a, b, c)
    )
    if lut == 0xCA:
        np.testing.assert_array_equal(
            ew("lop3.b32 {o}, {a}, {b}, {c}, 0xCA;", [a, b, c], np.uint32), (a & b) | (~a & c)
        )


@pytest.mark.parametrize("mode", ["l.wrap", "l.clamp", "r.wrap", "r.clamp"])
def test_shf(mode):
    a, b, n = ints(np.uint32), ints(np.uint32), RNG.integers(0, 70, 256).astype(np.uint32)

    def ref(lo, hi, k):
        k = k & 31 if "wrap" in mode else min(k, 32)
        v = hi << 32 | lo
        return (v << k) >> 32 if mode[0] == "l" else v >> k

    np.testing.assert_array_equal(
        ew(f"shf.{mode}.b32 {{o}}, {{a}}, {{b}}, {{c}};", [a, b, n], np.uint32), pyints(ref, np.uint32, a, b, n)
    )
