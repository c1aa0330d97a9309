"""Asynchronous copies: cp.async and TMA (cp.async.bulk.tensor)."""

import re

import numpy as np

from ptx_simulator.decode import op
from ptx_simulator.memory import SHARED_BASE
from ptx_simulator.numerics import i64, u8
from ptx_simulator.operands import address, src
from ptx_simulator.parsing import Mem, Reg, imm
from ptx_simulator.tensor_map import swizzle


def cp_finish(cta, sel, limit):
    mask = np.zeros(cta.N, bool)
    mask[cta.ids(sel)] = True
    rest = []
    for c in cta.copies:
        k = mask[c["t"]] & (c["g"] < cta.copy_commits[c["t"]] - limit)
        for part, keep in ((k, False), (~k, True)):
            if not part.any():
                continue
            e = {x: (v[part] if isinstance(v, np.ndarray) else v) for x, v in c.items()}
            if keep:
                rest.append(e)
                continue
            n, t = e["n"], e["t"]
            ix = e["dst"][:, None] + np.arange(n)
            v = np.zeros((len(t), n), u8)
            for z in np.unique(e["sz"]):
                q = e["sz"] == z
                if z:
                    v[q, :z] = cta.global_memory.load(cta, t[q], e["src"][q], int(z))
            cta.shared.pending_writes[ix] -= 1
            cta.shared.put(cta, t, ix, t // 32, v, True)
    cta.copies = rest


@op("cp")
def _cp(kernel, ins):
    """cp.async.*, cp.async.bulk.*, cp.async.bulk.tensor.* ("Asynchronous Data Movement")."""
    ins.take("async", required=True)
    if ins.take("bulk"):
        return _bulk(kernel, ins)
    if ins.take("commit_group"):

        def fn(cta, sel):
            cta.copy_commits[sel] += 1

        return fn
    if ins.take("wait_all"):
        return lambda cta, sel: cp_finish(cta, sel, -1)
    if ins.take("wait_group"):
        n = int(imm(ins.ops[0], "u32"))
        return lambda cta, sel: cp_finish(cta, sel, n)
    kind = ins.take("ca", "cg", required=True)
    ins.take("shared", "shared::cta", required=True)
    ins.take("global", required=True)
    ins.drop("L2::64B", "L2::128B", "L2::256B")
    if len(ins.ops) not in (3, 4):
        ins.bad("operands (cache policy)")
    da = address(kernel, ins, ins.ops[0])
    sa = address(kernel, ins, ins.ops[1])
    n = int(imm(ins.ops[2], "u32"))
    if n not in (4, 8, 16) or (kind == "cg" and n != 16):
        ins.bad("cp-size")
    if len(ins.ops) == 4 and isinstance(ins.ops[3], Reg) and ins.ops[3].ty not in ("b32", "u32", "s32"):
        ins.bad("fourth operand")
    sz = src(kernel, ins, ins.ops[3], "u32") if len(ins.ops) == 4 else None

    def fn(cta, sel):
        d = da(cta, sel)
        a = sa(cta, sel)
        t = cta.ids(sel).copy()
        z = np.broadcast_to(sz(cta, sel), d.shape).astype(i64) if sz else np.full(len(d), n, i64)
        if (z > n).any():
            cta.fault(sel, np.argmax(z > n), "cp.async src-size > cp-size")
        cta.access("shared", sel, d, n)
        cta.access("global", sel, a, n)  # alignment
        for v in np.unique(z):
            if v:
                cta.global_memory.where(cta, t[z == v], a[z == v], int(v), "cp.async load")
        ix = cta.shared.index(cta, sel, d, n, "cp.async store")
        cta.shared.check_write(cta, sel, ix, t // 32)
        np.add.at(cta.shared.pending_writes, ix, 1)
        cta.copies.append(dict(t=t, dst=d, src=a, sz=z, n=n, g=cta.copy_commits[t].copy()))

    return fn


def tma_box(cta, sel, tm, coords, smem):
    """(smem byte index of every box element (elements, w), element offsets, inside mask)."""
    if smem % 128:
        cta.fault(sel, 0, f"TMA shared address {smem:#x} not 128-byte aligned")
    off, ok = tm.gather(coords)
    lin = smem + np.arange(len(off)) * tm.w
    a = swizzle(lin, tm.swizzle)
    n = len(off) * tm.w
    if smem < SHARED_BASE or smem + n > cta.shared.size:
        cta.fault(sel, 0, "TMA box out of shared memory")
    return a[:, None] + np.arange(tm.w), off, ok


def _bulk(kernel, ins):
    if ins.take("commit_group"):

        def fn(cta, sel):
            cta.bulk_commits[sel] += 1

        return fn
    if ins.take("wait_group"):
        ins.take("read")
        n = int(imm(ins.ops[0], "u32"))

        def fn(cta, sel):
            ids = cta.ids(sel)
            todo = [b for b in cta.bulk if b[0] in ids and b[1] < cta.bulk_commits[b[0]] - n]
            cta.bulk = [b for b in cta.bulk if b not in todo]
            for b in todo:
                b[2]()

        return fn
    if not ins.take("tensor"):
        ins.bad("non-tensor bulk copy")
    nd = int((ins.take("1d", "2d", "3d", "4d", "5d", required=True))[0])
    ins.take("tile")
    if ins.mods[0].startswith("shared"):
        sig = ".".join(ins.mods)
        ins.mods.clear()
        to_shared = r"shared::(cta|cluster)\.global\.mbarrier::complete_tx::bytes"
        if not re.fullmatch(to_shared, sig) or len(ins.ops) != 3:
            raise NotImplementedError(f"line {ins.line}: {ins.opcode} [{ins.text[:160]}]")
        da = address(kernel, ins, ins.ops[0])
        tma = ins.ops[1]
        mba = address(kernel, ins, ins.ops[2])
    else:
        sig = ".".join(ins.mods)
        ins.mods.clear()
        if sig != "global.shared::cta.bulk_group" or len(ins.ops) != 2:
            raise NotImplementedError(f"line {ins.line}: {ins.opcode} [{ins.text[:160]}]")
        tma = ins.ops[0]
        da = address(kernel, ins, ins.ops[1])
        mba = None
    ta = address(kernel, ins, Mem(tma.base, tma.off))
    cs = [src(kernel, ins, o, "s32") for o in tma.extra.items]
    if len(cs) != nd:
        ins.bad("coordinates")

    def fn(cta, sel):
        d = da(cta, sel)
        t = ta(cta, sel)
        c = [np.broadcast_to(x(cta, sel), cta.n(sel)) for x in cs]
        mb = mba(cta, sel) if mba else None
        for j, th in enumerate(cta.ids(sel)):
            k = np.array([th])
            w = th // 32
            if (tm := cta.tensor_maps.get(int(t[j]))) is None:
                cta.fault(k, 0, f"no TensorMap at {int(t[j]):#x}")
            tm, gbase = tm
            if len(tm.box) != nd:
                cta.fault(k, 0, f"{nd}d copy with a {len(tm.box)}d tensor map")
            ix, off, ok = tma_box(cta, k, tm, [int(x[j]) for x in c], int(d[j]))
            src_a = gbase + off * tm.w
            if mba:
                bar = cta.mbar(k, mb[j])
                clk = cta.vc[w].copy()
                flat = ix.reshape(1, -1)
                cta.shared.check_write(cta, k, flat, np.array([w]))
                cta.shared.pending_writes[flat] += 1

                def land(k=k, ix=ix, ok=ok, src_a=src_a, bar=bar, clk=clk, tm=tm):
                    v = np.zeros((len(ok), tm.w), u8)
                    if ok.any():
                        v[ok] = cta.global_memory.load(cta, np.repeat(k, int(ok.sum())), src_a[ok], tm.w)
                    cta.shared.pending_writes[ix] -= 1
                    ag = bar.agent
                    cta.vc[ag] = np.maximum(cta.vc[ag], clk)
                    cta.vc[ag, ag] += 1
                    cta.shared.put(cta, k, ix, np.full(len(ix), ag), v, False)
                    cta.mbar_update(bar, tx=-ix.size, vc=cta.vc[ag])

                cta.async_q.append(land)
            else:
                flat = ix.reshape(1, -1)
                cta.shared.check_read(cta, k, flat, np.array([w]), async_proxy=True)
                cta.shared.pending_reads[flat] += 1

                def out(k=k, ix=ix, ok=ok, src_a=src_a, w=w, flat=flat):
                    cta.shared.pending_reads[flat] -= 1
                    cta.shared.read_clock[w, flat] = cta.vc[w, w]
                    cta.global_memory.store(cta, np.repeat(k, int(ok.sum())), src_a[ok], cta.shared.buf[ix][ok])

                cta.bulk.append((int(th), int(cta.bulk_commits[th]), out))

    return fn
