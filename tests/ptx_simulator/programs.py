"""Small PTX programs for the tests, and the data they run on."""

import pathlib
import re

import ml_dtypes
import numpy as np

from ptx_simulator import PtxError, run

DATA = pathlib.Path(__file__).parent / "data"
BF = ml_dtypes.bfloat16
RNG = np.random.default_rng(7)
SUF = {
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "int16": "s16",
    "int32": "s32",
    "int64": "s64",
    "float32": "f32",
    "float64": "f64",
    "float16": "b16",
}


def kernel(body, nparam, regs="", decl=""):
    """A kernel `k` with pointer params p0.. loaded in %P0.., %t = tid.x and generic scratch registers."""
    ps = ",\n".join(f".param .u64 p{i}" for i in range(nparam))
    lds = "\n".join(f"ld.param.u64 %P{i}, [p{i}];" for i in range(nparam))
    return f""".version 8.0
.target sm_90a
.address_size 64
{decl}
.visible .entry k({ps})
{{ .reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<96>; .reg .f32 %f<64>; .reg .b64 %d<64>; .reg .f64 %fd<8>;
.reg .b64 %P<8>; .reg .b64 %A<8>; .reg .b32 %t; {regs}
{lds}
mov.u32 %t, %tid.x;
{body}
ret;
}}"""


CLS = {1: ("%h", "b8"), 2: ("%h", "b16"), 4: ("%r", "b32"), 8: ("%d", "b64")}


def ew(ins, inputs, out_dtype, extra=""):
    """Runs `ins` elementwise: operands {a} {b} {c} come from the inputs, {o} is stored."""
    n = len(inputs[0])
    out = np.zeros(n, out_dtype)
    names, body = {}, ""
    for j, x in enumerate([*inputs, out]):
        body += f"mul.wide.u32 %A{j}, %t, {x.itemsize}; add.s64 %A{j}, %A{j}, %P{j};\n"
    for j, x in enumerate(inputs):
        c, b = CLS[x.itemsize]
        names["abc"[j]] = f"{c}{j + 1}"
        body += f"ld.global.{b} {c}{j + 1}, [%A{j}];\n"
    c, b = CLS[out.itemsize]
    names["o"] = f"{c}20"
    body += ins.format(**names) + f"\nst.global.{b} [%A{len(inputs)}], {c}20;"
    run(kernel(body, len(inputs) + 1, extra), "k", 1, n, [np.ascontiguousarray(x) for x in inputs] + [out])
    return out


def ints(dt, n=256):
    """Random and edge-case integers."""
    ii = np.iinfo(dt)
    x = RNG.integers(ii.min, ii.max, n, dt, endpoint=True)
    x[:8] = [0, 1, ii.max, ii.min, ii.max - 1, ii.max // 2, 2, 3]
    return RNG.permutation(x)


def wrap(v, dt):
    b = 8 * np.dtype(dt).itemsize
    v &= (1 << b) - 1
    return v - (1 << b) if np.dtype(dt).kind == "i" and v >> (b - 1) else v


def pyints(f, dt, *xs):
    return np.array([wrap(f(*[int(v) for v in t]), dt) for t in zip(*xs, strict=True)], dt)


def floats(n=256, dt=np.float32, seed=3):
    r = np.random.default_rng(seed)
    b = {2: np.uint16, 4: np.uint32}[np.dtype(dt).itemsize]

    def f():
        return np.where(
            r.random(n) < 0.5,
            r.standard_normal(n).astype(dt),
            r.integers(0, np.iinfo(b).max, n, b, endpoint=True).view(dt),
        ).astype(dt)

    with np.errstate(all="ignore"):  # signalling NaNs among the random bits
        a, c = f(), f()
        a[~np.isfinite(a.astype(np.float64))] = 1
        c[~np.isfinite(c.astype(np.float64))] = 2
    return a, c


def addr(j, scale):
    return f"mul.wide.u32 %A{j}, %t, {scale}; add.s64 %A{j}, %A{j}, %P{j};"


def go(body, arrays, threads=32, smem=None, **kw):
    decl = f".shared .align 1024 .b8 sm[{smem}];" if smem else ""
    run(kernel(decl + body, len(arrays)), "k", 1, threads, arrays, **kw)
    return arrays[-1]


def hopper(body, maps, out, threads=128, smem=65536):
    ps = ".param .align 64 .b8 tm[256], .param .u64 p0"
    t = kernel(f".shared .align 1024 .b8 sm[{smem}];" + body, 1).replace("(.param .u64 p0)", f"({ps})")
    run(t, "k", 1, threads, [maps, out])
    return out


TMA = """mov.u64 %d1, tm; cvta.param.u64 %d2, %d1; add.s64 %d3, %d2, 128; mov.u32 %r1, sm;
add.u32 %r2, %r1, 65528; setp.eq.u32 %p1, %t, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster; bar.sync 0; @!%p1 bra W;
mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], {bytes};
{copies} W: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0, 1000; @!%p2 bra W;
"""
COPY = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r{d}], [%d{m}, {{{x}, {y}}}], [%r2];"


# What shows that a mutation was caught, other than a wrong result
FAULTS = (PtxError, NotImplementedError)


def agrees(o, ref, mag):
    """One bf16 rounding plus f32 accumulation error."""
    return bool((np.abs(o - ref) <= 2.0**-8 * np.abs(ref) + 2.0**-20 * mag).all())


def nth(pattern, repl, k=0):
    """A mutation of a text: match k of the pattern is replaced."""

    def f(t):
        ms = list(re.finditer(pattern, t))
        m = ms[k]
        r = m.expand(repl)
        assert r != m[0]
        return t[: m.start()] + r + t[m.end() :]

    return f
