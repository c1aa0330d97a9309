"""Integer arithmetic, logic, shifts and bit fields."""

import numpy as np

from ptx_simulator.decode import op, simple
from ptx_simulator.errors import PtxError
from ptx_simulator.instructions import floating
from ptx_simulator.numerics import DT, FLT, INT, UDT, i64, u8, u32, u64
from ptx_simulator.operands import dst, src
from ptx_simulator.parsing import imm


@op("add", "sub", "mul", "div", "min", "max", "fma", "mad", "rem")
def _arith(kernel, ins):
    """Integer arithmetic; the floating-point forms of the same opcodes are in floating.py."""
    n = ins.name
    if n in ("mul", "mad") and ins.mods[-1] in INT:
        return _imul(kernel, ins)
    ty = ins.typ(*INT, *FLT)
    if ty in FLT:
        return floating.arithmetic(kernel, ins, ty)
    if n == "fma":
        ins.bad()
    if n in ("div", "rem"):

        def dv(a, b):
            a, b = np.broadcast_arrays(a, b)
            if (b == 0).any():
                raise PtxError("integer division by zero")
            q = np.floor_divide(a, b)
            q = q + ((np.remainder(a, b) != 0) & ((a < 0) != (b < 0))).astype(q.dtype)
            return q if n == "div" else a - q * b

        return simple(kernel, ins, ty, dv, 2)
    return simple(kernel, ins, ty, {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[n], 2)


def _imul(kernel, ins):
    ty = ins.typ(*INT)
    mode = ins.take("lo", "hi", "wide", required=True)
    w = DT[ty].itemsize
    if ins.name == "mad" and len(ins.ops) != 4:
        ins.bad("operand count")
    rty = ty[0] + str(16 * w) if mode == "wide" else ty
    if rty not in DT:
        ins.bad("type")
    a = src(kernel, ins, ins.ops[1], ty)
    b = src(kernel, ins, ins.ops[2], ty)
    d = dst(kernel, ins, ins.ops[0], rty)
    c = src(kernel, ins, ins.ops[3], rty) if ins.name == "mad" else None

    def mul(x, y):
        if mode == "lo":
            return x * y
        if w < 8:
            p = x.astype(i64 if ty[0] == "s" else u64) * y.astype(i64 if ty[0] == "s" else u64)
            return (p if mode == "wide" else p >> np.array(8 * w, p.dtype)).astype(DT[rty])
        x, y = np.broadcast_arrays(x, y)
        return np.array(
            [((int(p) * int(q)) >> 64) & (1 << 64) - 1 for p, q in zip(x.ravel(), y.ravel(), strict=True)], u64
        ).view(DT[ty])

    if c:
        return lambda cta, sel: d(cta, sel, mul(a(cta, sel), b(cta, sel)) + c(cta, sel))
    return lambda cta, sel: d(cta, sel, mul(a(cta, sel), b(cta, sel)))


@op("and", "or", "xor", "not", "cnot")
def _logic(kernel, ins):
    """ "Logic and Shift Instructions"."""
    ty = ins.typ("pred", "b16", "b32", "b64")
    n = ins.name
    f = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
        "cnot": lambda x: (x == 0).astype(x.dtype),
    }[n]
    return simple(kernel, ins, ty, f, 1 if n in ("not", "cnot") else 2)


@op("shl", "shr")
def _shift(kernel, ins):
    """shl/shr: amounts are u32 and clamp at the register width."""
    ty = ins.typ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64")
    w = DT[ty].itemsize * 8
    a = src(kernel, ins, ins.ops[1], ty)
    b = src(kernel, ins, ins.ops[2], "u32")
    d = dst(kernel, ins, ins.ops[0], ty)
    if ins.name == "shl" and ty[0] != "b":
        ins.bad()

    def f(x, n):
        big = n >= w
        k = np.where(big, 0, n).astype(x.dtype)
        if ins.name == "shl":
            return np.where(big, x.dtype.type(0), x << k)
        return np.where(big, (x >> x.dtype.type(w - 1)) if ty[0] == "s" else x.dtype.type(0), x >> k)

    return lambda cta, sel: d(cta, sel, f(a(cta, sel), b(cta, sel)))


@op("shf")
def _shf(kernel, ins):
    ty = ins.typ("b32")
    left = ins.take("l", "r", required=True) == "l"
    wrap = ins.take("wrap", "clamp", required=True) == "wrap"

    def f(a, b, c):
        n = ((c & u32(31)) if wrap else np.minimum(c, u32(32))).astype(u64)
        v = (b.astype(u64) << u64(32)) | a.astype(u64)
        return ((v << n) >> u64(32) if left else v >> n).astype(u32)

    return simple(kernel, ins, ty, f, 3)


