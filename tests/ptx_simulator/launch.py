"""Running a kernel over its grid."""

import math

import numpy as np

from ptx_simulator.decode import decode
from ptx_simulator.errors import PtxError, RaceError
from ptx_simulator.instructions import tcgen05
from ptx_simulator.machine import CTA
from ptx_simulator.memory import PARAM_WIN, SHARED_BASE, GlobalMem
from ptx_simulator.numerics import DT, u8
from ptx_simulator.parsing import Module
from ptx_simulator.tensor_map import TensorMap


def dim3(d):
    d = (d,) if isinstance(d, int) else tuple(int(x) for x in d)
    return d + (1,) * (3 - len(d))


last_stats: dict = {}  # of the last run: how many instructions were executed


def pack_parameters(kernel, args, memory):
    """(bytes of param space, offsets of parameters by name, tensor maps by address) for the arguments of a launch."""
    if len(args) != len(kernel.params):
        raise PtxError(f"{kernel.name} has {len(kernel.params)} parameters, got {len(args)} arguments")
    buf = bytearray()
    symbols, tensor_maps = {}, {}
    for (name, ty, nbytes, align), arg in zip(kernel.params, args, strict=True):
        buf += bytes(-len(buf) % align)
        offset = len(buf)
        symbols[name] = offset
        width = DT[ty].itemsize
        is_array = isinstance(arg, np.ndarray)
        if nbytes is not None:
            if isinstance(arg, (bytes, bytearray)):
                buf += arg.ljust(nbytes, b"\0")
                continue
            for j, tensor_map in enumerate([arg] if isinstance(arg, TensorMap) else arg):
                entry = (tensor_map, memory.add(tensor_map.array))
                tensor_maps[offset + 128 * j] = tensor_maps[PARAM_WIN + offset + 128 * j] = entry
                assert 128 * (j + 1) <= nbytes
            buf += bytes(nbytes)
        elif is_array and (arg.ndim + arg.size > 1 or (width == 8 and ty[0] in "ub")):
            if width != 8:
                raise PtxError(f"array passed for .{ty} parameter {name}")
            buf += memory.add(arg).to_bytes(8, "little")
        elif is_array or isinstance(arg, np.generic):
            if arg.nbytes != width:
                raise PtxError(f"{arg.nbytes}-byte scalar for .{ty} parameter {name}")
            buf += arg.tobytes()
        elif isinstance(arg, float) and ty[0] != "f":
            raise PtxError(f"Python float for .{ty} parameter {name}: pass np.float32/np.float64")
        else:
            buf += np.array(arg, DT["s" + ty[1:]] if ty[0] in "bus" and arg < 0 else DT[ty]).tobytes()
    return buf, symbols, tensor_maps


def place_variables(module, kernel, dynamic_shared, memory):
    """(addresses of variables by name, end of shared memory, size of a thread's local memory)."""
    symbols = {}
    end = SHARED_BASE
    shared = {**{name: spec[1:] for name, spec in module.vars.items() if spec[0] == "shared"}, **kernel.shared}
    for name, (align, size, _) in shared.items():
        if size is not None:
            end = -(-end // align) * align
            symbols[name] = end
            end += size
    if any(size is None for _, size, _ in shared.values()) or dynamic_shared:
        end = -(-end // 1024) * 1024
    for name, (_, size, _) in shared.items():
        if size is None:
            symbols[name] = end
    end += dynamic_shared
    local = 0
    for name, (align, size, _) in kernel.local.items():
        local = -(-local // align) * align
        symbols[name] = local
        local += size
    for name, (space, _, size, data) in module.vars.items():
        if space != "shared":
            content = np.frombuffer((data or b"").ljust(size or 0, b"\0"), u8).copy()
            symbols[name] = memory.add(content) if size else 0
    return symbols, end, local


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
    module = Module(ptx_text)
    kernel = decode(module.kernel(entry_name))
    grid = dim3(grid)
    block = dim3(block)
    for attribute, limit in kernel.attrs.items():
        too_big = attribute == "maxntid" and math.prod(block) > math.prod(limit)
        if too_big or (attribute == "reqntid" and tuple(block) != dim3(limit)):
            raise PtxError(f"block {block} violates .{attribute} {limit}")
    memory = GlobalMem()
    params, symbols, tensor_maps = pack_parameters(kernel, args, memory)
    variables, shared_end, local = place_variables(module, kernel, dynamic_shared, memory)
    symbols |= variables
    opts = dict(warps_per_bundle=warps_per_bundle, reverse=reverse, max_steps=max_steps, strict_mask=strict_mask)
    steps = lanes = 0
    with np.errstate(all="ignore"):
        for index in np.ndindex(*grid[::-1]) if ctas is None else [dim3(c)[::-1] for c in ctas]:
            cta = CTA(kernel, memory, grid, block, index[::-1], params, symbols, shared_end, local, tensor_maps, opts)
            cta.run()
            if cta.async_q or cta.wgmma_busy:
                raise RaceError(f"CTA {index[::-1]} exited with TMA loads, tcgen05 or wgmma in flight")
            if cta.bulk:
                raise RaceError(f"CTA {index[::-1]} exited with bulk stores that may still read its shared memory")
            tcgen05.check_finished(cta)
            steps += cta.steps
            lanes += cta.lanes
    for array, content in zip(memory.arr, memory.buf, strict=True):
        if array.flags.writeable:
            array.reshape(-1).view(u8)[:] = content
        elif array.tobytes() != content.tobytes():
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
