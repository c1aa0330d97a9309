"""A float32 mean with torch's own order of additions.

bitsandbytes subtracts ``absmax.mean()`` before it quantises the scales, and a float32 mean depends on the order in
which its terms are added. torch adds a contiguous vector in 8 lanes times 4 independent accumulators and cascades their
partial sums through four levels so that the rounding error grows with log(n). With several threads torch splits vectors
of more than 32768 elements by the number of threads; the single-threaded order, the same on every machine, is ours.
"""

import numpy as np

_LANES = 8
_ACCUMULATORS = 4
_LEVELS = 4


def mean(values: np.ndarray) -> np.float32:
    """Return the mean of a float32 vector, bit-equal to single-threaded ``torch.mean`` on a CPU.

    Args:
        values: float32[n], n >= 1.
    """
    lanes = _LANES if values.size >= _LANES else 1
    n_rows = values.size // lanes
    partial = _sum_rows(values[: n_rows * lanes].reshape(n_rows, lanes))
    total = np.float32(0)
    for value in (*values[n_rows * lanes :], *(partial if lanes > 1 else ())):
        total += value
    return (total if lanes > 1 else partial[0]) / np.float32(values.size)


def _sum_rows(rows: np.ndarray) -> np.ndarray:
    """Sum float32[n, lanes] over n: four interleaved cascades, then the rows left over, then the other three."""
    n_groups, lanes = len(rows) // _ACCUMULATORS, rows.shape[1]
    grouped = rows[: n_groups * _ACCUMULATORS].reshape(n_groups, _ACCUMULATORS * lanes)
    totals = _cascade(grouped).reshape(_ACCUMULATORS, lanes)
    total = totals[0]
    for row in rows[n_groups * _ACCUMULATORS :]:
        total = total + row
    for other in totals[1:]:
        total = total + other
    return total


def _cascade(rows: np.ndarray) -> np.ndarray:
    """Sum float32[n, width] over n in steps whose partial sums climb from level to level."""
    ceil_log2 = max(len(rows) - 1, 0).bit_length()
    step = 1 << max(4, ceil_log2 // _LEVELS)
    left_over = []
    for level in range(_LEVELS):
        n_steps = len(rows) // step if level < _LEVELS - 1 else 0
        left_over.append(_add_in_order(rows[n_steps * step :][None])[0])
        rows = _add_in_order(rows[: n_steps * step].reshape(n_steps, step, rows.shape[1]))
    total = left_over[0]
    for other in left_over[1:]:
        total = total + other
    return total


def _add_in_order(rows: np.ndarray) -> np.ndarray:
    """Sum float32[groups, n, width] over n, first to last."""
    total = np.zeros((rows.shape[0], rows.shape[2]), np.float32)
    for j in range(rows.shape[1]):
        total += rows[:, j]
    return total
