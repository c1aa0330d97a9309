"""The state spaces: global, shared, local and parameter memory, each with what it checks.

`SharedMem` holds the shadow state of race detection: for every byte its last writer, the last read by each warp (both
as vector clock entries), and what is in flight.
"""

import bisect

import numpy as np

from ptx_simulator.errors import PtxError, RaceError
from ptx_simulator.numerics import i32, u8

# Generic address windows ("State Spaces": generic addressing); global allocations start at GLOBAL0.
SHARED_WIN = 1 << 40
LOCAL_WIN = 2 << 40
PARAM_WIN = 3 << 40
WIN = 1 << 32
GLOBAL0 = 1 << 44
SHARED_BASE = 1024  # first shared offset; 1024-aligned so that swizzle phase is as on hardware


class GlobalMem:
    """Flat global space: one guarded allocation per array; user arrays are copied back at the end."""

    def __init__(self):
        self.base = []
        self.buf = []
        self.arr = []
        self.next = GLOBAL0
        self.seen = {}

    def add(self, a):
        key = (a.__array_interface__["data"][0], a.nbytes)
        if key in self.seen:
            return self.seen[key]
        if not a.flags.c_contiguous:
            raise ValueError("array arguments must be C-contiguous")
        if any(a.nbytes and np.may_share_memory(a, b) for b in self.arr):
            raise ValueError("arguments overlap partially")
        self.base.append(self.next)
        self.arr.append(a)
        self.buf.append(np.frombuffer(a.tobytes(), u8).copy())
        self.seen[key] = self.next
        self.next += (a.nbytes + 4095) // 4096 * 4096 + 65536  # guard zone
        return self.base[-1]

    def where(self, cta, sel, a, n, what):
        """(buffer, offsets) groups covering addresses a; raises on any access outside."""
        lo = int(a.min()) if len(a) else 0
        i = bisect.bisect_right(self.base, lo) - 1
        if i >= 0:
            off = a - self.base[i]
            if int(off.max()) + n <= len(self.buf[i]):
                return [(self.buf[i], off, slice(None))]
        idx = np.searchsorted(self.base, a, "right") - 1
        out = []
        for j in np.unique(idx):
            k = np.flatnonzero(idx == j)
            off = a[k] - (self.base[j] if j >= 0 else 0)
            bad = (off + n > len(self.buf[j])) if j >= 0 else np.ones(len(k), bool)
            if bad.any():
                cta.fault(
                    sel,
                    k[np.argmax(bad)],
                    f"global {what} of {n} bytes out of bounds at {int(a[k[np.argmax(bad)]]):#x}"
                    + (f" = allocation {j} + {int(off[np.argmax(bad)])} (size {len(self.buf[j])})" if j >= 0 else ""),
                )
            out.append((self.buf[j], off, k))
        return out

    def load(self, cta, sel, a, n):
        out = np.empty((len(a), n), u8)
        for buf, off, k in self.where(cta, sel, a, n, "load"):
            out[k] = buf[off[:, None] + np.arange(n)]
        return out

    def store(self, cta, sel, a, v):
        for buf, off, k in self.where(cta, sel, a, v.shape[1], "store"):
            ix = off[:, None] + np.arange(v.shape[1])
            buf[ix] = v[k]
            if not np.array_equal(buf[ix], v[k]):
                cta.fault(sel, 0, "lanes store different values to one global address")


