"""Asynchronous matrix products of a warpgroup (Hopper)."""

import re

import numpy as np

from ptx_simulator.decode import op
from ptx_simulator.errors import PtxError, RaceError
from ptx_simulator.instructions.mma import G4, T4, frag_cols
from ptx_simulator.memory import SHARED_BASE
from ptx_simulator.numerics import bf16_val, canon, f32, f64, u16, u32
from ptx_simulator.operands import src
from ptx_simulator.parsing import Vec, imm, registers_of
from ptx_simulator.tensor_map import swizzle


def wgmma_bytes(desc, mn, k, mn_major):
    """Byte addresses (mn, k, 2) of a 16-bit operand tile from its matrix descriptor ("Matrix
    Descriptor Format", "Shared Memory Matrix Layout"; canonical layouts as in CUTLASS)."""
    start = (desc & 0x3FFF) << 4
    lbo = (desc >> 16 & 0x3FFF) << 4
    sbo = (desc >> 32 & 0x3FFF) << 4
    span = {0: 16, 1: 128, 2: 64, 3: 32}[desc >> 62]
    if desc >> 49 & 7:
        raise NotImplementedError("wgmma descriptor base offset")
    i = np.arange(mn)[:, None]
    j = np.arange(k)[None, :]
    if not mn_major:  # ((8,m),(T,2)):((span,SBO),(1,T|LBO))
        off = i % 8 * span + i // 8 * sbo + (2 * j if span > 16 else j % 8 * 2 + j // 8 * lbo)
    else:  # ((T,span/16,m),(8,k)):((1,T,LBO),(span,SBO))
        e = span // 2
        off = i % e * 2 + j % 8 * span + (i // e * lbo + j // 8 * sbo if span > 16 else i // e * sbo + j // 8 * lbo)
    return swizzle(start + off, span)[..., None] + np.arange(2)


@op("wgmma")
def _wgmma(kernel, ins):
    """wgmma.mma_async m64nNk16 f32 <- bf16/f16; each warp owns 16 rows.  Executes at wait_group."""

    def fence(cta, sel):
        for w in cta.full(sel):
            cta.unfenced[w] = set()

    if ins.take("fence"):
        ins.take("sync", required=True)
        ins.take("aligned", required=True)
        return fence
    if ins.take("commit_group"):
        ins.take("sync", required=True)
        ins.take("aligned", required=True)

        def fn(cta, sel):
            for w in cta.full(sel):
                cta.wgmma_commits[w] += 1

        return fn
    if ins.take("wait_group"):
        ins.take("sync", required=True)
        ins.take("aligned", required=True)
        n = int(imm(ins.ops[0], "u32"))

        def fn(cta, sel):
            for w in cta.full(sel):
                todo = [g for g in cta.wgmmas[w] if g["g"] < cta.wgmma_commits[w] - n]
                cta.wgmmas[w] = [g for g in cta.wgmmas[w] if g["g"] >= cta.wgmma_commits[w] - n]
                for g in todo:
                    g["go"]()
            cta.wgmma_busy = any(cta.wgmmas)

        return fn
    mods = ".".join(ins.mods)
    ins.mods.clear()
    g = re.fullmatch(r"mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.(\2)", mods)
    if not g:
        raise NotImplementedError(f"line {ins.line}: {ins.opcode}")
    N = int(g[1])
    ty = g[2] + "x2"
    D, A, B, P, *im = ins.ops
    im = [int(imm(x, "s32")) for x in im]
    areg = isinstance(A, Vec)
    if len(D.items) != N // 2 or N % 8 or len(im) != (3 if areg else 4) or abs(im[0]) != 1 or abs(im[1]) != 1:
        ins.bad("operands")
    sa = im[0]
    sb = im[1]
    ta = 0 if areg else im[2]
    tb = im[-1]
    idx = [o.i for o in D.items]
    ins.acc = tuple(idx)
    kernel.writes.update(idx)
    p = src(kernel, ins, P, "pred")
    bd = src(kernel, ins, B, "b64")
    if any(kernel.regtypes[i] not in ("b32", "f32") for i in idx):
        ins.bad("accumulator registers")
    ar = [src(kernel, ins, o, "b32") for o in A.items] if areg else None
    ad = None if areg else src(kernel, ins, A, "b64")
    cols = [8 * (j // 4) + 2 * T4 + (j & 1) for j in range(N // 2)]
    rows = [G4 + 8 * (j >> 1 & 1) for j in range(N // 2)]
    aset = frozenset(registers_of(A)) if areg else frozenset()

    def uniform(v, w, sel, cta):
        v = np.unique(np.broadcast_to(v, cta.n(sel))[np.flatnonzero(cta.ids(sel) // 32 == w)])
        if len(v) != 1:
            raise PtxError("wgmma operand differs between lanes")
        return int(v[0])

    def val(ix, cta):
        b = np.ascontiguousarray(cta.shared.buf[ix]).view(u16)[..., 0]
        return bf16_val(b).astype(f64) if ty == "bf16x2" else b.view(np.float16).astype(f64)

    def fn(cta, sel):
        for w in cta.full(sel):
            lanes = np.arange(w * 32, w * 32 + 32)
            one = lanes[:1]
            if cta.unfenced[w] & (aset | {-1, *idx}):
                raise RaceError(f"warp {w}: wgmma.fence missing between a register access and wgmma.mma_async")
            bix = wgmma_bytes(uniform(bd(cta, sel), w, sel, cta), N, 16, tb)
            reads = [bix]
            if areg:
                a = np.empty((16, 16))
                for j, x in enumerate(ar):
                    v = frag_cols(np.broadcast_to(x(cta, lanes), 32), ty)
                    r = G4 + 8 * (j & 1)
                    q = 2 * T4 + 8 * (j >> 1)
                    a[r, q], a[r, q + 1] = v[:, 0], v[:, 1]
            else:
                aix = wgmma_bytes(uniform(ad(cta, sel), w, sel, cta), 64, 16, ta)[16 * (w % 4) : 16 * (w % 4) + 16]
                reads.append(aix)
                a = None
            for ix in reads:
                if ix.min() < SHARED_BASE or ix.max() >= cta.shared.size:
                    raise PtxError("wgmma operand outside shared memory")
                cta.shared.check_read(cta, one, ix.reshape(1, -1), np.array([w]), async_proxy=True)
                np.add.at(cta.shared.pending_reads, ix.reshape(-1), 1)
            acc = bool(uniform(p(cta, sel), w, sel, cta))

            def go(w=w, lanes=lanes, a=a, reads=reads, acc=acc):
                b = val(reads[0], cta) * sb
                x = (val(reads[1], cta) if a is None else a) * sa
                c = np.zeros((16, N))
                for ix in reads:
                    np.subtract.at(cta.shared.pending_reads, ix.reshape(-1), 1)
                    cta.shared.read_clock[w, ix] = cta.vc[w, w]
                if acc:
                    for j, i in enumerate(idx):
                        c[rows[j], cols[j]] = cta.registers[i][lanes].view(f32)
                r = canon((x @ b.T + c).astype(f32))
                for j, i in enumerate(idx):
                    cta.registers[i][lanes] = r[rows[j], cols[j]].view(u32)

            cta.wgmmas[w].append(
                dict(g=cta.wgmma_commits[w], go=go, regs=frozenset(idx) | aset, aregs=aset, acc=ins.acc, line=ins.line)
            )
        cta.wgmma_busy = True

    return fn
