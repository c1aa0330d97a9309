"""Tensor memory (Blackwell): 128 lanes of 512 32-bit columns, with allocation, in-flight and race shadow state.

A warp reaches the 32 lanes that belong to its place in its warpgroup. Matrix products are made by the tensor core, an
agent of its own in the vector clocks.
"""

import numpy as np

from ptx_simulator.errors import PtxError, RaceError
from ptx_simulator.numerics import i32, u32

LANES, COLUMNS = 128, 512


class TensorMem:
    """Tensor memory of one CTA; (rows, cols) are index arrays that broadcast against each other."""

    def __init__(self, agents):
        shape = (LANES, COLUMNS)
        self.data = np.zeros(shape, u32)
        self.init = np.zeros(shape, bool)
        self.writer = np.zeros(shape, np.int16)
        self.write_clock = np.zeros(shape, i32)
        self.read_clock = np.zeros((agents, *shape), i32)
        self.pending_writes = np.zeros(shape, np.int16)
        self.pending_reads = np.zeros(shape, np.int16)
        self.mma_thread = np.full(shape, -1, i32)  # that issued the last product into the cell
        self.allocated = {}  # first column -> number of columns
        self.may_allocate = True

    def allocate(self, n):
        """The first column of n free ones."""
        if not self.may_allocate:
            raise PtxError("tcgen05.alloc after tcgen05.relinquish_alloc_permit")
        if n < 32 or n > COLUMNS or n & (n - 1):
            raise PtxError(f"tcgen05.alloc of {n} columns: not a power of two from 32 to {COLUMNS}")
        for start in range(0, COLUMNS - n + 1, n):
            if all(start + n <= c or c + k <= start for c, k in self.allocated.items()):
                self.allocated[start] = n
                self.init[:, start : start + n] = False
                return start
        raise PtxError(f"tcgen05.alloc of {n} columns: only smaller gaps are free, it would wait for ever")

    def deallocate(self, cta, w, start, n):
        """Frees columns; every access to them must be over, and before this in the order of events.

        Of a load it suffices that its registers are there, so one without tcgen05.wait::ld is let through.
        """
        if self.allocated.get(start) != n:
            raise PtxError(f"tcgen05.dealloc of {n} columns at {start:#x}, which were not allocated so")
        self.check_write(cta, w, np.arange(LANES)[:, None], np.arange(start, start + n)[None, :], loads_matter=False)
        del self.allocated[start]

    def check_bounds(self, rows, cols):
        inside = np.zeros(np.shape(cols), bool)
        for start, n in self.allocated.items():
            inside |= (cols >= start) & (cols < start + n)
        if not inside.all() or np.min(rows) < 0 or np.max(rows) >= LANES:
            raise PtxError(f"tensor memory access outside an allocation, column {int(np.max(cols))}")

    def check_read(self, cta, w, rows, cols, fenced):
        """A read by warp w; `fenced`: products count as seen only at its last tcgen05.fence::after_thread_sync."""
        self.check_bounds(rows, cols)
        if (self.pending_writes[rows, cols] > 0).any():
            raise RaceError("read of tensor memory being written asynchronously (missing wait)")
        if not self.init[rows, cols].all():
            raise PtxError("read of uninitialised tensor memory")
        writer = self.writer[rows, cols]
        seen = cta.vc[w, writer]
        if (self.write_clock[rows, cols] > seen).any():
            raise RaceError("race: tensor memory read not ordered after write")
        if fenced and ((writer == cta.tensor_core) & (self.write_clock[rows, cols] > cta.fenced_products[w])).any():
            raise RaceError("tensor memory read without tcgen05.fence::after_thread_sync since the product")

    def check_write(self, cta, w, rows, cols, thread=None, loads_matter=True):
        """A write by warp w; products of one `thread` are pipelined, so they may follow each other at once."""
        self.check_bounds(rows, cols)
        own = (self.mma_thread[rows, cols] == thread) if thread is not None else np.zeros(1, bool)
        if ((self.pending_writes[rows, cols] > 0) & ~own).any():
            raise RaceError("write to tensor memory being written asynchronously (missing wait)")
        if loads_matter and (self.pending_reads[rows, cols] > 0).any():
            raise RaceError("write to tensor memory being read asynchronously (missing wait)")
        own = own & (self.writer[rows, cols] == cta.tensor_core)
        if ((self.write_clock[rows, cols] > cta.vc[w, self.writer[rows, cols]]) & ~own).any():
            raise RaceError("race: tensor memory write not ordered after write")
        if (self.read_clock[:, rows, cols] > cta.vc[w][: len(self.read_clock), None, None]).any():
            raise RaceError("race: tensor memory write not ordered after read")

    def put(self, cta, agent, rows, cols, values):
        self.data[rows, cols] = values
        self.init[rows, cols] = True
        self.writer[rows, cols] = agent
        self.write_clock[rows, cols] = cta.vc[agent, agent]
