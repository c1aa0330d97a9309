"""Host memory that JAX's CPU backend uses where it lies."""

from collections.abc import Iterator
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


def pieces_of(count: int, dtype: np.dtype, size: int, into: np.ndarray | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first element, flat memory for `size` elements, of the last piece for the rest) of a tensor.

    Args:
        count: elements of the tensor.
        dtype: of the elements.
        size: of a piece.
        into: flat memory for the whole tensor, which is used if it is of that type, or bytes for one piece at least,
            whose first are all pieces; by default these are in memory of their own.
    """
    if into is not None and into.dtype == dtype != np.uint8:
        yield from ((start, into[start : start + size]) for start in range(0, count, size))
        return
    if into is not None and into.dtype == np.uint8:
        shared = into[: size * dtype.itemsize].view(dtype)
    else:
        shared = aligned_empty((min(size, count),), dtype)
    yield from ((start, shared[: count - start]) for start in range(0, count, size))


def is_aligned(array: Any) -> bool:
    """Tell if JAX takes an array without a copy."""
    return isinstance(array, np.ndarray) and array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0
