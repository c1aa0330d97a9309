"""Loads, stores and atomic operations."""

import numpy as np

from ptx_simulator.decode import op
from ptx_simulator.numerics import DT, FLT, INT, lift, lower, u8
from ptx_simulator.operands import address, dst, src
from ptx_simulator.parsing import Vec

CACHE = (
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "nc",
    "weak",
    "L1::no_allocate",
    "L1::evict_last",
    "L1::evict_first",
    "L1::evict_normal",
    "L1::evict_unchanged",
    "L2::64B",
    "L2::128B",
    "L2::256B",
)


def space_of(ins):
    return (ins.take("global", "shared", "shared::cta", "param", "param::entry", "local", "const") or "generic").split(
        "::"
    )[0]


@op("ld", "ldu", "st")
def _ldst(kernel, ins):
    ty = ins.typ(*INT, "f32", "f64")
    sp = space_of(ins)
    ins.drop(*CACHE)
    if ins.take("volatile", "relaxed", "acquire", "release"):
        ins.take("cta", "gpu", "sys", "cluster")
        if sp != "global":
            ins.bad("synchronising access outside .global")
    k = int((ins.take("v2", "v4", "v8") or "v1")[1])
    w = DT[ty].itemsize
    n = w * k
    if n > 32:
        ins.bad("vector size")
    ld = ins.name != "st"
    reg, mem = ins.ops if ld else ins.ops[::-1]
    items = reg.items if isinstance(reg, Vec) else (reg,)
    if len(items) != k:
        ins.bad("vector")
    a = address(kernel, ins, mem)
    if ld:
        ds = [dst(kernel, ins, o, ty, loose=True) for o in items]
        dt = DT[ty]

        def fn(cta, sel):
            v = cta.load(sp, sel, a(cta, sel), n).view(dt)
            for j, d in enumerate(ds):
                d(cta, sel, v[:, j])

        return fn
    xs = [src(kernel, ins, o, ty, loose=True) for o in items]

    def fn(cta, sel):
        v = np.empty((cta.n(sel), k), DT[ty])
        for j, x in enumerate(xs):
            v[:, j] = x(cta, sel)
        cta.store(sp, sel, a(cta, sel), v.view(u8))

    return fn


@op("atom", "red")
def _atom(kernel, ins):
    """atom/red, lane by lane.  Shared-memory atomics are exempt from the race check."""
    ty = ins.typ("u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64", "f16x2", "bf16x2")
    sp = space_of(ins)
    ins.take("relaxed", "release", "acquire", "acq_rel")
    ins.take("cta", "gpu", "sys", "cluster")
    ins.take("noftz")
    o = ins.take("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec", required=True)
    if sp not in ("global", "shared", "generic") or (o not in ("add", "exch", "cas") and ty in FLT):
        ins.bad()
    red = ins.name == "red"
    ops = ins.ops if red else ins.ops[1:]
    d = None if red else dst(kernel, ins, ins.ops[0], ty)
    a = address(kernel, ins, ops[0])
    xs = [src(kernel, ins, x, ty) for x in ops[1:]]

    def one(v):
        return np.array([v], DT[ty])

    def f(old, x, y=None):
        if o == "add":
            return lower(ty, lift(ty, old) + lift(ty, x)) if ty.endswith("x2") else old + x
        if o == "cas":
            return np.where(old == x, y, old)
        if o == "inc":
            return np.where(old >= x, 0, old + one(1)).astype(DT[ty])
        if o == "dec":
            return np.where((old == 0) | (old > x), x, old - one(1)).astype(DT[ty])
        return {
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "exch": lambda p, q: q,
        }[o](old, x)

    def fn(cta, sel):
        addr = a(cta, sel)
        v = [np.broadcast_to(x(cta, sel), addr.shape) for x in xs]
        out = np.empty(len(addr), DT[ty])
        for j, t in enumerate(cta.ids(sel)):
            k = np.array([t])
            mem, q = cta.access(sp, k, addr[j : j + 1], DT[ty].itemsize)
            if mem is cta.shared:
                ix = mem.index(cta, k, q, DT[ty].itemsize, "atomic")
                if not mem.init[ix].all():
                    cta.fault(k, 0, "atomic on uninitialised shared memory")
                out[j : j + 1] = mem.buf[ix].view(DT[ty])[:, 0]
            else:
                out[j : j + 1] = mem.load(cta, k, q, DT[ty].itemsize).view(DT[ty])[:, 0]
            new = np.ascontiguousarray(f(out[j : j + 1], *[p[j : j + 1] for p in v])).view(u8).reshape(1, -1)
            mem.store(cta, k, q, new, check=False) if mem is cta.shared else mem.store(cta, k, q, new)
        if d:
            d(cta, sel, out)

    return fn