@op("prmt")
def _prmt(kernel, ins):
    """prmt: byte permute, default mode; selector nibble = byte index (0-7) | sign-replicate bit 3."""
    ty = ins.typ("b32")

    def f(a, b, c):
        v = np.empty((*np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c), (1,)), 2), u32)
        v[:, 0], v[:, 1] = a, b
        n = np.broadcast_to(
            ((np.atleast_1d(c)[:, None] >> np.array([0, 4, 8, 12], u32)) & u32(15)).astype(u8), (len(v), 4)
        )
        r = np.take_along_axis(v.view(u8), (n & u8(7)).astype(np.intp), 1)
        return np.where(n & u8(8), (r >> u8(7)) * u8(255), r).view(u32)[:, 0]

    return simple(kernel, ins, ty, f, 3)


@op("lop3")
def _lop3(kernel, ins):
    """lop3.b32 d, a, b, c, immLut: bit k of the LUT is the value for minterm (a,b,c) = bits of k."""
    ty = ins.typ("b32")
    lut = int(imm(ins.ops.pop(), "u32"))
    if lut > 255:
        ins.bad("immLut")

    def f(a, b, c):
        r = u32(0) & np.asarray(a)
        for k in range(8):
            if lut >> k & 1:
                r = r | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
        return r

    return simple(kernel, ins, ty, f, 3)


@op("bfe", "bfi")
def _bitfield(kernel, ins):
    ty = ins.typ("u32", "s32", "u64", "s64", "b32", "b64")
    W = DT[ty].itemsize * 8
    U = UDT[W // 8].type
    full = U((1 << W) - 1)

    def mask(n):
        return np.where(n >= W, full, (U(1) << np.minimum(n, W - 1).astype(U)) - U(1)).astype(U)

    def shl(x, n):
        return np.where(n >= W, U(0), x << np.minimum(n, W - 1).astype(U))

    def shr(x, n):
        return np.where(n >= W, U(0), x >> np.minimum(n, W - 1).astype(U))

    types = [ty, "u32", "u32"] if ins.name == "bfe" else [ty, ty, "u32", "u32"]
    if len(ins.ops) != 1 + len(types):
        ins.bad("operand count")
    a = [src(kernel, ins, o, t) for o, t in zip(ins.ops[1:], types, strict=True)]
    d = dst(kernel, ins, ins.ops[0], ty)

    def bfe(x, p, n):
        x = np.asarray(x)
        ux = x.view(U)
        p = p & u32(255)
        n = n & u32(255)
        r = shr(ux, p) & mask(n)
        if ty[0] == "s":
            top = np.minimum(p.astype(i64) + n.astype(i64) - 1, W - 1)
            sb = np.where(n == 0, U(0), shr(ux, np.maximum(top, 0).astype(u32)) & U(1)).astype(bool)
            valid = np.clip(np.minimum(n.astype(i64), W - p.astype(i64)), 0, W).astype(u32)
            r = np.where(sb, r | ~mask(valid), r)
        return r.astype(U).view(DT[ty])

    def bfi(x, y, p, n):
        p = p & u32(255)
        n = n & u32(255)
        k = shl(mask(n), p)
        return ((y & ~k) | (shl(x, p) & k)).astype(U)

    f = bfe if ins.name == "bfe" else bfi
    return lambda cta, sel: d(cta, sel, f(*[x(cta, sel) for x in a]))


@op("popc", "clz", "brev", "bfind")
def _bits(kernel, ins):
    shift = ins.take("shiftamt")
    ty = ins.typ("b32", "b64", "u32", "u64", "s32", "s64")
    W = DT[ty].itemsize * 8
    n = ins.name
    if shift or (n == "bfind" and ty[0] == "s"):
        ins.bad()

    def f(x):
        b = (np.atleast_1d(x).astype(u64)[:, None] >> np.arange(W, dtype=u64)) & u64(1)
        top = np.where(b.any(1), W - 1 - np.argmax(b[:, ::-1], 1), -1)
        if n == "popc":
            return b.sum(1).astype(u32)
        if n == "brev":
            return (b[:, ::-1] << np.arange(W, dtype=u64)).sum(1, dtype=u64).astype(DT[ty])
        return (W - 1 - top if n == "clz" else top).astype(i64).astype(u32)

    return simple(kernel, ins, ty, f, 1, ty if n == "brev" else "u32")


@op("sad")
def _sad(kernel, ins):
    ty = ins.typ("u16", "u32", "s16", "s32", "u64", "s64")
    return simple(kernel, ins, ty, lambda a, b, c: c + np.where(a < b, b - a, a - b), 3)
