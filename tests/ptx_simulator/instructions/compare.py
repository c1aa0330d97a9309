"""Comparison and selection."""

import numpy as np

from ptx_simulator.decode import op
from ptx_simulator.numerics import FLT, INT, bf16_val, f32, flush, i32, u32
from ptx_simulator.operands import dst, src
from ptx_simulator.parsing import Pair


def compare(cmp, ty):
    base = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "lo": np.less,
        "ls": np.less_equal,
        "hi": np.greater,
        "hs": np.greater_equal,
    }
    if ty not in FLT:
        return base.get(cmp)
    if cmp == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if cmp == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if cmp in ("lo", "ls", "hi", "hs"):
        return None
    if cmp in base and cmp != "ne":
        return base[cmp]
    if cmp == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return (
        (lambda a, b: base[cmp[:-1]](a, b) | np.isnan(a) | np.isnan(b)) if cmp[-1] == "u" and cmp[:-1] in base else None
    )


@op("setp", "set")
def _setp(kernel, ins):
    ty = ins.typ(*INT, "f32", "f64", "f16", "bf16")
    dty = "pred"
    if ins.name == "set":
        dty = ins.typ("u32", "s32", "f32")
    ftz = ins.take("ftz")
    f = compare(ins.mods.pop(0) if ins.mods else "", ty)
    if f is None or (ftz and ty != "f32"):
        ins.bad("comparison")
    bop = ins.take("and", "or", "xor")
    a, b = (src(kernel, ins, o, ty) for o in ins.ops[1:3])
    if len(ins.ops) != 3 + bool(bop):
        ins.bad("operand count")
    c = src(kernel, ins, ins.ops[3], "pred") if bop else None
    comb = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(bop)
    d0 = ins.ops[0]
    pair = isinstance(d0, Pair)
    d = dst(kernel, ins, d0.a if pair else d0, dty)
    q = dst(kernel, ins, d0.b, "pred") if pair else None
    val = {
        "pred": lambda r: r,
        "u32": lambda r: np.where(r, u32(0xFFFFFFFF), u32(0)),
        "s32": lambda r: np.where(r, i32(-1), i32(0)),
        "f32": lambda r: np.where(r, f32(1), f32(0)),
    }[dty]

    def fn(cta, sel):
        x = a(cta, sel)
        y = b(cta, sel)
        if ty == "bf16":
            x = bf16_val(x)
            y = bf16_val(y)
        if ftz:
            x = flush(x)
            y = flush(y)
        r = f(x, y)
        cc = c(cta, sel) if c else None
        if q:
            q(cta, sel, comb(~r, cc) if c else ~r)
        d(cta, sel, val(np.asarray(comb(r, cc) if c else r)))

    return fn


@op("selp")
def _selp(kernel, ins):
    ty = ins.typ(*INT, "f32", "f64", "f16", "bf16")
    a, b = (src(kernel, ins, o, ty) for o in ins.ops[1:3])
    p = src(kernel, ins, ins.ops[3], "pred")
    d = dst(kernel, ins, ins.ops[0], ty)
    return lambda cta, sel: d(cta, sel, np.where(p(cta, sel), a(cta, sel), b(cta, sel)))
