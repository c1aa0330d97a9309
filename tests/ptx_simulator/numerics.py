"""Number formats of PTX and exactly rounded arithmetic on them."""

import numpy as np

u8 = np.uint8
u16 = np.uint16
u32 = np.uint32
u64 = np.uint64
i32 = np.int32
i64 = np.int64
f32 = np.float32
f64 = np.float64
DT = {
    k: np.dtype(v)
    for k, v in dict(
        pred=bool,
        b8=u8,
        u8=u8,
        s8=np.int8,
        b16=u16,
        u16=u16,
        s16=np.int16,
        b32=u32,
        u32=u32,
        s32=i32,
        b64=u64,
        u64=u64,
        s64=i64,
        f32=f32,
        f64=f64,
        f16=np.float16,
        bf16=u16,
        f16x2=u32,
        bf16x2=u32,
    ).items()
}
UDT = {1: np.dtype(u8), 2: np.dtype(u16), 4: np.dtype(u32), 8: np.dtype(u64)}
INT = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64")
FLT = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")


def canon(x):
    """f32/f64/f16 NaN results are canonical ("Floating Point Instructions": NaN payloads)."""
    x = np.asarray(x)
    n = np.isnan(x)
    if not n.any():
        return x
    bits = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}[x.itemsize]
    return np.where(n, np.array(bits, UDT[x.itemsize]).view(x.dtype), x)


def _odd(x, exact_dir):
    """Turns a rounded float64 into round-to-odd, exact_dir = sign(exact value - x)."""
    x = np.ascontiguousarray(x, f64)
    b = x.view(i64).copy()
    fix = (exact_dir != 0) & ((b & 1) == 0) & np.isfinite(x)
    return np.where(fix, b + np.where((exact_dir > 0) == (x > 0), 1, -1), b).view(f64)


def fma64(a, b, c):
    """a*b+c for inputs of <= 24 significant bits, rounded TO ODD at 53 bits.  a*b is exact in
    binary64 (<= 48 bits), TwoSum gives the exact error of the addition, and a later rounding to
    p <= 51 bits equals one rounding of the exact result (Boldo & Melquiond 2008)."""
    p, c = np.broadcast_arrays(np.asarray(a, f64) * np.asarray(b, f64), np.asarray(c, f64))
    s = p + c
    t = s - p
    err = (p - (s - t)) + (c - t)
    err = np.where(np.isfinite(s) & np.isfinite(err), err, 0.0)
    return _odd(s, np.sign(err))


def to_f32_odd(x):
    """float64 -> float32 round-to-odd (so that a further rounding to bf16 is single)."""
    x = np.asarray(x, f64)
    y = x.astype(f32)
    b = np.atleast_1d(y).view(i32).copy()
    d = np.atleast_1d(np.sign(x - y.astype(f64)))
    d[~np.isfinite(d)] = 0
    big = np.isinf(np.atleast_1d(y)) & np.isfinite(np.atleast_1d(x))  # overflow: odd neighbour is FLT_MAX
    b = np.where(
        big,
        b - 1,
        np.where((d != 0) & ((b & 1) == 0), b + np.where((d > 0) == ((b >= 0) & (np.atleast_1d(x) > 0)), 1, -1), b),
    )
    b = np.where((np.atleast_1d(y) == 0) & (d != 0), np.where(np.atleast_1d(x) < 0, i32(-(2**31) + 1), i32(1)), b)
    return b.astype(i32).view(f32).reshape(x.shape)


def bf16_bits(x, mode="rn"):
    """float64/float32 -> bf16 bits, one rounding (rn, rz)."""
    b = np.ascontiguousarray(to_f32_odd(x)).view(u32)
    r = (b >> u32(16)) if mode == "rz" else ((b + (u32(0x7FFF) + ((b >> u32(16)) & u32(1)))) >> u32(16))
    return np.where(np.isnan(x), u16(0x7FFF), r.astype(u16))


def bf16_val(b):
    return (np.asarray(b, u16).astype(u32) << u32(16)).view(f32)


def flush(x):
    return np.where(np.abs(x) < np.finfo(f32).tiny, np.copysign(f32(0), x), x).astype(f32)


def lift(ty, x):
    """Operand bits (dtype DT[ty]) -> float64 values; packed types get a trailing axis of 2."""
    x = np.atleast_1d(x)
    if ty.endswith("x2"):
        x = np.ascontiguousarray(x).view(u16).reshape(-1, 2)
        ty = ty[:-2]
    if ty == "bf16":
        return bf16_val(x).astype(f64)
    return (x.view(np.float16) if ty == "f16" else x).astype(f64)


def lower(ty, v):
    """float64 -> bits of type ty with one round-to-nearest-even."""
    if ty == "f32":
        return canon(v.astype(f32))
    if ty == "f64":
        return canon(v)
    e = bf16_bits(v) if ty.startswith("bf16") else canon(v.astype(np.float16)).view(u16)
    return np.ascontiguousarray(e).view(u32).reshape(-1) if ty.endswith("x2") else e.view(DT[ty])
