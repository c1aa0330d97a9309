"""Prompt lookup: what followed the last words where they stood before is guessed to follow again (Saxena 2023).

A guess costs little beside a step of the model, which tells at once how much of it is right. Answers that repeat their
prompt, such as corrected text or code, get several tokens a step; the tokens are those of greedy choice, or of the same
draws, either way.
"""

import collections
import dataclasses
import statistics
from collections.abc import Sequence

_SIZES = (3, 2)
"""Tokens of the n-grams that are looked up, the longest first."""

_LONGEST_PAUSE = 16


class PromptLookup:
    """n-grams of a text, and where each stood last.

    Args:
        tokens: of the text so far.
    """

    def __init__(self, tokens: Sequence[int] = ()):
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._pause, self._waits = 1, 0
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that follow."""
        for token in tokens:
            # What ends the text has no continuation yet: it is noted with the token that follows it.
            end = len(self._tokens)
            for size in _SIZES:
                if end >= size:
                    self._ends[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """Return up to so many tokens that may follow: none where nothing is alike, or nothing helped lately."""
        if self._waits:
            self._waits -= 1
            return []
        for size in _SIZES:
            end = self._ends.get(tuple(self._tokens[-size:]))
            if end is not None and len(self._tokens) >= size:
                # What is that near comes again and again.
                period = len(self._tokens) - end
                return [self._tokens[end + i % period] for i in range(most)]
        return []

    def learn(self, accepted: int) -> None:
        """Guess less often for a while after a guess of which nothing was accepted."""
        self._pause = 1 if accepted else min(2 * self._pause, _LONGEST_PAUSE)
        self._waits = 0 if accepted else self._pause - 1


@dataclasses.dataclass
class LookupGain:
    """Steps with guesses beside steps without.

    Attributes:
        guessed: tokens that were guessed at.
        accepted: those of them that were right.
    """

    guessed: int = 0
    accepted: int = 0
    _plain_steps: int = 0
    _lookup_steps: int = 0
    _tokens: float = 0.0  # of a slot, in steps with guesses
    _plain_seconds: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=256))
    _lookup_seconds: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=256))
    _lately: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=16))

    def note_plain(self, seconds: float) -> None:
        """Take note of a step without guesses."""
        self._plain_steps += 1
        self._plain_seconds.append(seconds)

    def note_lookup(self, seconds: float, tokens: float) -> None:
        """Take note of a step with guesses, which added so many tokens to a slot on average."""
        self._lookup_steps += 1
        self._lookup_seconds.append(seconds)
        self._tokens += tokens
        self._lately.append(tokens)

    @property
    def worthwhile(self) -> bool:
        """False if steps with guesses lately brought fewer tokens a second than steps without."""
        if len(self._lately) < 8 or not self._plain_seconds:
            return True
        plain, lookup = map(statistics.median, (self._plain_seconds, self._lookup_seconds))
        return statistics.fmean(self._lately) * plain >= lookup

    @property
    def speedup(self) -> float | None:
        """Time that steps of one token would have taken, divided by that of the steps taken.

        None if either kind was not measured.
        """
        if not (self._plain_seconds and self._lookup_seconds):
            return None
        # Medians: the first of each kind waits for its program to be compiled.
        plain, lookup = map(statistics.median, (self._plain_seconds, self._lookup_seconds))
        taken = self._plain_steps * plain + self._lookup_steps * lookup
        return (self._plain_steps + self._tokens) * plain / taken

    def __str__(self) -> str:
        """Describe in one line for people."""
        if not self.guessed:
            return "prompt lookup: nothing to guess"
        share = f"prompt lookup: {self.accepted} of {self.guessed} guessed tokens accepted"
        return share if self.speedup is None else f"{share}, {self.speedup:.2f} times as fast as without"
