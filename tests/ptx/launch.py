"""Running a kernel over its grid."""

import math

import numpy as np

from ptx.decode import decode
from ptx.errors import PtxError, RaceError
from ptx.instructions import tcgen05
from ptx.machine import CTA
from ptx.memory import PARAM_WIN, SHARED_BASE, GlobalMem
from ptx.numerics import DT, u8
from ptx.parsing import Module
from ptx.tensor_map import TensorMap


def dim3(d):
    d = (d,) if isinstance(d, int) else tuple(int(x) for x in d)
    return d + (1,) * (3 - len(d))


last_stats: dict = {}


def run(
    ptx_text,
    entry_name,
    grid,
    block,
    args,
    dynamic_shared=0,
    cluster=None,
    *,
    warps_per_bundle=1,
    reverse=False,
    max_steps=200_000_000,
    strict_mask=False,
    ctas=None,
):
    """Executes entry_name over the grid; arrays in args are global memory and written in place.
    ctas restricts execution to some (x, y, z) block indices, to sample a large launch.
    warps_per_bundle > 1 runs warps in lockstep (faster); reverse starts the highest warps first."""
    if cluster is not None and math.prod(dim3(cluster)) != 1:
        raise NotImplementedError("clusters of more than one CTA")
    mod = Module(ptx_text)
    K = decode(mod.kernel(entry_name))
    grid = dim3(grid)
    block = dim3(block)
    for a, lim in K.attrs.items():
        if (a == "maxntid" and math.prod(block) > math.prod(lim)) or (a == "reqntid" and tuple(block) != dim3(lim)):
            raise PtxError(f"block {block} violates .{a} {lim}")
    G = GlobalMem()
    tmaps = {}
    symbols = {}
    if len(args) != len(K.params):
        raise PtxError(f"{entry_name} has {len(K.params)} parameters, got {len(args)} arguments")
    buf = bytearray()
    for (name, ty, n, al), a in zip(K.params, args, strict=True):
        buf += bytes(-len(buf) % al)
        off = len(buf)
        symbols[name] = off
        w = DT[ty].itemsize
        if n is not None:
            if isinstance(a, (bytes, bytearray)):
                buf += a.ljust(n, b"\0")
                continue
            for j, t in enumerate([a] if isinstance(a, TensorMap) else a):
                tmaps[off + 128 * j] = tmaps[PARAM_WIN + off + 128 * j] = (t, G.add(t.array))
                assert 128 * (j + 1) <= n
            buf += bytes(n)
        elif (isinstance(a, np.ndarray) and a.ndim + a.size > 1) or (
            isinstance(a, np.ndarray) and w == 8 and ty[0] in "ub"
        ):
            if w != 8:
                raise PtxError(f"array passed for .{ty} parameter {name}")
            buf += G.add(a).to_bytes(8, "little")
        elif isinstance(a, (np.generic, np.ndarray)):
            if a.nbytes != w:
                raise PtxError(f"{a.nbytes}-byte scalar for .{ty} parameter {name}")
            buf += a.tobytes()
        elif isinstance(a, float) and ty[0] != "f":
            raise PtxError(f"Python float for .{ty} parameter {name}: pass np.float32/np.float64")
        else:
            buf += np.array(a, DT["s" + ty[1:]] if ty[0] in "bus" and a < 0 else DT[ty]).tobytes()
    smem = SHARED_BASE
    stat = {**{n: v[1:] for n, v in mod.vars.items() if v[0] == "shared"}, **K.shared}
    for n, (al, size, _) in stat.items():
        if size is not None:
            smem = -(-smem // al) * al
            symbols[n] = smem
            smem += size
    if any(size is None for _, size, _ in stat.values()) or dynamic_shared:
        smem = -(-smem // 1024) * 1024
    for n, (_, size, _) in stat.items():
        if size is None:
            symbols[n] = smem
    smem += dynamic_shared
    local = 0
    for n, (al, size, _) in K.local.items():
        local = -(-local // al) * al
        symbols[n] = local
        local += size
    for n, (sp, _, size, data) in mod.vars.items():
        if sp != "shared":
            symbols[n] = G.add(np.frombuffer((data or b"").ljust(size or 0, b"\0"), u8).copy()) if size else 0
    opts = dict(warps_per_bundle=warps_per_bundle, reverse=reverse, max_steps=max_steps, strict_mask=strict_mask)
    steps = lanes = 0
    with np.errstate(all="ignore"):
        for cta in np.ndindex(*grid[::-1]) if ctas is None else [dim3(c)[::-1] for c in ctas]:
            c = CTA(K, G, grid, block, cta[::-1], buf, symbols, smem, local, tmaps, opts)
            c.run()
            for b in c.bulk:
                b[2]()  # un-waited bulk stores still complete
            if c.async_q or c.wgmma_busy:
                raise RaceError(f"CTA {cta[::-1]} exited with TMA loads or wgmma in flight")
            tcgen05.check_finished(c)
            steps += c.steps
            lanes += c.lanes
    for a, b in zip(G.arr, G.buf, strict=True):
        if a.flags.writeable:
            a.reshape(-1).view(u8)[:] = b
        elif a.tobytes() != b.tobytes():
            raise PtxError("kernel wrote to a read-only array")
    last_stats.clear()
    last_stats.update(group_instructions=steps, thread_instructions=lanes)


def unsupported(ptx_text):
    """{entry: [messages]} of instructions that are not modelled."""
    mod = Module(ptx_text)
    out = {}
    for e in mod.entries:
        out[e] = []
        decode(mod.kernel(e), collect=out[e])
    return out
