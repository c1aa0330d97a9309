"""Modules that the settings of a PEFT adapter name: by lists of names, "all-linear" or regular expressions."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

from qlora_jax.patterns import matching

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
    ends = frozenset(value)
    return frozenset(module for module in modules if any(not ends.isdisjoint(ends_of(n)) for n in module.spellings))


def ends_of(name: str) -> Iterator[str]:
    """Yield what may name a module in a list: its name and the last parts of it."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def matching_ends(patterns: Sequence[str], names: Iterable[str], subject: str) -> dict[str, frozenset[str]]:
    """Return the names that each key of PEFT's `rank_pattern` or `alpha_pattern` matches, see `matching`.

    A key matches a whole name or the last parts of one; whole names only after "^" (PEFT's `get_pattern_key`).
    """
    return matching(patterns, names, subject, before=r"(.*\.)?(", after=")$")
