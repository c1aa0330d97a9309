"""Barriers in shared memory (mbarrier)."""

import numpy as np

from ptx_simulator.decode import control, op
from ptx_simulator.machine import COPY_AGENTS, MBar
from ptx_simulator.memory import WIN
from ptx_simulator.numerics import i64, u64
from ptx_simulator.operands import address, dst, src


@op("mbarrier")
@control
def _mbarrier(kernel, ins):
    """mbarrier.init / inval / arrive{.expect_tx}{.noComplete} / expect_tx / test_wait / try_wait{.parity}.
    try_wait is modelled as blocking until the phase completes (its time limit never expires)."""
    what = ins.take("init", "inval", "arrive", "expect_tx", "test_wait", "try_wait", required=True)
    etx = ins.take("expect_tx") or what == "expect_tx"
    par = ins.take("parity")
    no_complete = what == "arrive" and ins.take("noComplete")
    ins.take("release", "acquire", "relaxed")
    ins.take("cta", "cluster")
    sp = ins.take("shared::cta", "shared", "shared::cluster", default="generic")
    ins.typ("b64")
    ctl = what in ("test_wait", "try_wait")
    ins.ctl = ctl

    def addr(o):
        f = address(kernel, ins, o)
        return f if sp != "generic" else (lambda cta, sel: f(cta, sel) & (WIN - 1))

    if what in ("init", "inval", "expect_tx"):
        a = addr(ins.ops[0])
        n = src(kernel, ins, ins.ops[1], "u32") if len(ins.ops) > 1 else None

        def fn(cta, sel):
            q = a(cta, sel)
            c = np.broadcast_to(n(cta, sel), q.shape) if n else None
            for j, t in enumerate(cta.ids(sel)):
                k = np.array([t])
                cta.access("shared", k, q[j : j + 1], 8)
                ix = cta.shared.index(cta, k, q[j : j + 1], 8, what)
                if what == "expect_tx":
                    cta.mbar_update(cta.mbar(k, q[j]), tx=int(c[j]))
                    continue
                if what == "init":
                    cta.shared.check_write(cta, k, ix, k // 32)
                    agent = cta.first_copy + cta.mbars_made % COPY_AGENTS
                    cta.mbars_made += 1
                    cta.mbars[int(q[j])] = MBar(int(c[j]), len(cta.vc), (t // 32, cta.vc[t // 32, t // 32]), agent)
                    cta.shared.pending_writes[ix] += 1
                else:
                    cta.mbar(k, q[j])
                    del cta.mbars[int(q[j])]
                    cta.shared.pending_writes[ix] -= 1

        return fn
    if what == "arrive":
        d = dst(kernel, ins, ins.ops[0], "b64")
        a = addr(ins.ops[1])
        n = src(kernel, ins, ins.ops[2], "u32") if len(ins.ops) > 2 else None
        if (etx or no_complete) and n is None:
            ins.bad()

        def fn(cta, sel):
            q = a(cta, sel)
            c = np.broadcast_to(n(cta, sel), q.shape).astype(i64) if n else np.ones(len(q), i64)
            tok = np.empty(len(q), u64)
            rel = {w: cta.release(w) for w in cta.warps(sel)}
            for j, t in enumerate(cta.ids(sel)):
                mb = cta.mbar(np.array([t]), q[j])
                tok[j] = mb.phase
                if no_complete and mb.pending <= c[j]:
                    cta.fault(cta.ids(sel), j, "mbarrier.arrive.noComplete would complete the phase")
                cta.mbar_update(mb, 1 if etx else int(c[j]), int(c[j]) if etx else 0, rel[t // 32])
            d(cta, sel, tok)

        return fn
    p = dst(kernel, ins, ins.ops[0], "pred")
    a = addr(ins.ops[1])
    st = src(kernel, ins, ins.ops[2], "u32" if par else "b64")
    if len(ins.ops) > 4 or (len(ins.ops) == 4 and what == "test_wait"):
        ins.bad()

    def fn(cta, sel):
        q = a(cta, sel)
        v = np.broadcast_to(st(cta, sel), cta.n(sel)).astype(i64)
        ok = np.empty(len(q), bool)
        ids = cta.ids(sel)
        mbs = [cta.mbar(ids[j : j + 1], q[j]) for j in range(len(q))]
        for j, mb in enumerate(mbs):
            ok[j] = (mb.phase & 1) != v[j] if par else mb.phase != v[j]
        for j in np.flatnonzero(ok):
            cta.vc[ids[j] // 32] = np.maximum(cta.vc[ids[j] // 32], mbs[j].done_vc)
        if what == "test_wait" or ok.all():
            p(cta, sel, ok)
            if not ok.all():
                if cta.async_q:
                    cta.async_q.popleft()()
                return "yield"
            return
        p(cta, ids[ok], np.ones(int(ok.sum()), bool))
        for j in np.flatnonzero(~ok):
            mbs[j].waiters.append(ids[j : j + 1])
        cta.pc[ids[~ok]] -= 1
        cta.blocked[ids[~ok]] = True  # re-executed when woken

    return fn
