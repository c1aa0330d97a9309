"""Whole kernels, compiled for GPUs and executed on the CPU from the PTX the compiler emitted, bit for bit.

What each output must be is computed in numpy, in the kernels' own order of summation (`ptx_kernels`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.random_weights_of_formats import ADOPTED
from fixtures.simulated_kernels import DTYPES, Case, Problem, config_of, differences, execute, expected, owned

from qlora_jax.gpus import CHIPS
from qlora_jax.kernels.mosaic import dispatch
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight
from qlora_jax.kernels.product import Product
from qlora_jax.quantization import dequantize, quantize

pytestmark = pytest.mark.compile

# Kernels for many rows: (chip, module, config for a transposed product of an odd multiple of 64 columns), the config
# empty if the module chooses it.
TILED = [
    ("a6000", "mma", ()),
    ("h100", "mma", ()),
    ("h100", "wgmma", ()),
    ("b200", "tcgen05", ()),
]
# Tiles of a single CTA on an SM, and for K an odd multiple of 64.
NARROW = (("block_m", 256), ("block_n", 64), ("block_k", 128), ("stages", 2), ("dequantizers", 1))
TCGEN05 = [
    Case("b200", "tcgen05", 136, 264, 192, layers=3, config=(("block_m", 128),)),
    Case("b200", "tcgen05", 136, 200, 256, True, layers=3, config=(("block_m", 128),)),
    Case("b200", "tcgen05", 256, 136, 192, True, layers=3, config=NARROW),
]
NAMES = ("a6000", "h100", "b200")


def tiled_cases(chip, kernel, narrow):
    """Ragged and whole shapes, one step and several, all kinds of weights, both products."""
    forward = config_of(Case(chip, kernel, 256, 512, 512))
    m, n, k = forward.block_m, forward.block_n, forward.block_k
    yield Case(chip, kernel, m + 24, n + 40, 3 * k, layers=3)
    yield Case(chip, kernel, m, n + 8, k, quant_type="fp4", dtype="float16", block_size=32, double_quant=False)
    yield Case(chip, kernel, m, n, 256, quant_type="fp4", block_size=256)
    yield Case(chip, kernel, m, n, 5 * k, dtype="float16", block_size=32)
    yield Case(chip, kernel, m, n, 4 * k, double_quant=False)
    yield Case(chip, kernel, m, n, 3 * k, block_size=128)  # blocks straddle rows
    backward = config_of(Case(chip, kernel, 256, 512, 512, True))
    m, n, k = backward.block_m, backward.block_k, backward.block_n
    yield Case(chip, kernel, m + 24, 2 * n + 40, 2 * k, True, layers=3)
    yield Case(chip, kernel, m, n, k, True, quant_type="fp4", dtype="float16", block_size=32, double_quant=False)
    yield Case(chip, kernel, m, n + 8, max(256, k), True, quant_type="fp4", block_size=256)
    yield Case(chip, kernel, m, n + 8, 2 * k, True, dtype="float16", block_size=32)
    backward = config_of(Case(chip, kernel, 256, 512, 192, True, config=narrow))
    m, n, k = backward.block_m, backward.block_k, backward.block_n
    yield Case(chip, kernel, m, n + 72, 3 * k, True, dtype="float16", block_size=128, config=narrow)


def other_tiles():
    """Tiles that kernels choose for fewer rows or for larger outputs, and other numbers of warps and stages."""
    yield Case("a6000", "mma", 32, 136, 192, dtype="float16")
    yield Case("a6000", "mma", 32, 136, 256, True)
    yield Case(
        "a6000", "mma", 16, 136, 192, True, config=(("block_m", 16), ("block_n", 64), ("block_k", 128), ("m_warps", 1))
    )
    yield Case("a6000", "mma", 45, 136, 128, quant_type="fp4", config=(("block_m", 32), ("m_warps", 1)))
    yield Case("a6000", "mma", 64, 128, 320, config=(("block_m", 64), ("stages", 4), ("m_warps", 4)))
    longer = (("block_m", 64), ("block_k", 128))
    yield Case("h100", "mma", 72, 136, 256, layers=3, config=longer)
    yield Case("h100", "mma", 72, 200, 256, True, config=longer)
    largest = (("block_m", 256), ("block_n", 256), ("dequantizers", 2))
    yield Case("b200", "tcgen05", 264, 264, 320, layers=3, config=largest)
    yield Case("b200", "tcgen05", 256, 264, 256, True, dtype="float16", config=largest)
    yield from TCGEN05


def small_m_cases(chip):
    """All kinds on one chip: the code is the same for all."""
    yield Case(chip, "small_m", 1, 40, 1088, layers=3)
    yield Case(chip, "small_m", 5, 24, 2112, quant_type="fp4", dtype="float16", block_size=32, double_quant=False)
    if chip != NAMES[0]:
        return
    yield Case(chip, "small_m", 16, 33, 576, dtype="float16", block_size=32)
    yield Case(chip, "small_m", 9, 16, 256, quant_type="fp4", block_size=256)
    yield Case(chip, "small_m", 8, 16, 64, double_quant=False)


def dequantized_cases(chip):
    """All kinds on one chip: the others differ in how codes are copied."""
    yield Case(chip, "dequantize", 0, 136, 192, layers=3)  # tiles of 128 x 64, one group of columns
    yield Case(chip, "dequantize", 0, 72, 640, dtype="float16", block_size=32)  # 64 x 128, groups of columns overlap
    if chip != NAMES[0]:
        return
    yield Case(chip, "dequantize", 0, 64, 256, quant_type="fp4", block_size=256)
    yield Case(chip, "dequantize", 0, 128, 64, quant_type="fp4", dtype="float16", block_size=32, double_quant=False)
    yield Case(chip, "dequantize", 0, 200, 320, double_quant=False)


def format_cases(everything):
    """Formats that checkpoints bring: each in every kind of kernel, or in every kernel."""
    for i, quant_type in enumerate(("int4", *ADOPTED)):
        kind = {"quant_type": quant_type, "dtype": ("bfloat16", "float16")[i % 2], "layers": 3}
        for j, (chip, kernel, _) in enumerate(TILED):
            for transposed in (False, True):
                if everything or (i + 3 * transposed) % len(TILED) == j:
                    config = config_of(Case(chip, kernel, 256, 512, 512, transposed))
                    n, k = config.block_n, config.block_k
                    n, k = (2 * k + 40, n) if transposed else (n + 8, 3 * k)
                    yield Case(chip, kernel, config.block_m, n, k, transposed, **kind)
        yield Case("a6000", "small_m", 9, 40, 1088, **kind)
        yield Case("a6000", "dequantize", 0, 136, 192, **kind)
        if everything:
            yield Case("h100", "small_m", 1, 16, 576, **kind)
            yield Case("b200", "dequantize", 0, 72, 640, **kind)


SMALL = [
    *(case for kernel in TILED for case in tiled_cases(*kernel)),
    *other_tiles(),
    *(case for chip in NAMES for make in (small_m_cases, dequantized_cases) for case in make(chip)),
    *format_cases(False),
]

# Weights of SmolLM2-135M, [N, K].
LINEAR = [(576, 576), (192, 576), (1536, 576), (576, 1536)]
ROWS = [32, 64, 200, 256]


def large_cases(everything):
    """For each chip every shape, with the kernel that is selected for a number of rows: one in turn, or others."""
    for chip in NAMES:
        for i, (n, k) in enumerate(LINEAR):
            for transposed in (False, True):
                for j, m in enumerate(ROWS):
                    if ((i + transposed) % len(ROWS) == j) != everything:
                        choice = dispatch.select_kernel(CHIPS[chip], Product(m, n, k, transposed))
                        # It adds rows up to a tile.
                        yield Case(chip, choice.name, max(m, choice.config.block_m), n, k, transposed)
        n, k = LINEAR[3 if everything else 2]
        yield Case(chip, "dequantize", 0, n, k)
        yield Case(chip, "small_m", 1 if everything else 16, n, k)


def check(launch, problem, ctas=None, **options):
    """Executes a kernel, all of it or some CTAs, and compares what they own."""
    out = execute(launch, problem, ctas=ctas, **options)
    if ctas is None:
        assert not differences(out, expected(problem))
        return
    written = np.zeros(out.shape, bool)
    for cta in ctas:
        rows, columns = owned(problem.case, cta)
        assert not differences(out[rows, columns], expected(problem, rows, columns)), cta
        written[rows, columns] = True
    assert np.isnan(out[~written].astype(np.float32)).all()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case, launch):
    check(launch, Problem(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in format_cases(True) if case not in SMALL], ids=str)
def test_formats_in_every_kernel(case, launch):
    check(launch, Problem(case))


# 135 rows, padded to 136: the last block of scales is of padding alone.
PADDED = [
    Case("a6000", "mma", 32, 136, 576, transposed=transposed, block_size=4096, double_quant=double_quant)
    for transposed, double_quant in ((False, True), (True, False), (True, True))
] + [Case("a6000", "dequantize", 0, 136, 576, block_size=4096, double_quant=False)]


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_rows_of_padding_have_scales(case, launch):
    """Nothing is read beyond the end of the scales, which the simulator would refuse."""
    rows, random = case.n - 1, np.random.default_rng(0)
    weight = quantize(
        random.standard_normal((rows, case.k), np.float32), block_size=case.block_size, double_quant=case.double_quant
    )
    packed = dispatch.pack(jax.tree.map(jnp.asarray, weight))
    problem = Problem(case)
    problem.codes, problem.scales = np.array(packed.codes), jax.tree.map(np.array, packed.scales)
    if case.transposed:
        problem.x[:, rows:] = 0  # as dy is padded
    assert packed.shape == (case.n, case.k)
    out = execute(launch, problem)
    assert not differences(out, expected(problem))
    assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_other_schedules(case, launch):
    """The last warps first, each by itself."""
    check(launch, Problem(case), warps_per_bundle=1, reverse=True)


def corners(grid):
    """The first and the last block, which is the one that is moved back inside."""
    return sorted({(0, 0, 0), tuple(size - 1 for size in grid)})


@pytest.mark.parametrize("case", dict.fromkeys(large_cases(False)), ids=str)
def test_shapes_of_smollm2(case, launch):
    check(launch, Problem(case), corners(launch.grid))


@pytest.mark.slow
@pytest.mark.parametrize("case", dict.fromkeys(large_cases(True)), ids=str)
def test_all_shapes_of_smollm2(case, launch):
    check(launch, Problem(case), corners(launch.grid))


@pytest.mark.parametrize("case", [case for case in SMALL if case.kernel == "dequantize"], ids=str)
def test_numpy_dequantizes_like_the_library(case):
    """Ties the references of this file to `qlora_jax.quantization`, which knows nothing of the kernels."""
    problem = Problem(case)
    q = jax.tree.map(lambda buffer: buffer[case.layer], problem.quantized)
    assert not differences(np.asarray(dequantize(q, DTYPES[case.dtype])), problem.weight)
    of_stack = PackedWeight.of(q)
    assert [a.shape[1:] for a in of_stack.arrays] == [
        a.shape[1:] for a in (problem.codes, *problem.scales.operands, problem.layer)
    ]
