"""Matrix products in tensor memory (Blackwell): "TensorCore 5th Generation Family Instructions", for one CTA.

Products, loads and stores are asynchronous. Products take effect when a tcgen05.commit after them arrives on its
mbarrier, which, as for TMA, happens when no warp can run any more; stores at tcgen05.wait::st. Until then touching the
shared or tensor memory involved is an error. A load delivers its registers at once ("Canonical Synchronization
Patterns": a register dependency orders), but what it reads may be overwritten only after tcgen05.wait::ld.

Modelled: kind::f16 with M = 128 and float32 sums, A in shared or in tensor memory, without scaling, sparsity or lane
masks; ld and st of the shapes 32x32b, 16x128b and 16x256b without (un)packing; not cp, shift and cta_group::2.
"""

import re

import numpy as np

from ptx_simulator.decode import op
from ptx_simulator.errors import PtxError, RaceError
from ptx_simulator.instructions.wgmma import wgmma_bytes
from ptx_simulator.memory import SHARED_BASE
from ptx_simulator.numerics import bf16_val, canon, f32, f64, u8, u16, u32
from ptx_simulator.operands import address, dst, src
from ptx_simulator.parsing import Mem, Reg, Vec
from ptx_simulator.tensor_memory import TensorMem

K = 16  # of one kind::f16 product


@op("tcgen05")
def _tcgen05(kernel, ins):
    what = ins.mods[0]
    if what not in FORMS:
        ins.bad()
    pattern, builder = FORMS[what]
    form = re.fullmatch(pattern, ".".join(ins.mods))
    if not form:
        ins.bad()
    ins.mods.clear()
    return builder(kernel, ins, form)


def tensor_memory(cta):
    if cta.tensor_memory is None:
        raise PtxError("tensor memory is used before tcgen05.alloc")
    return cta.tensor_memory