class SharedMem:
    """Shared memory of one CTA with initialisation, in-flight and race (vector clock) shadow state."""

    def __init__(self, size, nw):
        self.size, z = size, np.zeros
        self.buf = z(size, u8)
        self.init = z(size, bool)
        self.writer = z(size, np.int16)  # the last one: a warp or an asynchronous agent
        self.write_clock = z(size, i32)  # the writer's own clock at that write
        self.read_clock = z((nw + 1, size), i32)  # each one's clock at its last read
        self.pending_writes = z(size, np.int16)  # asynchronous ones in flight
        self.pending_reads = z(size, np.int16)
        self.dirty = z(size, bool)  # last written by a generic (not TMA) write
        self.fenced = z((nw, size), i32)  # per warp: its clock at its fence.proxy.async after that write

    def index(self, cta, sel, a, n, what):
        bad = (a < SHARED_BASE) | (a + n > self.size)
        if bad.any():
            first = np.argmax(bad)
            valid = f"{SHARED_BASE:#x}..{self.size:#x}"
            cta.fault(sel, first, f"shared {what} of {n} bytes out of bounds at {int(a[first]):#x} (valid {valid})")
        return a[:, None] + np.arange(n)

    def check_read(self, cta, sel, ix, w, async_proxy=False):
        for bad, msg, error in (
            (self.pending_writes[ix] > 0, "read of bytes being written asynchronously (missing wait)", RaceError),
            (~self.init[ix], "read of uninitialised shared memory", PtxError),
            (
                self.write_clock[ix] > cta.vc[w[:, None], self.writer[ix]],
                "race: read not ordered after write",
                RaceError,
            ),
            (
                self.unfenced(cta, ix, w) if async_proxy else np.zeros(1, bool),
                "async-proxy read of generic write without fence.proxy.async",
                RaceError,
            ),
        ):
            if bad.any():
                r, c = np.argwhere(bad)[0]
                q = int(ix[r, c])
                cta.fault(sel, r, f"{msg}, shared byte {q:#x}, last writer warp {self.writer[q]}", error)

    def unfenced(self, cta, ix, w):
        """Generic-proxy bytes without a fence.proxy.async ordered between their write and this access."""
        f = self.fenced[:, ix]
        return self.dirty[ix] & ~((f > 0) & (f <= cta.vc[w][:, : cta.num_warps].T[:, :, None])).any(0)

    def fence(self, cta, w):
        # The first fence after a write is the one that counts: a later one of the same warp takes nothing back.
        ok = self.dirty & (self.fenced[w] == 0) & (self.write_clock <= cta.vc[w][self.writer])
        self.fenced[w, ok] = cta.vc[w, w]

    def check_write(self, cta, sel, ix, w):
        clk = cta.vc[w][:, : len(self.read_clock)]
        for bad, msg in (
            (self.pending_writes[ix] > 0, "write to bytes being written asynchronously or owned by an mbarrier"),
            (self.pending_reads[ix] > 0, "write to bytes being read asynchronously (missing wait)"),
            (
                self.write_clock[ix] > cta.vc[w[:, None], self.writer[ix]],
                "race: write not ordered after write",
            ),
            ((self.read_clock[:, ix] > clk.T[:, :, None]).any(0), "race: write not ordered after read"),
        ):
            if bad.any():
                r, c = np.argwhere(bad)[0]
                cta.fault(sel, r, f"{msg}, shared byte {int(ix[r, c]):#x}", RaceError)

    def load(self, cta, sel, a, n, async_proxy=False):
        ix = self.index(cta, sel, a, n, "load")
        w = cta.ids(sel)[: len(a)] // 32
        self.check_read(cta, sel, ix, w, async_proxy)
        self.read_clock[w[:, None], ix] = cta.vc[w, w][:, None]
        return self.buf[ix]

    def store(self, cta, sel, a, v, check=True):
        ix = self.index(cta, sel, a, v.shape[1], "store")
        w = cta.ids(sel) // 32
        if check:
            self.check_write(cta, sel, ix, w)
        self.put(cta, sel, ix, w, v, True)

    def put(self, cta, sel, ix, w, v, generic):
        self.buf[ix] = v
        self.init[ix] = True
        self.dirty[ix] = generic
        self.fenced[:, ix] = 0
        self.writer[ix] = w[:, None]
        self.write_clock[ix] = cta.vc[w, w][:, None]
        if not np.array_equal(self.buf[ix], v):
            cta.fault(sel, 0, "lanes store different values to one shared address", RaceError)


class LocalMem:
    """Per-thread memory with initialisation tracking; addresses are offsets in the thread's frame."""

    def __init__(self, n, size):
        self.size = size
        self.buf = np.zeros((n, size), u8)
        self.init = np.zeros((n, size), bool)

    def _ix(self, cta, sel, a, n):
        bad = (a < 0) | (a + n > self.size)
        if bad.any():
            cta.fault(sel, np.argmax(bad), "local access out of bounds")
        return cta.ids(sel)[:, None], a[:, None] + np.arange(n)

    def load(self, cta, sel, a, n):
        ix = self._ix(cta, sel, a, n)
        bad = ~self.init[ix].all(1)
        if bad.any():
            cta.fault(sel, np.argmax(bad), "read of uninitialised local memory")
        return self.buf[ix]

    def store(self, cta, sel, a, v):
        ix = self._ix(cta, sel, a, v.shape[1])
        self.buf[ix] = v
        self.init[ix] = True


class ParamMem:
    def __init__(self, data):
        self.data = np.frombuffer(bytes(data), u8)

    def load(self, cta, sel, a, n):
        if len(a) and (a.min() < 0 or a.max() + n > len(self.data)):
            cta.fault(sel, 0, "param load out of bounds")
        return self.data[a[:, None] + np.arange(n)]

    def store(self, cta, sel, a, v):
        cta.fault(sel, 0, "store to param space")
