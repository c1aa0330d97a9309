"""The longest sequence that fits, from few compilations: memory is close to linear in the sequence."""

import dataclasses
import math
from collections.abc import Callable

FINE, COARSE = 64, 1024
"""Multiples that lengths are rounded down to, below and from `SWITCH` tokens."""
SWITCH = 4096


@dataclasses.dataclass(frozen=True)
class Longest:
    """What a search came to.

    Attributes:
        length: longest sequence found to fit; 0 if not even the shortest does.
        next_length: the next length, found not to fit; None if the search ended at `maximum`.
        evaluations: lengths looked at, in order.
    """

    length: int
    next_length: int | None
    evaluations: tuple[int, ...]


def step_above(length: int) -> int:
    """Distance from a length to the next one that is looked at."""
    return FINE if length < SWITCH else COARSE


def rounded(length: float) -> int:
    """The longest length that is looked at and not above `length`; at least `FINE`."""
    step = FINE if length < SWITCH else COARSE
    return max(FINE, int(length) // step * step)


def longest_sequence(excess: Callable[[int], float], *, start: int, maximum: int | None = None) -> Longest:
    """Find the longest sequence whose `excess` is not positive, by secants inside a bracket.

    That the length found fits and the next one does not has been looked at, not inferred; in between the two nothing
    is assumed but that one that fits is below one that does not.

    Args:
        excess: bytes beyond the limit at a length; infinite where it cannot be compiled.
        start: a length to begin with.
        maximum: no length above it is looked at; None for no limit.
    """
    known: dict[int, float] = {}
    ceiling = math.inf if maximum is None else rounded(maximum)

    def look(length: int) -> float:
        if length not in known:
            known[length] = excess(length)
        return known[length]

    fits, fails = 0, math.inf
    length = int(min(rounded(start), ceiling))
    run = 0  # looks in a row that moved the same edge: > 0 the lower one, < 0 the upper
    while True:
        if look(length) <= 0:
            fits, run = length, max(run, 0) + 1
        else:
            fails, run = length, min(run, 0) - 1
        if fits == ceiling or fails <= FINE or fits + step_above(fits) >= fails:
            break
        low = fits + step_above(fits) if fits else FINE
        high = ceiling if math.isinf(fails) else _below(int(fails))
        guess = _crossing(known)
        if guess is None:
            guess = 4 * fits if math.isinf(fails) else (fits + fails) / 2
        # A curve lets a secant creep along one edge: move further with every look that did.
        if run > 1:
            guess = max(guess, fits + step_above(fits) * 4 ** (run - 1))
        elif run < -1:
            guess = min(guess, fails - step_above(int(fails)) * 4 ** (-run - 1))
        length = int(min(max(rounded(guess), low), high))
    return Longest(fits, None if math.isinf(fails) else int(fails), tuple(known))


def _crossing(known: dict[int, float]) -> float | None:
    """Where the line through the two known points nearest to zero crosses it; None if no rising line goes through."""
    finite = {length: value for length, value in known.items() if math.isfinite(value)}
    points = sorted(sorted(finite, key=lambda length: abs(finite[length]))[:2])
    if len(points) < 2:
        return None
    (a, b), (fa, fb) = points, (finite[points[0]], finite[points[1]])
    return a - fa * (b - a) / (fb - fa) if fb > fa else None


def _below(length: int) -> int:
    """The length that is looked at next below."""
    return length - (FINE if length <= SWITCH else COARSE)
