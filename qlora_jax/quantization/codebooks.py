"""The code tables: of 4-bit formats, and the 8-bit maps of stored scales and of optimizer states."""

import functools

import jax.numpy as jnp
import numpy as np

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256

# Quantiles of N(0, 1) scaled to [-1, 1] with an exact zero (Dettmers et al. 2023, eq. 4 and appendix E).
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

# One sign bit and eight magnitudes over 12 in bitsandbytes' order (not monotone in the code; +0 for both zeros).
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32) / np.float32(12)

# The symmetric integers that the paper compares with, as bitsandbytes' `get_4bit_type("int4")` has them: codes 0-7 are
# 7 .. 0, codes 8-15 are -0 .. -7 (+0 for both zeros).
INT4 = np.array([7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7], np.float32) / np.float32(7)

# One sign bit, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3); code 8 is -0.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

# Integers with an offset, and without: what GGUF's Q4_0 and what Q4_1, AWQ and GPTQ multiply.
OFFSET_BINARY = np.arange(-8, 8, dtype=np.float32)
UNSIGNED = np.arange(16, dtype=np.float32)

# Codes in ascending order of value. The two zeros are equal in value, so their order is a convention: bitsandbytes
# sends x <= 0 to code 0 and the smallest positive x to code 8.
_ASCENDING = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
    "int4": np.array([15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0], np.uint8),
}

TABLES = {
    "nf4": NF4,
    "fp4": FP4,
    "int4": INT4,
    "q4_0": OFFSET_BINARY,
    "q4_1": UNSIGNED,
    "uint4": UNSIGNED,
    "mxfp4": E2M1,
    "nvfp4": E2M1,
}
"""float32[16] of every 4-bit type."""


@functools.cache
def e4m3_map() -> np.ndarray:
    """Return the value of every 8-bit float scale, float32[256]: e4m3fn, NaN for 127 and 255."""
    return np.arange(256, dtype=np.uint8).view(jnp.dtype(jnp.float8_e4m3fn)).astype(np.float32)


@functools.cache
def boundaries(quant_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (midpoints float32[15], codes uint8[16]) of a 4-bit table.

    A scaled value v is stored as ``codes[number of midpoints < v]``: the nearest table entry, the lower one when v is
    exactly half-way.
    """
    codes = _ASCENDING[quant_type]
    ascending = TABLES[quant_type][codes]
    return (ascending[:-1] + ascending[1:]) / np.float32(2), codes


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """Return the signed or the unsigned 8-bit dynamic map, float32[256] in ascending order.

    Seven decades; decade i (0 = the smallest) is split into 2**i equal intervals between 0.1 and 1 times 10**(i - 6)
    and their centres are the values, with both signs, 0 and 1 (Dettmers, "8-Bit Approximations for Parallelism in Deep
    Learning", 2015). The unsigned map spends the sign on twice as many intervals (Dettmers et al. 2022, section 2.2).
    The roundings are those of bitsandbytes: centres in float32, times the decade, rounded once more.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = _linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1)
        centres = (edges[:-1] + edges[1:]) / np.float32(2)
        decade = np.float32(10.0 ** (i - 6))
        values += (decade * centres).tolist()
        if signed:
            values += (-decade * centres).tolist()
    return np.array(sorted(values), np.float32)


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """Return `count` equally spaced float32 numbers, each computed from the nearer end with one rounding (torch's)."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)
