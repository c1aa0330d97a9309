"""Seeded mutations of files, and the loop that reads the mutants."""

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.errors import UserError

LONGEST_S = 5.0
"""Seconds that reading a mutant may take."""

_STRANGE: tuple[Any, ...] = (
    None, True, False, "", "x", "ä\x00\n", "../x", "/etc/passwd", "n" * 300, 0, 1, -1, 2, 7, 10**6, 2**31, 2**63,
    10**30, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), [], [None], ["x"], [[1]], [1, 2], {}, {"x": 1}, [-1],
)  # fmt: skip
_RAW = (
    b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5_000, b'"\\ud800"', b'"\\udc00x"', b"NaN", b"-Infinity", b"1e999",
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b",", b'"', b"\\", b"{}", b"[]", b"null", b"\xed\xa0\x80",
)  # fmt: skip


def mutated_json(document: Any, rng: random.Random) -> bytes:
    """Change one to three values of a JSON document, or its text."""
    if rng.random() < 0.25:
        return mutated_bytes(json.dumps(document).encode(), rng)
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _mutate_value(document, rng)
    return json.dumps(document).encode()


def _mutate_value(document: Any, rng: random.Random) -> None:
    """Change a value somewhere in a document; deep ones are as likely as shallow ones."""
    places = [(holder, key) for holder in _holders(document) for key in _keys(holder)]
    if not places:
        return
    holder, key = rng.choice(places)
    action = rng.random()
    if action < 0.1:
        del holder[key]
    elif action < 0.15 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif action < 0.25 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, str(holder[key])))
    elif action < 0.3 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(rng.choice(holder)))
    elif action < 0.4:
        other, key_of_other = rng.choice(places)
        holder[key] = copy.deepcopy(other[key_of_other]) if key_of_other in _keys(other) else None
    else:
        holder[key] = copy.deepcopy(rng.choice(_STRANGE))  # later mutations change what is in the document


def _holders(document: Any) -> list[Any]:
    found = [document] if isinstance(document, dict | list) else []
    for holder in found:
        found.extend(holder[key] for key in _keys(holder) if isinstance(holder[key], dict | list))
    return found


def _keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def mutated_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut, repeat, or insert something that parsers do not like."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        action = rng.random()
        if action < 0.4 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif action < 0.5:
            del changed[at:]
        elif action < 0.6:
            del changed[at : at + rng.choice((1, 2, 8, 64))]
        elif action < 0.7:
            changed[at:at] = changed[at : at + rng.choice((1, 8, 64))]
        elif action < 0.8:
            changed[at : at + 8] = rng.choice((0, 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
        elif action < 0.9:
            changed[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
        else:
            changed[at:at] = rng.choice(_RAW)
    return bytes(changed)


def run_cases(
    cases: int,
    mutate: Callable[[random.Random], bytes],
    read: Callable[[bytes], Any],
    check: Callable[[bytes, Any], None],
    *names: str,
) -> None:
    """Read mutants: each gives what `check` accepts, or a `UserError` with one of `names`, within `LONGEST_S`.

    Args:
        cases: how many; the seed of each is its number, and is part of what a failure says.
        mutate: makes a mutant.
        read: writes it where the reader under test finds it, and reads it.
        check: compares what was read with what the mutant says.
        names: of the file, as messages have it.
    """
    read_well = 0
    for seed in range(cases):
        mutant = mutate(random.Random(seed))
        start = time.perf_counter()
        try:
            value = read(mutant)
        except UserError as error:
            text = str(error)
            assert any(name in text for name in names), f"seed {seed}: no file is named: {text!r}"
            assert "Traceback" not in text and len(text) < 250_000, f"seed {seed}: {text[:500]!r}"
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}; {mutant[:300]!r}")
        else:
            check(mutant, value)
            read_well += 1
        took = time.perf_counter() - start
        assert took < LONGEST_S, f"seed {seed} took {took:.1f} s"
    # A reader that refuses everything would pass.
    assert cases < 200 or read_well > cases // 500, f"only {read_well} mutants of {cases} could be read"


def writer(file: Path, read: Callable[[], Any]) -> Callable[[bytes], Any]:
    """Return a function that writes a mutant to `file`, then reads."""

    def write_and_read(mutant: bytes) -> Any:
        file.write_bytes(mutant)
        return read()

    return write_and_read
