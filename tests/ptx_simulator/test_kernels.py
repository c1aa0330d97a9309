"""Whole kernels as Mosaic GPU compiled them, from data/, against numpy; and mutations of them, which must be caught.

The README describes the kernels.
"""

import numpy as np
import pytest

from ptx_simulator import PtxError, mosaic_args
from ptx_simulator.programs import BF, DATA, FAULTS, RNG, agrees, nth

pytestmark = pytest.mark.simulator

# Not the library's table: the simulator is an oracle and imports nothing of what it checks.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
SHAPES = dict(
    a6000_nf4_mma=(64, 256, 128, False),
    a6000_nf4_mma_transposed=(64, 256, 128, True),
    h100_nf4_wgmma=(128, 256, 256, False),
    h100_nf4_wgmma_transposed=(128, 256, 256, True),
)


def problem(name, seed=0):
    M, K, N, bwd = SHAPES[name]
    r = np.random.default_rng(seed)
    codes, s = r.integers(0, 16, (N, K)).astype(np.uint8), (r.random((N, K // 64)) + 0.5).astype(np.float32)
    w = (NF4[codes] * np.repeat(s, 64, 1)).astype(BF).astype(np.float64)
    x = r.standard_normal((M, N if bwd else K)).astype(BF)
    q = np.ascontiguousarray((codes[:, 0::2] << 4) | codes[:, 1::2]).view(np.int32)  # bitsandbytes order
    ref = x.astype(np.float64) @ (w if bwd else w.T)
    mag = np.abs(x.astype(np.float64)) @ np.abs(w if bwd else w.T)
    return [x, q, np.ascontiguousarray(s.T)], ref, mag


def execute(name, mutate=lambda t: t, **kw):
    L = mosaic_args(DATA / name)
    ins, ref, mag = problem(name)
    out = np.full(ref.shape, np.nan, BF)
    text = mutate(L.ptx)
    L.ptx = text
    L.run([*ins, out], **kw)
    return out.astype(np.float64), ref, mag


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kw", [{}, dict(reverse=True), dict(warps_per_bundle=4)])
def test_real_kernel(name, kw):
    assert agrees(*execute(name, **kw))


def test_real_kernel_wgmma_a_in_registers():
    """W^T dequantised into the A fragments (bf16 codebook * bf16 scale), x^T from TMA-filled smem."""
    M, K, N = 128, 256, 128
    r = np.random.default_rng(4)
    codes = r.integers(0, 16, (N, K)).astype(np.uint8)
    s = (r.random((N, K // 64)) + 0.5).astype(np.float32)
    x = r.standard_normal((M, K)).astype(BF)
    c = codes.reshape(N, K // 128, 2, 64)
    q = np.ascontiguousarray((c[:, :, 0] | c[:, :, 1] << 4).reshape(N, K // 2))
    w = (
        (NF4.astype(BF).astype(np.float32)[codes] * np.repeat(s.astype(BF).astype(np.float32), 64, 1))
        .astype(BF)
        .astype(np.float64)
    )
    out = np.full((N, M), np.nan, BF)
    mosaic_args(DATA / "h100_wgmma_a_in_registers").run([x, q, np.ascontiguousarray(s.T), out])
    ref = w @ x.astype(np.float64).T
    assert agrees(out.astype(np.float64), ref, np.abs(w) @ np.abs(x.astype(np.float64)).T)


def test_real_kernel_tma_store_pipeline():
    """emit_pipeline with TMA loads and TMA stores (bulk groups), o = a + 2*b."""
    a, b = (RNG.standard_normal((64, 256)).astype(BF) for _ in range(2))
    o = np.full((64, 256), np.nan, BF)
    mosaic_args(DATA / "h100_tma_store_pipeline").run([a, b, o])
    np.testing.assert_array_equal(o, (a.astype(np.float32) + 2 * b.astype(np.float32)).astype(BF))


MUTANTS = [
    ("a6000_nf4_mma", p, r, k)
    for p, r, k in [
        (r"0x4051", "0x4151", 0),
        (r"0x6273", "0x6237", 5),
        (r"0x9D8C", "0x9D8D", 1),
        (r"0xCA", "0xAC", 3),
        (r"0x6420", "0x6402", 0),
        (r"0x77777777", "0x7777777f", 2),
        (r"cp\.async\.wait_group \t?2", "cp.async.wait_group 3", 0),
        (r"cp\.async\.commit_group;", "", 2),
        (r"(mma\.sync\S+ \{[^}]*\}), \{(%\w+),(%\w+),", r"\1, {\3,\2,", 7),
        (r"ldmatrix(\S+)x4\.shared", r"ldmatrix\1x4.trans.shared", 0),
        (r"shl\.b32 (\s*%r\d+, %r7, )3;", r"shl.b32 \g<1>4;", 0),
        (r"mul\.rn\.f32 a,", "add.rn.f32 a,", 4),
        (r"mov\.b32 \t?%r1014, %r971;", "", 0),
        (r"cvt\.rn\.bf16x2\.f32 (\s*%r\d+), (%r\d+), (%r\d+)", r"cvt.rn.bf16x2.f32 \1, \3, \2", 0),
    ]
] + [
    ("h100_nf4_wgmma", p, r, k)
    for p, r, k in [
        (r"fence\.proxy\.async\.shared::cta;", "", 0),
        (r"wgmma\.wait_group\.sync\.aligned 0;", "wgmma.wait_group.sync.aligned 1;", 0),
        (r"wgmma\.fence\.sync\.aligned;", "", 0),
        (
            r"mov\.b32 (\s*%r\d+, )128;\n\t// begin inline asm\n\tmbarrier\.arrive\.expect_tx",
            r"mov.b32 \g<1>64;\n\tmbarrier.arrive.expect_tx",
            0,
        ),
        (r"mbarrier\.arrive\.release\.cta\.shared::cta\.b64 _, \[%r\d+\], 1;", "", 0),
        (r"4611686293305294850", "4611686293305294851", 0),
        (r"prmt\.b32 (%r\d+),l,h,0x4051", r"prmt.b32 \1,l,h,0x5041", 0),
    ]
]


@pytest.mark.parametrize("name,pattern,repl,k", MUTANTS)
def test_mutation_is_caught(name, pattern, repl, k):
    try:
        assert not agrees(*execute(name, nth(pattern, repl, k)))
    except FAULTS:
        pass


REDUNDANT = (0, 1, 2, 3, 4, 6, 9, 11, 13, 14)


@pytest.mark.parametrize("i", range(15))
def test_removed_bar_sync(i):
    """Each of 15 bar.sync removed in turn.  Mosaic emits redundant ones; checked by hand in the PTX:
    0-4 precede any shared access, 6/11 (before st.shared) follow 5/10 with no store in between, 9 follows 8
    with only a cp.async issue in between, 13/14 surround the epilogue's global stores."""
    try:
        bad = not agrees(*execute("a6000_nf4_mma", nth(r"bar\.sync[^;]*;", "", i)))
    except FAULTS:
        bad = True
    assert bad == (i not in REDUNDANT)


@pytest.mark.parametrize(
    "name,bars",
    [
        ("h100_nf4_wgmma", (11,)),
        ("h100_nf4_wgmma", (12, 13)),
        ("h100_nf4_wgmma", (0, 1, 2)),
        ("a6000_nf4_mma", (8, 9)),
        ("a6000_nf4_mma_transposed", (3,)),
        ("a6000_nf4_mma_transposed", (5,)),
        ("h100_nf4_wgmma_transposed", (5,)),
    ],
)
def test_removed_barrier_combinations(name, bars):
    """Of h100_nf4_wgmma, 11 guards the smem tile against the previous wgmma, 12/13 are redundant only one at a time
    (st.shared; bar; fence.proxy.async; bar; wgmma), 0-2 order mbarrier.init before use."""

    def f(t):
        for b in reversed(bars):
            t = nth(r"bar\.sync[^;]*;", "", b)(t)
        return t

    with pytest.raises(PtxError):
        execute(name, f)
