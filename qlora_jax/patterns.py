"""Regular expressions that come with files, matched with limits.

One may take longer than the age of the universe to match forty characters, and nothing stops Python's matching from
outside. Those that are more than a name run in a child process with limits of its own.
"""

import json
import re
import reprlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlora_jax.errors import UserError

MOST = 1 << 14
"""Entries of a list of names or patterns, far more than a model has linears."""

_CHILD = Path(__file__).with_name("pattern_child.py")
# No repetition and no alternative: nothing to go back to.
_PLAIN = re.compile(r"\^?[\w.]+")


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
    done = subprocess.run(command, input=request, capture_output=True, encoding="ascii", check=False)
    if done.returncode:
        listed = patterns[0] if len(patterns) == 1 else list(patterns)
        raise UserError(
            f"{subject} is {reprlib.repr(listed)}, which takes too long or too much memory to match; write "
            f"a simpler regular expression, or names of modules."
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        shown = reprlib.repr(patterns[answer["number"]])
        raise UserError(f"{subject} has {shown}, which is no regular expression that can be used: {answer['error']}.")
    found: list[list[str]] = answer["found"]
    return found
