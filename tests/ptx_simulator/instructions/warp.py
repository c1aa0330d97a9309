"""Communication within a warp: shuffles, votes, reductions, election."""

import numpy as np

from ptx_simulator.decode import op
from ptx_simulator.numerics import i64, u32
from ptx_simulator.operands import dst, src
from ptx_simulator.parsing import Pair


@op("shfl")
def _shfl(kernel, ins):
    """shfl.sync.{idx,up,down,bfly}.b32 d|p, a, b, c, membermask."""
    ty = ins.typ("b32")
    ins.take("sync", required=True)
    mode = ins.take("idx", "up", "down", "bfly", required=True)
    d0 = ins.ops[0]
    pair = isinstance(d0, Pair)
    d = dst(kernel, ins, d0.a if pair else d0, ty)
    q = dst(kernel, ins, d0.b, "pred") if pair else None
    a, b, c, mk = (src(kernel, ins, o, "u32") for o in ins.ops[1:])

    def fn(cta, sel):
        cta.has_lanes(sel, mk(cta, sel))
        t = cta.ids(sel)
        lane = t % 32
        bv, cv = (np.broadcast_to(x(cta, sel), t.shape).astype(i64) for x in (b, c))
        bv = bv & 31
        cl, seg = cv & 31, cv >> 8 & 31
        mx = (lane & seg) | (cl & ~seg)
        mn = lane & seg
        if mode == "up":
            j = lane - bv
            ok = j >= mx
        elif mode == "down":
            j = lane + bv
            ok = j <= mx
        elif mode == "bfly":
            j = lane ^ bv
            ok = j <= mx
        else:
            j = mn | (bv & ~seg)
            ok = j <= mx
        from_ = t - lane + np.where(ok, j, lane)
        if not np.isin(from_, t).all():
            cta.fault(sel, np.argmax(~np.isin(from_, t)), "shfl from an inactive lane")
        all_ = np.zeros(cta.N, u32)
        all_[t] = np.broadcast_to(a(cta, sel), t.shape)
        d(cta, sel, all_[from_])
        if q:
            q(cta, sel, ok)

    return fn


def per_warp(cta, sel, f):
    """Applies f(lane indices into s) to each warp of s and scatters the results."""
    t = cta.ids(sel)
    out = None
    for w in cta.warps(sel):
        k = np.flatnonzero(t // 32 == w)
        r = np.asarray(f(k, t[k] % 32))
        out = np.empty(len(t), r.dtype) if out is None else out
        out[k] = r
    return out


@op("vote", "activemask", "redux", "elect")
def _warp(kernel, ins):
    n = ins.name
    if n == "activemask":
        ty = ins.typ("b32")
        d = dst(kernel, ins, ins.ops[0], ty)
        return lambda cta, sel: d(cta, sel, per_warp(cta, sel, lambda k, lane: u32(int((1 << lane).sum()))))
    ins.take("sync", required=True)
    if n == "elect":
        d = dst(kernel, ins, ins.ops[0].a, "b32")
        p = dst(kernel, ins, ins.ops[0].b, "pred")
        mk = src(kernel, ins, ins.ops[1], "u32")

        def fn(cta, sel):
            cta.has_lanes(sel, mk(cta, sel))
            d(cta, sel, per_warp(cta, sel, lambda k, lane: u32(lane.min())))
            p(cta, sel, per_warp(cta, sel, lambda k, lane: lane == lane.min()))

        return fn
    mk = src(kernel, ins, ins.ops[2], "u32")
    if n == "vote":
        mode = ins.take("all", "any", "uni", "ballot", required=True)
        ty = ins.typ("b32" if mode == "ballot" else "pred")
        a = src(kernel, ins, ins.ops[1], "pred")
        d = dst(kernel, ins, ins.ops[0], ty)
        f = {"all": np.all, "any": np.any, "uni": lambda v: v.all() or not v.any()}.get(mode)
    else:
        mode = ins.take("add", "min", "max", "and", "or", "xor", required=True)
        ty = ins.typ("u32", "s32", "b32")
        a = src(kernel, ins, ins.ops[1], ty)
        d = dst(kernel, ins, ins.ops[0], ty)
        f = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[mode]
        f = (lambda g: lambda v: g.reduce(v, dtype=v.dtype))(f)

    def fn(cta, sel):
        cta.has_lanes(sel, mk(cta, sel))
        v = np.broadcast_to(a(cta, sel), cta.n(sel))
        if mode == "ballot":
            d(cta, sel, per_warp(cta, sel, lambda k, lane: u32(int((v[k].astype(i64) << lane).sum()))))
        else:
            d(cta, sel, per_warp(cta, sel, lambda k, lane: f(v[k])))

    return fn
