"""Text of an answer while its tokens come."""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "�"
# Tokens, enough for a whole character.
_CONTEXT = 6
# Bytes of a character in UTF-8, each of which may be a token.
_LONGEST_CHARACTER = 4


class TextStream:
    """Decodes the tokens of an answer one by one, up to a stop string.

    Text is given out once it cannot change any more: bytes of a character that is not complete are held back, and so is
    what may turn out to be the beginning of a stop string.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer, which are not part of it.
        context: last tokens before the answer, where it continues a text: some tokenizers drop the space that a text
            begins with.

    Attributes:
        stopped: a stop string came; further tokens change nothing.
        text: given out so far.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(each for each in stop if each)
        # Tokens from `_from` on are decoded anew each time, as a tokenizer may treat the first of a text apart; those
        # before `_read` have been decoded to `_pending` or given out.
        self._tokens = list(context[-_CONTEXT:])
        self._from, self._read = 0, len(self._tokens)
        self._pending = ""
        self.stopped, self.text = False, ""

    def add(self, token: int) -> str:
        """Take a token; return text that is new."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before, after = self._decoded(self._from, self._read), self._decoded(self._from, None)
        # Bytes that no character has, after so many tokens, are no beginning of one.
        whole = not after.endswith(_REPLACEMENT) or len(self._tokens) - self._read > _LONGEST_CHARACTER
        if len(after) > len(before) and whole:
            self._pending += after[len(before) :]
            self._from, self._read = self._read, len(self._tokens)
        return self._released(final=False)

    def end(self) -> str:
        """Return what was held back; no more tokens come."""
        if not self.stopped:
            self._pending += self._decoded(self._from, None)[len(self._decoded(self._from, self._read)) :]
            self._from = self._read = len(self._tokens)
        return self._released(final=True)

    def _decoded(self, start: int, stop: int | None) -> str:
        decoded: str = self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True)
        return decoded

    def _released(self, *, final: bool) -> str:
        """Give out of the pending text what is certain."""
        found = [place for place in (self._pending.find(each) for each in self._stop) if place >= 0]
        if found:
            self.stopped = True
            new, self._pending = self._pending[: min(found)], ""
        else:
            held = 0 if final else max((_overlap(self._pending, each) for each in self._stop), default=0)
            split = len(self._pending) - held
            new, self._pending = self._pending[:split], self._pending[split:]
        self.text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of a text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Vocabulary:
    """Texts of single tokens.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._special = frozenset(tokenizer.all_special_ids)

    def text(self, token: int) -> str:
        """Decode a token as it would stand in the middle of a text: some tokenizers treat the first of one apart."""
        if token not in self._texts:
            once, twice = (self._tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
            self._texts[token] = str(twice[len(once) :])
        return self._texts[token]

    def width(self, token: int) -> int:
        """Count the characters that a token adds to a text in which special tokens are left out."""
        return 0 if token in self._special else len(self.text(token))

    def probabilities(self, likeliest: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return {text: logprob} of (id, logprob) pairs, the likeliest first; of one text the likeliest counts."""
        found: dict[str, float] = {}
        for token, logprob in sorted(likeliest, key=lambda pair: -pair[1]):
            found.setdefault(self.text(token), logprob)
        return found
