"""Errors meant for the person at the keyboard."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class UserError(ValueError):
    """Bad input, told in one sentence that names the file, field or tensor and what to do about it.

    Fields of a config stand in backticks, with the value where that is the point: "`max_steps=0`: must be at least 1."
    The command line prints the message alone, its fields as flags ("--max_steps 0: ..."), and exits with status 1.
    """

    @property
    def sentences(self) -> tuple[str, ...]:
        """The complaints, one unless it is a `UserErrors`."""
        return (str(self),)


class UserErrors(UserError):
    """Several complaints, a line each under a heading that counts them."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__(tuple(sentences))

    @property
    def sentences(self) -> tuple[str, ...]:
        """The complaints."""
        return self.args[0]

    def __str__(self) -> str:
        """Return the heading and the complaints."""
        return "\n  ".join([f"{len(self.sentences)} settings are wrong:", *self.sentences])


def outside(settings: Any, ranges: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Return a sentence for every setting outside its range.

    Args:
        settings: what they are attributes of.
        ranges: name -> (range in words, True if the value is in it).
    """
    return [f"`{name}={getattr(settings, name)}`: must be {text}." for name, (text, good) in ranges.items() if not good]


def refuse_all(sentences: Iterable[str]) -> None:
    """Raise what is complained of: nothing, a UserError of one sentence, or a `UserErrors` of each different one."""
    different = list(dict.fromkeys(sentences))
    if len(different) == 1:
        raise UserError(different[0])
    if different:
        raise UserErrors(different)
