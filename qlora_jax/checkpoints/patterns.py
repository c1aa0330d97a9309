"""Modules that the settings of a PEFT adapter name: lists of names, "all-linear", regular expressions.

A regular expression may take longer than the age of the universe to match forty characters, and nothing stops Python's
matching from outside. Those that are more than a name run in a child process with limits of its own.
"""

import dataclasses
import json
import re
import reprlib
import subprocess
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from qlora_jax.errors import UserError

_CHILD = Path(__file__).with_name("pattern_child.py")
# No repetition and no alternative: nothing to go back to.
_PLAIN = re.compile(r"\^?[\w.]+")
_ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of a model.

    Attributes:
        spellings: what it is called; versions of transformers may differ in it.
        linear: it is a linear that may be adapted.
    """

    spellings: tuple[str, ...]
    linear: bool


def targeted(targets: str | list[str], modules: Collection[Module], subject: str) -> frozenset[Module]:
    """Return the modules that PEFT's `target_modules` names.

    Args:
        targets: names of modules or their last parts; a regular expression of whole names; or "all-linear".
        modules: of the model.
        subject: beginning of messages: file and field.

    Raises:
        UserError: a string that is no regular expression, or takes too long.
    """
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        return frozenset(module for module in modules if module.linear)
    return named(targets, modules, subject)


def named(value: str | list[str], modules: Collection[Module], subject: str) -> frozenset[Module]:
    """Return the modules that PEFT's `exclude_modules` names: `targeted` without "all-linear"."""
    if isinstance(value, str):
        names = [name for module in modules for name in module.spellings]
        matched = matching([value], names, subject)[value]
        return frozenset(module for module in modules if not matched.isdisjoint(module.spellings))
    return frozenset(
        module for module in modules if any(ends_with(name, end) for name in module.spellings for end in value)
    )


def ends_with(name: str, end: str) -> bool:
    """Tell if a module's name is `end`, or its last parts are."""
    return f".{name}".endswith(f".{end}")


def matching_ends(patterns: Sequence[str], names: Iterable[str], subject: str) -> dict[str, frozenset[str]]:
    """Return the names that each key of PEFT's `rank_pattern` or `alpha_pattern` matches, see `matching`.

    A key matches a whole name or the last parts of one; whole names only after "^" (PEFT's `get_pattern_key`).
    """
    return matching(patterns, names, subject, before=r"(.*\.)?(", after=")$")


def matching(
    patterns: Sequence[str], names: Iterable[str], subject: str, *, before: str = "", after: str = ""
) -> dict[str, frozenset[str]]:
    """Return the names that each regular expression matches as a whole.

    Args:
        patterns: regular expressions, from a file.
        names: to match.
        subject: beginning of messages: file and field.
        before: what stands before every pattern.
        after: what stands behind it.

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
            f"{subject} is {reprlib.repr(listed)}, which takes too long to match; write a simpler regular "
            f"expression, or names of modules."
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        shown = reprlib.repr(patterns[answer["number"]])
        raise UserError(f"{subject} has {shown}, which is no regular expression that can be used: {answer['error']}.")
    found: list[list[str]] = answer["found"]
    return found
