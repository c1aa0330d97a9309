"""Readers and writers of operands, made once when an instruction is decoded.

A reader is called as reader(cta, sel) and returns one value a thread; a writer as writer(cta, sel, values).
"""

import numpy as np

from ptx_simulator.errors import PtxError
from ptx_simulator.numerics import DT, UDT, i64
from ptx_simulator.parsing import SINK, Imm, Mem, Not, Reg, Special, Sym, imm


def src(kernel, ins, o, ty, loose=False):
    """Reader of operand o as DT[ty].  Sizes must agree unless loose (ld/st/cvt relaxed typing)."""
    dt = DT[ty]
    if isinstance(o, Imm):
        c = imm(o, ty)
        return lambda cta, sel: c
    if isinstance(o, Not):
        f = src(kernel, ins, o.op, ty)
        return lambda cta, sel: ~f(cta, sel)
    if isinstance(o, Reg):
        i, rdt = o.i, DT[o.ty]
        kernel.reads.setdefault(i, ins)
        if (
            (rdt.kind == "b") != (dt.kind == "b")
            or rdt.itemsize < dt.itemsize
            or (rdt.itemsize > dt.itemsize and not loose)
        ):
            raise PtxError(f"line {ins.line}: operand size mismatch [{ins.text}]")
        if rdt.itemsize > dt.itemsize:
            n = UDT[dt.itemsize]
            return lambda cta, sel: cta.registers[i][sel].astype(n).view(dt)
        if dt.kind == "b" or dt == UDT[dt.itemsize]:
            return lambda cta, sel: cta.registers[i][sel]
        return lambda cta, sel: cta.registers[i][sel].view(dt)
    if isinstance(o, Special):
        f = special(ins, o.name)
        return lambda cta, sel: f(cta, sel).astype(UDT[dt.itemsize]).view(dt)
    if isinstance(o, (Sym, Mem)):
        f = address(kernel, ins, o if isinstance(o, Mem) else Mem(o, 0))
        return lambda cta, sel: f(cta, sel).astype(UDT[dt.itemsize]).view(dt)
    ins.bad(f"operand {o}")


def dst(kernel, ins, o, ty, loose=False):
    """Writer of operand o with values of DT[ty]; loose allows a wider register (sign/zero extended)."""
    dt = DT[ty]
    if o == SINK:
        return lambda cta, sel, v: None
    if not isinstance(o, Reg):
        ins.bad("destination")
    i, rdt = o.i, DT[o.ty]
    kernel.writes.add(i)
    if (
        (rdt.kind == "b") != (dt.kind == "b")
        or rdt.itemsize < dt.itemsize
        or (rdt.itemsize > dt.itemsize and not loose)
    ):
        raise PtxError(f"line {ins.line}: destination size mismatch [{ins.text}]")
    if dt.kind == "b":

        def w(cta, sel, v):
            cta.registers[i][sel] = v
    elif rdt.itemsize == dt.itemsize:
        n = UDT[dt.itemsize]

        def w(cta, sel, v):
            if v.dtype.itemsize != n.itemsize:
                raise AssertionError(f"internal: result width [{ins.text}]")
            cta.registers[i][sel] = v.view(n)
    else:
        wide = np.dtype(f"{'i' if dt.kind == 'i' else 'u'}{rdt.itemsize}")
        n = UDT[rdt.itemsize]
        base = dt if dt.kind in "iu" else UDT[dt.itemsize]

        def w(cta, sel, v):
            cta.registers[i][sel] = np.asarray(v).view(base).astype(wide).view(n)

    return w


def special(ins, name):
    """Special registers."""
    n, _, ax = name.partition(".")
    d = "xyz".find(ax) if ax else None

    def const(f):
        return lambda cta, sel: np.full(cta.n(sel), f(cta), i64)

    if n == "%tid" and d is not None:
        return lambda cta, sel: cta.tid[d][sel]
    if n == "%ntid":
        return const(lambda cta: cta.block[d])
    if n in ("%ctaid", "%clusterid"):
        return const(lambda cta: cta.ctaid[d])
    if n in ("%nctaid", "%nclusterid"):
        return const(lambda cta: cta.grid[d])
    if n == "%cluster_ctaid" or n in ("%cluster_ctarank",):
        return const(lambda cta: 0)
    if n in ("%cluster_nctaid", "%cluster_nctarank"):
        return const(lambda cta: 1)
    if n == "%laneid":
        return lambda cta, sel: cta.ids(sel) % 32
    if n == "%warpid":
        return lambda cta, sel: cta.ids(sel) // 32
    if n == "%nwarpid":
        return const(lambda cta: cta.num_warps)
    if n == "WARP_SZ":
        return const(lambda cta: 32)
    lm = {
        "%lanemask_eq": lambda lane: 1 << lane,
        "%lanemask_lt": lambda lane: (1 << lane) - 1,
        "%lanemask_le": lambda lane: (2 << lane) - 1,
        "%lanemask_gt": lambda lane: (1 << 32) - (2 << lane),
        "%lanemask_ge": lambda lane: (1 << 32) - (1 << lane),
    }
    if n in lm:
        f = lm[n]
        return lambda cta, sel: f(cta.ids(sel) % 32)
    ins.bad(f"special register {name}")


def address(kernel, ins, o):
    """int64 byte addresses of [base+off]; a bare variable name is its address in its own space."""
    if not isinstance(o, Mem):
        ins.bad("address operand")
    b, off = o.base, o.off
    if isinstance(b, Imm):
        c = int(b.text, 0) + off
        return lambda cta, sel: np.full(cta.n(sel), c, i64)
    if isinstance(b, Sym):
        return lambda cta, sel: np.full(cta.n(sel), cta.symbol(b.name) + off, i64)
    i = b.i
    kernel.reads.setdefault(i, ins)
    if kernel.regtypes[i] in ("pred", "b16", "u16", "s16"):
        ins.bad("address register")
    return lambda cta, sel: cta.registers[i][sel].astype(i64) + off
