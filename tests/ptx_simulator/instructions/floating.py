"""Floating-point arithmetic."""

import numpy as np

from ptx_simulator.decode import op, simple
from ptx_simulator.numerics import DT, FLT, INT, canon, f32, f64, flush, fma64, lift, lower, u16, u32, u64


def fop(kernel, ins, ty, f, n, exact64=None):
    """Floating-point op with one rounding: native for f32/f64, through binary64 for 16-bit types
    (innocuous double rounding: 53 >= 2p+2; exact64 is the round-to-odd variant used for fma)."""
    ftz = ins.take("ftz")
    sat = ins.take("sat")
    relu = ins.take("relu")
    ins.take("rn")
    if ty == "f64" and exact64:
        ins.bad("f64 fma")
    if (sat and ty != "f32") or (ftz and ty != "f32"):
        ins.bad("sat/ftz")

    def g(*x):
        if ty in ("f32", "f64"):
            if ftz:
                x = [flush(v) for v in x]
            r = canon(exact64(*x).astype(f32) if exact64 else np.asarray(f(*x), DT[ty]))
            if ftz:
                r = flush(r)
            if sat:
                r = np.where(np.isnan(r), f32(0), np.clip(r, f32(0), f32(1)))
            return r
        v = (exact64 or f)(*[lift(ty, q) for q in x])
        if relu:
            v = np.where(np.isnan(v), v, np.maximum(v, 0.0))
        return lower(ty, np.asarray(v, f64))

    return simple(kernel, ins, ty, g, n)


def arithmetic(kernel, ins, ty):
    """add, sub, mul, div, min, max, fma of a floating-point type."""
    n = ins.name
    if n in ("rem", "mad"):
        ins.bad()
    if n == "fma":
        return fop(kernel, ins, ty, None, 3, fma64)
    if n == "div":
        if ty not in ("f32", "f64"):
            ins.bad("type")
        ins.take("rn", "approx", "full", required=True)
        return fop(kernel, ins, ty, np.divide, 2)
    if n in ("min", "max"):
        nan = ins.take("NaN")
        sgn = -1 if n == "min" else 1

        def mm(a, b):
            a, b = np.broadcast_arrays(a, b)
            r = (
                np.where((a > b) | ((a == b) & (np.signbit(a) < np.signbit(b))), a, b)
                if sgn > 0
                else np.where((a < b) | ((a == b) & (np.signbit(a) > np.signbit(b))), a, b)
            )
            r = np.where(np.isnan(a), b, np.where(np.isnan(b), a, r))
            return np.where(np.isnan(a) | np.isnan(b), np.nan, r) if nan else r

        return fop(kernel, ins, ty, mm, 2)
    return fop(kernel, ins, ty, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[n], 2)


@op("abs", "neg", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _unary(kernel, ins):
    """Unary arithmetic.  `.approx` functions are evaluated in binary64 and rounded (tolerant)."""
    n = ins.name
    ty = ins.typ(*INT, *FLT)
    if n in ("abs", "neg"):
        if ty in INT:
            return simple(kernel, ins, ty, {"abs": np.abs, "neg": np.negative}[n], 1)
        bits = {"f16": u16, "bf16": u16, "f16x2": u32, "bf16x2": u32, "f32": u32, "f64": u64}[ty]
        sign = bits({2: 0x8000, 4: 0x80000000, 8: 1 << 63}[bits().itemsize] if not ty.endswith("x2") else 0x80008000)
        ftz = ins.take("ftz")
        if ftz and ty != "f32":
            ins.bad()

        def sgn(x):
            x = flush(x) if ftz else x
            b = np.asarray(x).view(bits)
            return ((b & ~sign) if n == "abs" else (b ^ sign)).view(DT[ty])

        return simple(kernel, ins, ty, sgn, 1)
    if n in ("sqrt", "rcp") and ty in ("f32", "f64"):
        ins.take("rn", "approx", required=True)
    else:
        ins.take("approx", required=True)
    if n in ("sin", "cos", "lg2", "rsqrt") and ty != "f32":
        ins.bad("type")
    f = {
        "sqrt": np.sqrt,
        "rcp": lambda x: 1 / x,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "ex2": np.exp2,
        "lg2": np.log2,
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
    }[n]
    g = (lambda x: f(x.astype(f64)).astype(f32)) if ty == "f32" and n not in ("sqrt", "rcp") else f
    if n == "ex2" and ty in ("bf16", "bf16x2"):
        ins.take("ftz", required=True)  # only form; subnormals are approximate anyway
    return fop(kernel, ins, ty, g, 1)
