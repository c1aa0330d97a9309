"""The code tables: NF4, FP4 and the 8-bit dynamic maps of the scales of the scales and of optimizer states."""

import functools

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

# Codes in ascending order of value. The two zeros are equal in value, so their order is a convention: bitsandbytes
# sends x <= 0 to code 0 and the smallest positive x to code 8.
_ASCENDING = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}

TABLES = {"nf4": NF4, "fp4": FP4}


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
