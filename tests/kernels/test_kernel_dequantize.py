"""The inline PTX that dequantizes, run from its emitted PTX: every code, and scales that are hard to round."""

import itertools

import numpy as np
import pytest
from fixtures.simulated_kernels import Case, Problem, differences, execute, expected

from qlora_jax.kernels.mosaic.scale_operands import ScaleOperands

pytestmark = pytest.mark.compile

COLUMNS, GROUP = 1024, 64
# Rows with all codes: 2^16 words of eight codes. Rows with all scales: one a group.
CODE_ROWS, SCALE_ROWS = 2**16 * 8 // COLUMNS, 128
KINDS = [
    ("a6000", "nf4", "bfloat16"),
    ("a6000", "nf4", "float16"),
    ("a6000", "fp4", "bfloat16"),
    ("a6000", "fp4", "float16"),
    ("h100", "nf4", "bfloat16"),
]
CASES = [
    Case(chip, "dequantize", 0, CODE_ROWS + SCALE_ROWS, COLUMNS, quant_type=quant_type, dtype=dtype, double_quant=False)
    for chip, quant_type, dtype in KINDS
]


def every_word():
    """uint32 words whose lower halves are all numbers of 16 bits, and whose upper halves are too, in another order."""
    lower = np.arange(2**16, dtype=np.uint32)
    upper = (lower * np.uint32(40503) + np.uint32(12345)) & np.uint32(0xFFFF)
    words = lower | upper << np.uint32(16)
    assert len(set(words & 0xFFFF)) == len(set(words >> 16)) == 2**16
    return words


def hard_scales(count):
    """float32 numbers of every exponent, numbers half-way between two 16-bit ones and their neighbours, any others."""
    random = np.random.default_rng(0)

    def bits(values):
        return np.asarray(values, np.float64).astype(np.float32).view(np.uint32)

    half = random.integers(0, 2**32, 80, np.uint32)
    ties = [
        half % np.uint32(0x7F0000) << np.uint32(8) & np.uint32(0x7FFF0000) | np.uint32(0x8000),  # bfloat16
        bits(np.ldexp(2 * random.integers(1024, 2048, 80) + 1.0, random.integers(-25, 5, 80))),  # float16
        bits((random.integers(0, 1024, 80) + 0.5) * 2.0**-24),  # float16, subnormal
        bits([65504, 65520, 3.3895314e38, 3.3961775e38]),  # the largest numbers and where infinity begins
    ]
    ties = np.concatenate(ties)
    every_exponent = bits(np.exp2(np.arange(-149.0, 128)))
    scales = np.concatenate([[np.uint32(0)], every_exponent, ties - np.uint32(1), ties, ties + np.uint32(1)])
    scales = np.concatenate([scales, scales | np.uint32(1 << 31)])
    others = random.integers(0, 0xFF000000, count - len(scales), np.uint32)
    others &= np.uint32(0xFF7FFFFF)  # finite
    return np.concatenate([scales, others]).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_code_and_hard_scales(case, launch):
    problem = Problem(case)
    words = every_word().astype("<u4")
    codes_of_group = np.array(list(itertools.islice(itertools.cycle(range(16)), GROUP)), np.uint8)
    random = np.random.default_rng(1)
    n_scales = SCALE_ROWS * COLUMNS // GROUP
    groups = random.permuted(np.tile(codes_of_group, (n_scales, 1)), axis=1)
    packed = groups[:, ::2] << 4 | groups[:, 1::2]
    problem.codes = np.concatenate([words.view(np.uint8).reshape(CODE_ROWS, -1), packed.reshape(SCALE_ROWS, -1)])[None]
    # Of scales in [1, 2), the 16 products are as distinct as the codebook's entries are.
    plain = random.uniform(1, 2, CODE_ROWS * COLUMNS // GROUP).astype(np.float32)
    problem.scales = ScaleOperands(np.concatenate([plain, random.permutation(hard_scales(n_scales))])[None])
    wanted = expected(problem)
    assert not differences(execute(launch, problem), wanted)
    # What was asked for did occur: infinities, subnormals, zeros of both signs.
    small = np.abs(wanted.astype(np.float64)) < float(
        np.finfo(np.float16).tiny if case.dtype == "float16" else 2.0**-126
    )
    assert np.isinf(wanted.astype(np.float32)).any() and (small & (wanted != 0)).any()
    assert {0, 0x8000} <= set(wanted.view(np.uint16)[-SCALE_ROWS:].ravel().tolist())
