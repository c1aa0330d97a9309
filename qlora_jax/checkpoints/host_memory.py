"""Host memory that JAX's CPU backend uses where it lies."""

from typing import Any

import numpy as np

_ALIGNMENT = 64
"""Bytes; an array at another address is copied."""


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialised array that JAX takes without a copy."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def is_aligned(array: Any) -> bool:
    """Tell if JAX takes an array without a copy."""
    return isinstance(array, np.ndarray) and array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0