def uniform(cta, sel, w, values):
    """The one value that the lanes of warp w agree on."""
    values = np.unique(np.broadcast_to(values, cta.n(sel))[np.flatnonzero(cta.ids(sel) // 32 == w)])
    if len(values) != 1:
        raise PtxError("tcgen05 operand differs between lanes")
    return int(values[0])


def _alloc(kernel, ins, form):
    """tcgen05.alloc [shared address], columns: stores the address of the columns."""
    a = address(kernel, ins, ins.ops[0])
    n = src(kernel, ins, ins.ops[1], "u32")

    def fn(cta, sel):
        for w in cta.full(sel):
            if cta.tensor_memory is None:
                cta.tensor_memory = TensorMem(cta.num_warps + 1)
            start = cta.tensor_memory.allocate(uniform(cta, sel, w, n(cta, sel)))
            where = np.array([uniform(cta, sel, w, a(cta, sel))])
            cta.store("shared", np.array([w * 32]), where, np.array([[start]], u32).view(u8))

    return fn


def _dealloc(kernel, ins, form):
    a = src(kernel, ins, ins.ops[0], "u32")
    n = src(kernel, ins, ins.ops[1], "u32")

    def fn(cta, sel):
        for w in cta.full(sel):
            start = uniform(cta, sel, w, a(cta, sel))
            tensor_memory(cta).deallocate(cta, w, start, uniform(cta, sel, w, n(cta, sel)))

    return fn


def _relinquish(kernel, ins, form):
    def fn(cta, sel):
        cta.full(sel)
        tensor_memory(cta).may_allocate = False

    return fn


def _fence(kernel, ins, form):
    """fence::after_thread_sync: products that this warp knows to be complete may be read."""
    after = form[1] == "after"

    def fn(cta, sel):
        for w in cta.warps(sel):
            if after:
                cta.fenced_products[w] = cta.vc[w, cta.tensor_core]

    return fn


def fragment(shape, num):
    """(lane of tensor memory, column) of every register of every thread, each (32, registers)."""
    t, j = np.arange(32)[:, None], np.arange({"32x32b": 1, "16x128b": 2, "16x256b": 4}[shape] * num)[None, :]
    if shape == "32x32b":
        return np.broadcast_arrays(t, j)
    if shape == "16x128b":  # 8 x 4 cells a register
        return np.broadcast_arrays(t // 4 + 8 * (j % 2), t % 4 + 4 * (j // 2))
    return np.broadcast_arrays(t // 4 + 8 * (j // 2 % 2), 2 * (t % 4) + j % 2 + 8 * (j // 4))


def _cells(cta, w, taddr, shape, num):
    """(rows, cols) of an access of warp w, which reaches a quarter of the lanes."""
    lane, column = taddr >> 16, taddr & 0xFFFF
    if lane >= 32 and lane // 32 != w % 4:
        raise PtxError(f"warp {w} cannot reach lane {lane} of tensor memory")
    lane %= 32
    if lane % (32 if shape == "32x32b" else 16):
        raise PtxError(f"tensor memory lane {lane} for shape {shape}")
    rows, cols = fragment(shape, num)
    return rows + lane + 32 * (w % 4), cols + column


def _load_store(kernel, ins, form):
    """tcgen05.ld registers, [address] and tcgen05.st [address], registers."""
    load, shape, num = form[1] == "ld", form[2], int(form[3])
    reg, mem = ins.ops if load else ins.ops[::-1]
    items = reg.items if isinstance(reg, Vec) else (reg,)
    if len(items) != fragment(shape, num)[0].shape[1] or not all(isinstance(r, Reg) for r in items):
        ins.bad("operands")
    a = address(kernel, ins, mem)
    regs = [(dst if load else src)(kernel, ins, r, "b32") for r in items]

    def ld(cta, sel):
        tm = tensor_memory(cta)
        for w in cta.full(sel):
            rows, cols = _cells(cta, w, uniform(cta, sel, w, a(cta, sel)), shape, num)
            tm.check_read(cta, w, rows, cols, fenced=True)
            tm.pending_reads[rows, cols] += 1
            lanes = np.arange(w * 32, w * 32 + 32)
            for j, d in enumerate(regs):
                d(cta, lanes, tm.data[rows[:, j], cols[:, j]])

            def complete(w=w, rows=rows, cols=cols):
                tm.pending_reads[rows, cols] -= 1
                tm.read_clock[w, rows, cols] = cta.vc[w, w]

            cta.tensor_loads[w].append(complete)

    def st(cta, sel):
        tm = tensor_memory(cta)
        for w in cta.full(sel):
            rows, cols = _cells(cta, w, uniform(cta, sel, w, a(cta, sel)), shape, num)
            tm.check_write(cta, w, rows, cols)
            tm.pending_writes[rows, cols] += 1
            tm.mma_thread[rows, cols] = -1
            lanes = np.arange(w * 32, w * 32 + 32)
            values = np.stack([np.broadcast_to(x(cta, lanes), 32) for x in regs], 1)

            def land(w=w, rows=rows, cols=cols, values=values):
                tm.pending_writes[rows, cols] -= 1
                tm.put(cta, w, rows, cols, values)

            cta.tensor_stores[w].append(land)

    return ld if load else st


def _wait(kernel, ins, form):
    def fn(cta, sel):
        for w in cta.full(sel):
            waiting = (cta.tensor_loads if form[1] == "ld" else cta.tensor_stores)[w]
            for complete in waiting:
                complete()
            waiting.clear()

    return fn


def instruction_descriptor(bits):
    """(value type, A is M-major, B is N-major, N) of the "Instruction descriptor" of kind::f16."""
    types = {0: "f16", 1: "bf16"}
    a, b, n, m = bits >> 7 & 7, bits >> 10 & 7, (bits >> 17 & 63) * 8, (bits >> 24 & 31) * 16
    reserved = bits & ~(3 << 4 | 7 << 7 | 7 << 10 | 3 << 15 | 63 << 17 | 31 << 24)
    if bits >> 4 & 3 != 1 or a not in types or a != b or m != 128 or reserved:
        raise NotImplementedError(f"tcgen05 instruction descriptor {bits:#x}")
    if n % 16 or not 16 <= n <= 256:
        raise PtxError(f"tcgen05 instruction descriptor: N = {n} with M = 128")
    return types[a], bool(bits >> 15 & 1), bool(bits >> 16 & 1), n


def operand_bytes(cta, desc, mn, mn_major):
    """Byte addresses of an operand in shared memory; the descriptor is wgmma's, with one more bit of layout type."""
    if desc >> 46 & 7 not in (0, 1) or desc >> 49 & 0xFFF or desc >> 61 & 1:  # fixed, base offset..., 32-byte atoms
        raise NotImplementedError(f"tcgen05 shared memory descriptor {desc:#x}")
    ix = wgmma_bytes(desc, mn, K, mn_major)
    if ix.min() < SHARED_BASE or ix.max() >= cta.shared.size:
        raise PtxError("tcgen05 operand outside shared memory")
    return ix


def _values(raw, ty):
    bits = np.ascontiguousarray(raw).view(u16)
    return bf16_val(bits).astype(f64) if ty == "bf16" else bits.view(np.float16).astype(f64)


def _mma(kernel, ins, form):
    """tcgen05.mma [d], a-desc or [a], b-desc, instruction descriptor, accumulate: issued by one thread."""
    if len(ins.ops) != 5 or not isinstance(ins.ops[0], Mem):
        ins.bad("operands")
    in_tensor_memory = isinstance(ins.ops[1], Mem)
    d = address(kernel, ins, ins.ops[0])
    a = address(kernel, ins, ins.ops[1]) if in_tensor_memory else src(kernel, ins, ins.ops[1], "b64")
    b = src(kernel, ins, ins.ops[2], "b64")
    idesc = src(kernel, ins, ins.ops[3], "u32")
    accumulate = src(kernel, ins, ins.ops[4], "pred")
    lanes = np.arange(128)[:, None]

    def fn(cta, sel):
        operands = [np.broadcast_to(x(cta, sel), cta.n(sel)) for x in (d, a, b, idesc, accumulate)]
        for thread, *values in zip(cta.ids(sel), *operands, strict=True):
            issue(cta, int(thread), *(int(v) for v in values))

    def issue(cta, thread, d, a, b, idesc, accumulate):
        tm, w, one = tensor_memory(cta), thread // 32, np.array([thread])
        ty, a_mn_major, b_mn_major, n = instruction_descriptor(idesc)
        if d >> 16:
            raise PtxError(f"tcgen05.mma into lane {d >> 16} with M = 128")
        cols = d + np.arange(n)[None, :]
        if accumulate and not (tm.init | ((tm.pending_writes > 0) & (tm.mma_thread == thread)))[lanes, cols].all():
            raise PtxError("tcgen05.mma adds to uninitialised tensor memory")
        tm.check_write(cta, w, lanes, cols, thread)
        b_bytes = operand_bytes(cta, b, n, b_mn_major)
        shared = [b_bytes]
        if in_tensor_memory:
            if a_mn_major or a >> 16:
                raise NotImplementedError("tcgen05.mma with A in tensor memory, transposed or from another lane")
            a_cols = a + np.arange(K // 2)[None, :]
            tm.check_read(cta, w, lanes, a_cols, fenced=False)
            if np.isin(a_cols, cols).any():
                raise PtxError("tcgen05.mma with overlapping A and D")
            tm.pending_reads[lanes, a_cols] += 1
        else:
            a_bytes = operand_bytes(cta, a, 128, a_mn_major)
            shared.append(a_bytes)
        for ix in shared:
            cta.shared.check_read(cta, one, ix.reshape(1, -1), np.array([w]), async_proxy=True)
            np.add.at(cta.shared.pending_reads, ix.reshape(-1), 1)
        tm.pending_writes[lanes, cols] += 1
        tm.mma_thread[lanes, cols] = thread
        clock = cta.vc[w].copy()

        def land():
            agent = cta.tensor_core
            cta.vc[agent] = np.maximum(cta.vc[agent], clock)
            cta.vc[agent, agent] += 1
            if in_tensor_memory:
                x = _values(tm.data[lanes, a_cols], ty)
                tm.pending_reads[lanes, a_cols] -= 1
                tm.read_clock[agent, lanes, a_cols] = cta.vc[agent, agent]
            else:
                x = _values(cta.shared.buf[a_bytes], ty)[..., 0]
            y = _values(cta.shared.buf[b_bytes], ty)[..., 0]
            for ix in shared:
                np.subtract.at(cta.shared.pending_reads, ix.reshape(-1), 1)
                cta.shared.read_clock[agent, ix] = cta.vc[agent, agent]
            total = x @ y.T
            if accumulate:
                total = total + tm.data[lanes, cols].view(f32)
            tm.pending_writes[lanes, cols] -= 1
            tm.put(cta, agent, lanes, cols, canon(total.astype(f32)).view(u32))

        cta.products.setdefault(thread, []).append(land)

    return fn


def _commit(kernel, ins, form):
    """tcgen05.commit: arrives on an mbarrier when the products this thread issued so far are complete."""
    a = address(kernel, ins, ins.ops[0])
    if len(ins.ops) != 1:
        ins.bad("operands")

    def fn(cta, sel):
        for thread, where in zip(cta.ids(sel), a(cta, sel), strict=True):
            bar = cta.mbar(np.array([thread]), where)
            products = cta.products.pop(int(thread), [])
            clock = cta.vc[thread // 32].copy()

            def land(bar=bar, products=products, clock=clock):
                for product in products:
                    product()
                agent = cta.tensor_core
                cta.vc[agent] = np.maximum(cta.vc[agent], clock)
                cta.mbar_update(bar, arrivals=1, vc=cta.vc[agent])

            cta.async_q.append(land)

    return fn


def check_finished(cta):
    """At the end of a CTA nothing may be in flight or allocated."""
    if cta.products:
        raise RaceError(f"CTA {cta.ctaid} exited with tcgen05.mma that was not committed")
    if any(cta.tensor_stores):
        raise RaceError(f"CTA {cta.ctaid} exited with tcgen05.st in flight")
    if cta.tensor_memory is not None and cta.tensor_memory.allocated:
        raise PtxError(f"CTA {cta.ctaid} exited without tcgen05.dealloc")


FORMS = {
    "alloc": (r"alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32", _alloc),
    "dealloc": (r"dealloc\.cta_group::1\.sync\.aligned\.b32", _dealloc),
    "relinquish_alloc_permit": (r"relinquish_alloc_permit\.cta_group::1\.sync\.aligned", _relinquish),
    "fence::before_thread_sync": (r"fence::(before)_thread_sync", _fence),
    "fence::after_thread_sync": (r"fence::(after)_thread_sync", _fence),
    "ld": (r"(ld)\.sync\.aligned\.(32x32b|16x128b|16x256b)\.x(\d+)\.b32", _load_store),
    "st": (r"(st)\.sync\.aligned\.(32x32b|16x128b|16x256b)\.x(\d+)\.b32", _load_store),
    "wait::ld": (r"wait::(ld)\.sync\.aligned", _wait),
    "wait::st": (r"wait::(st)\.sync\.aligned", _wait),
    "mma": (r"mma\.cta_group::1\.kind::f16", _mma),
    "commit": (r"commit\.cta_group::1\.mbarrier::arrive::one\.shared::(cluster|cta)\.b64", _commit),
}
