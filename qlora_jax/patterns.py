"""Regular expressions and lists of names that come with files, matched with limits.

One may take longer than the age of the universe to match forty characters, and nothing stops Python's matching from
outside. Those that are more than a name run in a child process with limits of its own.
"""

import json
import re
import reprlib
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from qlora_jax.errors import UserError

MOST = 1 << 11
"""Entries of a list of names or patterns; a model of 405B parameters has 882 linears."""

_MOST_CHARACTERS = 1 << 18
# Entries times characters of all names they are compared with: seconds.
_MOST_COMPARED = 1 << 28

_CHILD = Path(__file__).with_name("pattern_child.py")
# No repetition and no alternative: nothing to go back to.
_PLAIN = re.compile(r"\^?[\w.]+")


def check_amount(entries: Collection[str], names: Collection[str], subject: str) -> None:
    """Refuse a list that takes too long to compare with names, whatever its entries mean.

    Args:
        entries: names or patterns, from a file.
        names: to compare each with.
        subject: beginning of the message: file and field.

    Raises:
        UserError: says how long the list is.
    """
    length, compared = sum(map(len, entries)), len(entries) * sum(map(len, names))
    if len(entries) > MOST or length > _MOST_CHARACTERS or compared > _MOST_COMPARED:
        raise UserError(
            f"{subject} has {len(entries):,} entries of {length:,} characters, which are too many to compare with "
            f"{len(names):,} names; name fewer modules, with patterns that stand for several."
        )


def matching(
    patterns: Sequence[str], names: Iterable[str], subject: str, *, before: str = "", after: str = ""
) -> dict[str, frozenset[str]]:
    """Return the names that each regular expression matches as a whole.

    Args:
        patterns: regular expressions, from a file.
        names: to match.
        subject: beginning of messages: file and field.
        before: an expression that stands before every pattern; no repetition of one.
        after: one that stands behind it.

    Raises:
        UserError: one that is no regular expression, or they take too long.
    """
    names = list(names)
    check_amount(patterns, names, subject)
    expressions = [f"{before}{pattern}{after}" for pattern in patterns]
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        found = [list(filter(re.compile(expression).fullmatch, names)) for expression in expressions]
    else:
        found = _in_child(patterns, expressions, names, subject)
    return {pattern: frozenset(matched) for pattern, matched in zip(patterns, found, strict=True)}


def _in_child(
    patterns: Sequence[str], expressions: Sequence[str], names: Sequence[str], subject: str
) -> list[list[str]]:
    """Match expressions where they can be stopped."""
    command = [sys.executable, "-I", "-S", str(_CHILD)]
    request = json.dumps({"expressions": expressions, "names": names})
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, encoding="ascii", errors="replace", check=False
        )
    except OSError as error:  # no memory for another process, or no Python
        raise UserError(f"{subject} cannot be matched: {command[0]} cannot be run ({error.strerror}).") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL) or said[0].startswith("MemoryError"):
            listed = patterns[0] if len(patterns) == 1 else list(patterns)
            raise UserError(
                f"{subject} is {reprlib.repr(listed)}, which takes too long or too much memory to match; write "
                f"a simpler regular expression, or names of modules."
            )
        raise UserError(f"{subject} cannot be matched: {command[0]} failed to run {_CHILD.name} ({said[0]}).")
    answer = json.loads(done.stdout)
    if "error" in answer:
        shown = reprlib.repr(patterns[answer["number"]])
        raise UserError(f"{subject} has {shown}, which is no regular expression that can be used: {answer['error']}.")
    found: list[list[str]] = answer["found"]
    return found
