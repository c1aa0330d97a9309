"""Execution of one thread block: registers, scheduling, divergence, barriers, vector clocks.

Registers are numpy vectors over the threads. An instruction is executed for a selection of threads: a slice (a whole
bundle of warps) or an array of thread ids, called `sel` everywhere.
"""

import collections
import math

import numpy as np

from ptx_simulator.errors import DeadlockError, PtxError, RaceError, Reconverge
from ptx_simulator.memory import GLOBAL0, WIN, LocalMem, ParamMem, SharedMem
from ptx_simulator.numerics import DT, UDT, i32, i64, u32

JUNK = 0x7FE57FE57FE57FE5  # initial register contents: a NaN as f64, f32, f16 and bf16, in each half


# Asynchronous agents that carry out TMA loads, one for each mbarrier (if there are more, some share): a load that has
# completed says nothing of another that was started before it.
COPY_AGENTS = 64


class MBar:
    """mbarrier object: pending arrivals, tx-count and phase; `agent` fills what it guards."""

    def __init__(self, count, agents, init, agent):
        self.init = init
        self.agent = agent
        self.count = self.pending = count
        self.tx = self.phase = 0
        self.vc = np.zeros(agents, i32)
        self.done_vc = self.vc.copy()
        self.waiters = []


class CTA:
    """One thread block being executed."""

    def __init__(self, kernel, memory, grid, block, ctaid, params, symbols, smem, local, tensor_maps, opts):
        self.kernel = kernel
        self.global_memory = memory
        self.grid = grid
        self.block = block
        self.ctaid = ctaid
        self.symbols = symbols
        self.tensor_maps = tensor_maps
        n = math.prod(block)
        self.num_warps = nw = -(-n // 32)
        N = self.N = nw * 32
        lin = np.arange(N)
        self.tid = (lin % block[0], lin // block[0] % block[1], lin // (block[0] * block[1]))
        self.registers = [
            np.zeros(N, bool) if t == "pred" else np.full(N, JUNK & (1 << 8 * DT[t].itemsize) - 1, UDT[DT[t].itemsize])
            for t in kernel.regtypes
        ]
        self.lane_ids = lin
        self.pc = np.zeros(N, i64)
        self.alive = lin < n
        self.blocked = np.zeros(N, bool)
        self.reconv = np.zeros(N, bool)  # waits for the other lanes of its warp
        # Vector clocks: vc[i, j] is the last moment of j that i knows of; warps, the tensor core, then copies
        self.tensor_core = nw
        self.first_copy = nw + 1
        self.vc = np.zeros((nw + 1 + COPY_AGENTS,) * 2, i32)
        np.fill_diagonal(self.vc, 1)
        self.shared = SharedMem(smem, nw)
        self.local = LocalMem(N, local)
        self.param = ParamMem(params)
        self.bars = {}  # bar.sync: number -> who arrived
        self.mbars = {}  # shared address -> MBar
        self.mbars_made = 0
        self.async_q = collections.deque()  # TMA loads and tcgen05.commit: what happens when they complete
        self.copies, self.copy_commits = [], np.zeros(N, i64)  # cp.async
        self.bulk, self.bulk_commits = [], np.zeros(N, i64)  # cp.async.bulk stores
        self.wgmmas, self.wgmma_commits = [[] for _ in range(nw)], [0] * nw
        self.unfenced = [{-1} for _ in range(nw)]  # registers touched since wgmma.fence
        self.tensor_memory = None  # made by tcgen05.alloc
        self.tensor_loads = [[] for _ in range(nw)]  # tcgen05.ld and .st: what their wait does
        self.tensor_stores = [[] for _ in range(nw)]
        self.fenced_products = np.zeros(nw, i32)  # clock of the tensor core at tcgen05.fence::after_thread_sync
        self.products = {}  # thread -> tcgen05.mma not yet committed
        self.steps = 0
        self.lanes = 0
        self.opts = opts

    # -- selections: a slice (whole bundle) or an index array
    def ids(self, sel):
        return self.lane_ids[sel]

    def n(self, sel):
        return sel.stop - sel.start if isinstance(sel, slice) else len(sel)

    def warps(self, sel):
        return np.unique(self.ids(sel) // 32)

    def symbol(self, name):
        if name not in self.symbols:
            raise NotImplementedError(f"symbol {name}")
        return self.symbols[name]

    def fault(self, sel, lane, msg, error=PtxError):
        raise error(f"thread {int(self.ids(sel)[lane])} (lane {int(self.ids(sel)[lane]) % 32}): {msg}")

    def full(self, sel):
        """Warp-collective `.aligned`: all 32 lanes must be here; otherwise wait for the stragglers."""
        t = self.ids(sel)
        if len(t) % 32 == 0 and (
            isinstance(sel, slice)
            or ((t[::32] % 32 == 0).all() and (t.reshape(-1, 32) == t[::32, None] + np.arange(32)).all())
        ):
            if self.alive[sel].all():
                return t[::32] // 32
        missing = np.setdiff1d(np.flatnonzero(np.isin(self.lane_ids // 32, t // 32)), t)
        if not self.alive[missing].all():
            raise PtxError(f"warp-collective with exited lanes, e.g. thread {missing[~self.alive[missing]][0]}")
        raise Reconverge

    def has_lanes(self, sel, mask):
        """`.sync` with a member mask: named lanes must be converged here."""
        t = self.ids(sel)
        here = np.zeros(self.N, bool)
        here[t] = True
        mask = np.broadcast_to(np.asarray(mask, u32), t.shape)
        for w in self.warps(sel):
            k = t[t // 32 == w]
            mk = np.unique(mask[t // 32 == w])
            if len(mk) != 1:
                raise PtxError("member masks differ within a warp")
            lanes = w * 32 + np.flatnonzero((int(mk[0]) >> np.arange(32)) & 1)
            if not np.isin(k, lanes).all():
                raise PtxError("executing lane is not in its member mask")
            need = lanes[self.alive[lanes]] if int(mk[0]) == 0xFFFFFFFF and not self.opts["strict_mask"] else lanes
            if not self.alive[need].all():
                raise PtxError("member mask names an exited lane")
            if not here[need].all():
                raise Reconverge

    # -- memory dispatch
    def access(self, space, sel, a, n):
        """(memory, offsets, sub-selection) after resolving generic addresses and checking alignment."""
        if n > 1 and (a & (n - 1)).any():
            self.fault(
                sel,
                np.argmax((a & (n - 1)) != 0),
                f"misaligned {n}-byte access at {int(a[np.argmax((a & (n - 1)) != 0)]):#x}",
            )
        if space == "generic":
            win = np.where(a >= GLOBAL0, 0, a >> 40)
            k = np.unique(win)
            if len(k) > 1:
                raise NotImplementedError("generic access to several state spaces in one instruction")
            if len(k) == 1 and k[0]:
                space = {1: "shared", 2: "local", 3: "param"}.get(int(k[0]))
                a = a & (WIN * 256 - 1)
            elif len(k):
                space = "global" if (a >= GLOBAL0).all() else None
            if space is None:
                self.fault(sel, 0, f"generic address {int(a[0]):#x} in no window")
        return {
            "global": self.global_memory,
            "const": self.global_memory,
            "shared": self.shared,
            "local": self.local,
            "param": self.param,
        }[space], a

    def load(self, space, sel, a, n):
        mem, a = self.access(space, sel, a, n)
        return mem.load(self, sel, a, n)

    def store(self, space, sel, a, v):
        mem, a = self.access(space, sel, a, v.shape[1])
        mem.store(self, sel, a, np.ascontiguousarray(v))

    # -- scheduling
    def release(self, w):
        v = self.vc[w].copy()
        self.vc[w, w] += 1
        return v

    def wake(self, ids):
        self.blocked[ids] = False
        for w in np.unique(ids // 32):
            self.reconv[w * 32 : w * 32 + 32] = False

    def run(self):
        step = 32 * self.opts["warps_per_bundle"]
        bundles = [(b, min(b + step, self.N)) for b in range(0, self.N, step)]
        if self.opts["reverse"]:
            bundles.reverse()
        while self.alive.any():
            progress = False
            for lo, hi in bundles:
                if (self.alive[lo:hi] & ~self.blocked[lo:hi] & ~self.reconv[lo:hi]).any():
                    self.run_bundle(lo, hi)
                    progress = True
            if not progress:
                if self.async_q:
                    self.async_q.popleft()()
                else:
                    raise DeadlockError("deadlock: " + "; ".join(self.where_warps_wait()))

    def where_warps_wait(self):
        """One line of text for every warp that has not exited."""
        for w in range(self.num_warps):
            lanes = np.flatnonzero(self.alive & (self.lane_ids // 32 == w))
            if len(lanes):
                at = [(p, int((self.pc[lanes] == p).sum()), self.kernel.ins[p]) for p in np.unique(self.pc[lanes])]
                yield f"warp {w}: " + ", ".join(f"{n} lanes at line {i.line} `{i.text[:60]}`" for _, n, i in at)

    def run_bundle(self, lo, hi):
        ins = self.kernel.ins
        end = len(self.kernel.ins)
        pc = self.pc
        while True:
            act = self.alive[lo:hi] & ~self.blocked[lo:hi] & ~self.reconv[lo:hi]
            if not act.any():
                return
            pcs = pc[lo:hi]
            p = int(pcs[act].min())
            grp = act & (pcs == p)
            stop = int(pcs[act & ~grp].min()) if (act & ~grp).any() else end
            sel = slice(lo, hi) if grp.all() else lo + np.flatnonzero(grp)
            n = self.n(sel)
            try:
                while p < stop:
                    i = ins[p]
                    self.steps += 1
                    self.lanes += n
                    if self.wgmma_busy:
                        self.check_inflight(i, sel)
                    if i.touches:
                        for w in self.warps(sel):
                            self.unfenced[w] |= i.touches
                    if i.ctl:
                        pc[sel] = p + 1
                        if i.fn(self, sel) == "yield":
                            return
                        break
                    i.fn(self, sel)
                    p += 1
                else:
                    pc[sel] = p
                if p >= end:
                    self.exit(sel)
                if self.steps > self.opts["max_steps"]:
                    raise DeadlockError(f"more than {self.opts['max_steps']} steps")
            except Reconverge:
                pc[sel] = p
                here = np.isin(self.lane_ids // 32, self.warps(sel)) & self.reconv & (pc == p)
                if here.any():
                    self.reconv[here] = False  # lanes already waiting at this instruction: merge
                else:
                    self.reconv[sel] = True
            except (PtxError, NotImplementedError) as e:
                raise type(e)(f"CTA {self.ctaid}, line {ins[p].line} `{ins[p].text[:140]}`: {e}") from None

    def exit(self, sel):
        self.alive[sel] = False
        for w in self.warps(sel):
            self.reconv[w * 32 : w * 32 + 32] = False
        for b in list(self.bars):
            self.bar_check(b)

    # -- bar.sync
    def bar_arrive(self, sel, bid, count, wait):
        for w in self.full(sel):
            key = int(bid[np.searchsorted(self.ids(sel), w * 32)] if len(bid) > 1 else bid[0])
            if not 0 <= key < 16:
                raise PtxError(f"barrier {key}")
            b = self.bars.setdefault(key, dict(n=count, warps=[], wait=[]))
            if b["n"] != count:
                raise PtxError(f"barrier {key}: counts {b['n']} and {count}")
            if w in b["warps"]:
                raise PtxError(f"warp {w} arrives twice at barrier {key}")
            b["warps"].append(w)
            if wait:
                b["wait"].append(w)
                self.blocked[w * 32 : w * 32 + 32] = True
            self.bar_check(key)

    def bar_check(self, key):
        b = self.bars[key]
        n = b["n"] or 32 * len(np.unique(np.flatnonzero(self.alive) // 32))
        if n % 32:
            raise PtxError("barrier count must be a multiple of 32")
        if len(b["warps"]) * 32 > n:
            raise PtxError(f"too many arrivals at barrier {key}")
        if len(b["warps"]) * 32 == n:
            j = self.vc[b["warps"]].max(0)
            del self.bars[key]
            for w in b["warps"]:
                if w in b["wait"]:
                    self.vc[w] = j
                    self.wake(np.arange(w * 32, w * 32 + 32))
                self.vc[w, w] += 1

    # -- mbarrier
    def mbar(self, sel, addr):
        mb = self.mbars.get(int(addr))
        if mb is None:
            self.fault(sel, 0, f"no mbarrier initialised at shared {int(addr):#x}")
        if self.vc[self.ids(sel)[0] // 32, mb.init[0]] < mb.init[1]:
            self.fault(sel, 0, "race: mbarrier use not ordered after its init", RaceError)
        return mb

    def mbar_update(self, mb, arrivals=0, tx=0, vc=None):
        if vc is not None:
            mb.vc = np.maximum(mb.vc, vc)
        mb.pending -= arrivals
        mb.tx += tx
        if mb.pending < 0:
            raise PtxError("mbarrier: more arrivals than expected in this phase")
        if mb.pending == 0 and mb.tx == 0:
            mb.phase += 1
            mb.pending = mb.count
            mb.done_vc = mb.vc.copy()
            for ids in mb.waiters:
                self.wake(ids)
            mb.waiters = []

    # -- wgmma registers in flight
    wgmma_busy = False

    def check_inflight(self, i, sel):
        for w in self.warps(sel):
            for g in self.wgmmas[w]:
                hit = i.regs & g["regs"]
                if hit and not (
                    i.name == "wgmma" and "mma_async" in i.opcode and not (i.regs & g["aregs"]) and g["acc"] == i.acc
                ):
                    raise RaceError(f"warp {w}: register used by wgmma.mma_async (line {g['line']}) in flight")
