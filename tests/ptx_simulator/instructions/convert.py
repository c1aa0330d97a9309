"""Moves and conversions between registers: mov, cvta, cvt."""

import numpy as np

from ptx_simulator.decode import op, simple
from ptx_simulator.errors import PtxError
from ptx_simulator.memory import LOCAL_WIN, PARAM_WIN, SHARED_WIN, WIN
from ptx_simulator.numerics import DT, FLT, INT, UDT, bf16_bits, canon, f32, f64, flush, lift, u16, u32, u64
from ptx_simulator.operands import dst, src
from ptx_simulator.parsing import Vec


@op("mov")
def _mov(kernel, ins):
    ty = ins.typ(*INT, "f32", "f64", "pred", "f16", "bf16")
    d, a = ins.ops
    if isinstance(d, Vec) and isinstance(a, Vec):
        ins.bad("vector")
    if isinstance(d, Vec) or isinstance(a, Vec):
        v = d if isinstance(d, Vec) else a
        k = len(v.items)
        w = DT[ty].itemsize // k
        if w * k != DT[ty].itemsize or w not in UDT:
            ins.bad("vector")
        if v is d:
            x = src(kernel, ins, a, ty)
            ds = [dst(kernel, ins, o, f"b{8 * w}") for o in v.items]

            def unpack(cta, sel):
                p = np.ascontiguousarray(np.broadcast_to(x(cta, sel), cta.n(sel))).view(UDT[w]).reshape(-1, k)
                for j, q in enumerate(ds):
                    q(cta, sel, p[:, j])

            return unpack
        xs = [src(kernel, ins, o, f"b{8 * w}") for o in v.items]
        q = dst(kernel, ins, d, ty)

        def pack(cta, sel):
            out = np.empty((cta.n(sel), k), UDT[w])
            for j, x in enumerate(xs):
                out[:, j] = x(cta, sel)
            q(cta, sel, out.view(DT[ty]).reshape(-1))

        return pack
    return simple(kernel, ins, ty, lambda x: np.asarray(x), 1)


@op("cvta")
def _cvta(kernel, ins):
    to = ins.take("to")
    sp = ins.take("global", "shared", "local", "param", "const", "shared::cta", required=True)
    ty = ins.typ("u64", "u32")
    base = {"shared": SHARED_WIN, "local": LOCAL_WIN, "param": PARAM_WIN}.get(sp.split("::")[0], 0)
    if ty == "u32":
        ins.bad("32-bit generic")
    k = u64(base)

    def f(x):
        if to and base and ((x < k) | (x >= k + u64(WIN))).any():
            raise PtxError(f"cvta.to.{sp} of an address outside that window")
        return x - k if to else x + k

    return simple(kernel, ins, ty, f, 1)


@op("cvt")
def _cvt(kernel, ins):
    """cvt: rounding .rn/.rz (float), .rni/.rzi/.rmi/.rpi (to integer), .sat, .relu, packed f16x2/bf16x2."""
    sty = ins.typ(*INT, "f16", "bf16", "f32", "f64")
    dty = ins.typ(*INT, *FLT)
    rnd = ins.take("rn", "rz", "rni", "rzi", "rmi", "rpi")
    sat = ins.take("sat")
    ftz = ins.take("ftz")
    relu = ins.take("relu")
    if ftz and "f32" not in (sty, dty):
        ins.bad()
    packed = dty.endswith("x2")
    xs = [src(kernel, ins, o, sty, loose=True) for o in ins.ops[1:]]
    d = dst(kernel, ins, ins.ops[0], dty, loose=True)
    if len(xs) != 1 + packed or (packed and sty != "f32"):
        ins.bad("operand count")
    sf, df = sty in FLT, dty in FLT
    if relu and dty not in ("f16", "bf16", "f16x2", "bf16x2"):
        ins.bad("relu")
    if sat and not (dty in INT or dty == "f32"):
        ins.bad("sat")

    def narrow(v, t):  # float64 -> bits of t with rounding rnd
        if relu:
            v = np.where(np.isnan(v), v, np.maximum(v, 0))
        if t == "bf16":
            return bf16_bits(v, rnd)
        if rnd == "rz":
            big = {"f16": 65504.0, "f32": float(np.finfo(f32).max), "f64": np.inf}[t]
            r = v.astype(DT[t])
            over = np.abs(r.astype(f64)) > np.abs(v)
            r = np.where(over, np.nextafter(r, DT[t].type(0)), r)
            return canon(np.where(np.isinf(r) & np.isfinite(v), np.copysign(DT[t].type(big), r), r))
        return canon(v.astype(DT[t]))

    def f(*x):
        x = [np.atleast_1d(v) for v in x]
        if packed:  # d = {a: upper, b: lower}
            if ftz:
                x = [flush(v) for v in x]
            hi, lo = (np.atleast_1d(narrow(v.astype(f64), dty[:-2])).view(u16).astype(u32) for v in x)
            return (hi << u32(16)) | lo
        (v,) = x
        if sf:
            v = flush(v) if ftz and sty == "f32" else v
            v = lift(sty, v)
            if df:
                if rnd in ("rni", "rzi", "rmi", "rpi"):
                    v = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rnd](v)
                r = narrow(v, dty)
                r = flush(r) if ftz and dty == "f32" else r
                return np.where(np.isnan(r), f32(0), np.clip(r, f32(0), f32(1))) if sat else r
            if rnd not in ("rni", "rzi", "rmi", "rpi"):
                ins.bad("rounding")
            r = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rnd](v)
            ii = np.iinfo(DT[dty])
            big, small = r >= float(ii.max), r <= float(ii.min)  # out of range clamps; NaN -> 0
            out = np.where(big | small | np.isnan(r), 0.0, r).astype(DT[dty])
            return np.where(big, DT[dty].type(ii.max), np.where(small, DT[dty].type(ii.min), out)).astype(DT[dty])
        if df:
            if rnd not in ("rn", "rz"):
                ins.bad("rounding")
            if DT[sty].itemsize == 8 and not (rnd == "rn" and dty in ("f32", "f64")):
                ins.bad("64-bit integer")
            return v.astype(DT[dty]) if dty in ("f32", "f64") and rnd == "rn" else narrow(v.astype(f64), dty)
        if sat:
            ii = np.iinfo(DT[dty])
            return np.array([min(max(int(e), ii.min), ii.max) for e in v], DT[dty])
        return v.astype(DT[dty])

    if sf and df and rnd is None and DT[dty].itemsize < DT[sty].itemsize:
        ins.bad("needs rounding")
    return lambda cta, sel: d(cta, sel, f(*[x(cta, sel) for x in xs]))
