"""The longest sequence that fits, from few compilations: memory is close to linear in the sequence."""

import dataclasses
import math
from collections.abc import Callable

FINE, COARSE = 64, 1024
"""Multiples that lengths are rounded down to, below and from `SWITCH` tokens."""
SWITCH = 4096
_FARTHEST = 64


@dataclasses.dataclass(frozen=True)
class Longest:
    """Result of a search.

    Attributes:
        length: longest sequence found to fit; 0 if not even the shortest does.
        next_length: the next length, found not to fit; None if the search ended at `maximum`.
        evaluations: lengths tried, in order.
    """

    length: int
    next_length: int | None
    evaluations: tuple[int, ...]


def step_above(length: int) -> int:
    """Distance from a length to the next longer candidate."""
    return FINE if length < SWITCH else COARSE


def step_below(length: int) -> int:
    """Distance from a length to the next shorter candidate."""
    return FINE if length <= SWITCH else COARSE


def rounded(length: int) -> int:
    """Longest candidate not above `length`; at least `FINE`."""
    step = step_above(length)
    return max(FINE, length // step * step)


def longest_sequence(excess: Callable[[int], float], *, start: int, maximum: int | None = None) -> Longest:
    """Find the longest sequence whose `excess` is not positive, by secants inside a bracket.

    The length found and the next candidate have both been tried: the one fits, the other does not. Nothing is assumed
    about lengths in between but that those which fit are below those which do not.

    Args:
        excess: bytes beyond the limit at a length; infinite where it cannot be compiled.
        start: a length to begin with.
        maximum: no length above it is tried; None for no limit.
    """
    known: dict[int, float] = {}
    ceiling = None if maximum is None else rounded(maximum)
    length = rounded(start) if ceiling is None else min(rounded(start), ceiling)
    fits, fails = 0, None
    widths: list[int] = []  # of the bracket, since it has two edges
    while True:
        known[length] = float(excess(length))
        fits, fails = (length, fails) if known[length] <= 0 else (fits, length)
        low = fits + step_above(fits) if fits else FINE
        high = ceiling if fails is None else fails - step_below(fails)
        if high is not None and high < low:
            return Longest(fits, fails, tuple(known))
        guess = _crossing(known)
        if fails is None:
            # From two points close together a line leads anywhere.
            guess = 4 * fits if guess is None else min(guess, _FARTHEST * fits)
        else:
            widths.append(fails - fits)
            creeping = len(widths) > 2 and 2 * widths[-1] > widths[-3]
            if guess is None or creeping or math.isinf(known[fails]):
                guess = math.isqrt(fits * fails) if fails > 8 * fits > 0 else (fits + fails) // 2
        length = max(rounded(guess), low)
        length = length if high is None else min(length, high)


def _crossing(known: dict[int, float]) -> int | None:
    """Zero of the line through the two known points nearest to zero; None if that line does not rise."""
    finite = {length: value for length, value in known.items() if math.isfinite(value)}
    points = sorted(sorted(finite, key=lambda length: abs(finite[length]))[:2])
    if len(points) < 2:
        return None
    (a, b), (fa, fb) = points, (finite[points[0]], finite[points[1]])
    return math.floor(a - fa * (b - a) / (fb - fa)) if fb > fa else None
