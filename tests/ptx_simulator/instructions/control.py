"""Branches, exits, barriers of a thread block, fences and hints."""

import re

import numpy as np

from ptx_simulator.decode import control, op
from ptx_simulator.errors import PtxError
from ptx_simulator.operands import src


@op("bra")
@control
def _bra(kernel, ins):
    ins.take("uni")
    t = kernel.target(ins.ops[0])

    def fn(cta, sel):
        cta.pc[sel] = t

    return fn


@op("ret", "exit")
@control
def _ret(kernel, ins):
    ins.take("uni")
    return lambda cta, sel: cta.exit(sel)


@op("trap")
def _trap(kernel, ins):
    def fn(cta, sel):
        cta.fault(sel, 0, "trap")

    return fn


@op("bar", "barrier")
@control
def _bar(kernel, ins):
    """bar{.cta}.sync / .arrive a{, b}; bar.warp.sync; barrier{.cta}.sync.aligned; barrier.cluster (1 CTA)."""
    if ins.take("warp"):
        ins.take("sync", required=True)
        ins.ctl = False
        mk = src(kernel, ins, ins.ops[0], "u32")
        return lambda cta, sel: cta.has_lanes(sel, mk(cta, sel))
    cluster = ins.take("cluster", "cta") == "cluster"
    kind = ins.take("sync", "arrive", "wait", required=True)
    aligned = ins.take("aligned")
    ins.take("release", "acquire", "relaxed")
    if cluster:
        if kind == "sync":
            ins.bad()
        return (
            (lambda cta, sel: None)
            if kind == "arrive"
            else (lambda cta, sel: cta.bar_arrive(sel, np.array([15]), None, True))
        )
    if ins.name == "barrier" and not aligned:
        ins.bad("unaligned barrier")
    if kind == "wait" or (kind == "arrive" and len(ins.ops) < 2):
        ins.bad()
    b = src(kernel, ins, ins.ops[0], "u32")
    c = src(kernel, ins, ins.ops[1], "u32") if len(ins.ops) > 1 else None

    def fn(cta, sel):
        n = None if c is None else np.unique(c(cta, sel))
        if n is not None and len(n) != 1:
            raise PtxError("barrier counts differ")
        cta.bar_arrive(sel, np.atleast_1d(b(cta, sel)), None if n is None else int(n[0]), kind == "sync")

    return fn


@op("membar", "fence", "griddepcontrol", "setmaxnreg", "prefetch", "nanosleep", "prefetchu")
def _noop(kernel, ins):
    """Ordering/hint instructions.  fence.proxy.async makes visible generic writes readable by TMA/wgmma."""
    mods = ".".join(ins.mods)
    if ins.name == "fence" and mods.startswith("proxy.async"):
        if mods not in ("proxy.async", "proxy.async.shared::cta", "proxy.async.global"):
            ins.bad()
        ins.mods.clear()

        def fn(cta, sel):
            for w in cta.warps(sel):
                cta.shared.fence(cta, w)

        return fn if mods != "proxy.async.global" else lambda cta, sel: None
    ok = {
        "membar": r"(cta|gl|sys)",
        "fence": r"((sc|acq_rel|acquire|release)\.)?(cta|cluster|gpu|sys)|mbarrier_init\.release\.cluster|proxy\.alias",
        "griddepcontrol": r"wait|launch_dependents",
        "setmaxnreg": r"(inc|dec)\.sync\.aligned\.u32",
        "nanosleep": r"u32",
        "prefetch": r"tensormap|(param\.)?tensormap|(global\.)?L[12](::evict_(last|normal))?",
        "prefetchu": r"L1",
    }[ins.name]
    if not re.fullmatch(ok, mods):
        ins.bad()
    ins.mods.clear()
    return lambda cta, sel: None
