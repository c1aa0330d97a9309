"""Matrix products of one warp: ldmatrix, stmatrix, mma."""

import re

import numpy as np

from ptx_simulator.decode import op
from ptx_simulator.memory import WIN
from ptx_simulator.numerics import bf16_val, canon, f32, f64, lift, u8, u16, u32
from ptx_simulator.operands import address, dst, src
from ptx_simulator.parsing import Vec

G4, T4 = np.arange(32) // 4, np.arange(32) % 4  # groupID, threadID_in_group


@op("ldmatrix", "stmatrix")
def _ldmatrix(kernel, ins):
    """ldmatrix/stmatrix .m8n8 .x1/.x2/.x4 {.trans} .b16: lane 8i+r addresses row r of matrix i."""
    ins.typ("b16") if ins.mods[-1] == "b16" else ins.bad("type")
    ins.take("sync", required=True)
    ins.take("aligned", required=True)
    ins.take("m8n8", required=True)
    n = int(ins.take("x1", "x2", "x4", required=True)[1])
    tr = ins.take("trans")
    ins.take("shared", "shared::cta", required=False)
    ld = ins.name == "ldmatrix"
    reg, mem = ins.ops if ld else ins.ops[::-1]
    items = reg.items if isinstance(reg, Vec) else (reg,)
    a = address(kernel, ins, mem)
    if len(items) != n:
        ins.bad("vector")
    generic = "shared" not in ins.opcode
    rr, cc = (
        (np.stack([2 * T4, 2 * T4 + 1], 1), np.stack([G4, G4], 1))
        if tr
        else (np.stack([G4, G4], 1), np.stack([2 * T4, 2 * T4 + 1], 1))
    )
    regs = [(dst if ld else src)(kernel, ins, o, "b32") for o in items]

    def rows(cta, sel):
        w = cta.full(sel)
        lanes = (w[:, None] * 32 + np.arange(8 * n)).reshape(-1)
        ad = a(cta, sel).reshape(len(w), 32)[:, : 8 * n].reshape(-1)
        ad = ad & (WIN - 1) if generic else ad
        cta.access("shared", lanes, ad, 16)
        return w, lanes, ad

    def load(cta, sel):
        w, lanes, ad = rows(cta, sel)
        v = cta.shared.load(cta, lanes, ad, 16).view(u16).reshape(len(w), n, 8, 8)
        for j, d in enumerate(regs):
            d(cta, sel, np.ascontiguousarray(v[:, j][:, rr, cc]).view(u32).reshape(-1))

    def store(cta, sel):
        w, lanes, ad = rows(cta, sel)
        v = np.empty((len(w), n, 8, 8), u16)
        for j, x in enumerate(regs):
            v[:, j, rr, cc] = (
                np.ascontiguousarray(np.broadcast_to(x(cta, sel), cta.n(sel))).view(u16).reshape(len(w), 32, 2)
            )
        cta.shared.store(cta, lanes, ad, v.reshape(-1, 8).view(u8))

    return load if ld else store


def frag_cols(v, ty):
    return (
        lift(ty, np.ascontiguousarray(v))
        if ty == "f16x2"
        else bf16_val(np.ascontiguousarray(v).view(u16)).astype(f64).reshape(-1, 2)
    )


@op("mma")
def _mma(kernel, ins):
    """mma.sync.aligned.m16n8k{16,8}.row.col.f32.{bf16,f16}.{bf16,f16}.f32."""
    mods = ".".join(ins.mods)
    ins.mods.clear()
    g = re.fullmatch(r"sync\.aligned\.m16n8k(16|8)\.row\.col\.f32\.(bf16|f16)\.(\2)\.f32", mods)
    if not g:
        raise NotImplementedError(f"line {ins.line}: {ins.opcode}")
    k = int(g[1])
    ty = g[2] + "x2"
    na, nb = k // 4, k // 8
    D, A, B, C = ins.ops
    if [len(v.items) for v in ins.ops] != [4, na, nb, 4]:
        ins.bad("fragment sizes")
    ds = [dst(kernel, ins, o, "f32") for o in D.items]
    cs = [src(kernel, ins, o, "f32") for o in C.items]
    as_ = [src(kernel, ins, o, "b32") for o in A.items]
    bs = [src(kernel, ins, o, "b32") for o in B.items]

    def vec(x, cta, sel):
        v = x(cta, sel)
        return v if np.ndim(v) else np.broadcast_to(v, cta.n(sel))

    def fn(cta, sel):
        W = len(cta.full(sel))
        a = np.empty((W, 16, k))
        b = np.empty((W, k, 8))
        c = np.empty((W, 16, 8))
        for j, x in enumerate(as_):  # A[j]: row g + 8(j&1), cols 2t + 8(j>>1)
            v = frag_cols(vec(x, cta, sel), ty).reshape(W, 32, 2)
            r, q = G4 + 8 * (j & 1), 2 * T4 + 8 * (j >> 1)
            a[:, r, q], a[:, r, q + 1] = v[..., 0], v[..., 1]
        for j, x in enumerate(bs):  # B[j]: rows 2t + 8j, col g
            v = frag_cols(vec(x, cta, sel), ty).reshape(W, 32, 2)
            r = 2 * T4 + 8 * j
            b[:, r, G4], b[:, r + 1, G4] = v[..., 0], v[..., 1]
        for j, x in enumerate(cs):
            c[:, G4 + 8 * (j >> 1), 2 * T4 + (j & 1)] = vec(x, cta, sel).reshape(W, 32)
        r = canon((a @ b + c).astype(f32))
        for j, d in enumerate(ds):
            d(cta, sel, r[:, G4 + 8 * (j >> 1), 2 * T4 + (j & 1)].reshape(-1))

    return fn
