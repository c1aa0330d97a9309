"""Launches recovered from the dumps of JAX's Mosaic GPU compiler."""

import dataclasses
import pathlib
import re

from ptx_simulator.launch import run
from ptx_simulator.tensor_map import TensorMap


@dataclasses.dataclass
class MosaicLaunch:
    """Launch parameters of a Mosaic GPU kernel, recovered from MOSAIC_GPU_DUMP_TO output."""

    ptx: str
    entry: str
    grid: tuple
    block: tuple
    dynamic_shared: int
    params: list

    def args(self, arrays):
        """arrays: the kernel's operands then results, in jax order -> PTX argument list."""

        def one(p):
            if p[0] == "arg":
                return arrays[p[1]]
            maps = []
            for i, offset, width, sizes, strides, box, span in p[1]:
                if arrays[i].itemsize != width:
                    raise ValueError(f"itemsize of operand {i}")
                maps.append(TensorMap(arrays[i].view(f"u{width}"), sizes, strides, box, span, offset // width))
            return maps

        return [one(p) for p in self.params]

    def run(self, arrays, **kw):
        run(self.ptx, self.entry, self.grid, self.block, self.args(arrays), self.dynamic_shared, **kw)


def mosaic_args(dump_dir):
    """Interprets the host function of the last `Before GpuLaunchLoweringPass` dump: constants, operand
    loads, memref views and mosaic_gpu_init_tma_desc calls are evaluated symbolically."""
    d = pathlib.Path(dump_dir)
    (log,) = d.glob("*.mlir-passes.log")
    (ptx,) = d.glob("*.ptx")
    text = log.read_text().split("IR Dump Before GpuLaunchLoweringPass")[-1].split("// -----//")[0]
    env, descs, mem = {}, {}, {}

    def V(n):
        return env[n]

    # Bytes an element by TMA dtype code, as in launch_context._tma_dma_type
    width = {0: 0.5, 1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2, 9: 4, 10: 8}
    for line in text.splitlines():
        line = re.sub(r"\s*loc\(.*", "", line.strip())
        m = re.match(r"(%[\w#]+) = ([\w.]+)\s*(.*)", line)
        names = re.findall(r"%[\w#]+", line)
        if line.startswith("func.func @"):
            argp = re.findall(r"(%\w+): !llvm\.ptr", line)
        elif m and m[2] in ("llvm.mlir.constant",):
            env[m[1]] = int(re.match(r"\((-?\d+)", m[3])[1])
        elif m and m[2] == "llvm.getelementptr":
            b, k = re.match(r"(%\w+)\[(\d+)\]", m[3]).groups()
            env[m[1]] = (
                ("argslot", int(k))
                if (len(argp) > 1 and b == argp[1]) or b not in env
                else ("host", env[b][1], env[b][2] + int(k))
            )
        elif m and m[2] == "llvm.load":
            b = names[1]
            env[m[1]] = env[b] if b in env and env[b][0] == "host" else ("ptr", env[b][1] if b in env else 0, 0)
        elif m and m[2] == "llvm.mlir.undef":
            env[m[1]] = {}
        elif m and m[2] == "llvm.insertvalue":
            key = re.search(r"\[([\d, ]+)\]", m[3])[1].replace(" ", "")
            env[m[1]] = {**V(names[2]), key: V(names[1])}
        elif m and m[2] == "llvm.extractvalue":
            key = re.search(r"\[([\d, ]+)\]", m[3])[1].replace(" ", "")
            v = V(names[1])
            env[m[1]] = v[key] if key in v else {"1": v.get("0"), "2": 0}[key]
        elif m and m[2] == "builtin.unrealized_conversion_cast":
            env[m[1]] = V(names[1]) if names[1] in env else None
        elif m and m[2] == "memref.reinterpret_cast":
            off, sz, st = (re.search(k + r": \[([^\]]*)\]", m[3])[1].split(",") for k in ("offset", "sizes", "strides"))

            def num(x):
                return V(x.strip()) if "%" in x else int(x)

            env[m[1]] = {
                "0": V(names[1])["0"],
                "1": V(names[1])["1"],
                "2": num(off[0]),
                **{f"3,{i}": num(x) for i, x in enumerate(sz)},
                **{f"4,{i}": num(x) for i, x in enumerate(st)},
            }
        elif m and m[2] == "memref.transpose":
            dims, perm = (x.split(", ") for x in re.search(r"\(([^)]*)\) -> \(([^)]*)\)", m[3]).groups())
            v = V(names[1])
            env[m[1]] = {k: v[k] for k in "012"} | {
                f"{f},{i}": v[f"{f},{dims.index(p)}"] for i, p in enumerate(perm) for f in "34"
            }
        elif m and m[2] in ("memref.alloca()", "memref.alloca"):
            env[m[1]] = {"0": ("buf", m[1], 0), "1": ("buf", m[1], 0), "2": 0}
            mem[m[1]] = {}
        elif m and m[2] == "llvm.alloca":
            env[m[1]] = ("host", m[1], 0)
        elif line.startswith("memref.store"):
            v, b, i = names[:3]
            mem[b][V(i)] = V(v)
        elif m and m[2] == "llvm.mul":
            env[m[1]] = V(names[1]) * V(names[2])
        elif m and m[2] == "llvm.add":
            a = V(names[1])
            b = V(names[2])
            env[m[1]] = (a[0], a[1], a[2] + b) if isinstance(a, tuple) else a + b
        elif m and m[2] in ("llvm.ptrtoint", "llvm.inttoptr"):
            env[m[1]] = V(names[1])
        elif line.startswith("call @mosaic_gpu_init_tma_desc"):
            dp, base, code, rank, sz, st, sw, bx = (V(n) for n in names)
            sizes, strides, box = (tuple(mem[b[1]][i] for i in range(rank)) for b in (sz, st, bx))
            descs.setdefault(dp[1], {})[dp[2]] = (base[1], base[2], width[code], sizes, strides, box, sw)
        elif line.startswith("gpu.launch_func"):
            g = [
                [V(x) for x in re.findall(r"%\w+", k)]
                for k in re.search(r"blocks in \(([^)]*)\) threads in \(([^)]*)\)", line).groups()
            ]
            sm = V(re.search(r"dynamic_shared_memory_size (%\w+)", line)[1])
            entry = re.search(r"::@(\w+)", line)[1]
            if "clusters in" in line:
                raise NotImplementedError("cluster launch")
            params = [
                ("arg", v[1]) if v[0] == "ptr" else ("tma", [descs[v[1]][k] for k in sorted(descs[v[1]])])
                for v in (V(n) for n in re.findall(r"(%\w+) :", re.search(r" args\((.*)", line)[1]))
            ]
            return MosaicLaunch(ptx.read_text(), entry, tuple(g[0]), tuple(g[1]), sm, params)
        elif m and m[2] not in ("func.func",):
            env[m[1]] = None
    raise NotImplementedError("no gpu.launch_func found")
