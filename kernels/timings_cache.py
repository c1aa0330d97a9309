"""The file of kernel timings on real GPUs that `scripts/benchmark.py kernels` writes and `auto` reads."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qlora_jax.environment import user_cache
from qlora_jax.errors import UserError
from qlora_jax.files import write_json
from qlora_jax.kernels.product import NF4, Product

VARIABLE = "QLORA_JAX_TUNING"
_FORMAT = "qlora-jax kernel timings 1"
# The roofline model knows more about a product farther than this from every timed one; in factors of two of M, N and K
# together.
_REACH = 4.0
_MOST_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one implementation of one product on a GPU.

    Attributes:
        product: what was multiplied, and how the weight was stored.
        implementation: "fused" or "unfused".
        seconds: median of repeated calls.
    """

    product: Product
    implementation: str
    seconds: float


def path() -> Path:
    """Return the file: the one QLORA_JAX_TUNING names, else kernels.json in the user's cache directory."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    return user_cache() / "kernels.json"


def timings(title: str) -> tuple[Timing, ...]:
    """Return the timings of the GPU that the driver calls `title`; empty without a file. Read only if it changed.

    Raises:
        UserError: the file is no file of timings, or QLORA_JAX_TUNING names one that does not exist.
    """
    file = path()
    try:
        stat = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        if os.environ.get(VARIABLE):
            raise UserError(f"{VARIABLE} names {file}, which does not exist: unset it or correct it.") from None
        return ()
    except OSError as error:
        raise _unusable(file, str(error)) from error
    return _read(file, stat.st_mtime_ns, stat.st_size).get(title, ())


def nearest(title: str, product: Product) -> dict[str, float] | None:
    """Return the seconds of both implementations at the timed product nearest to this one, or None if none is near.

    Only timings of the same direction, and of weights that are stored alike, count. Distances are in logarithms: the
    factors between the two M, the two N and the two K, multiplied, are at most 16.

    Raises:
        UserError: as `timings`.
    """
    products: dict[Product, dict[str, float]] = {}
    for timing in timings(title):
        if (timing.product.transposed, timing.product.storage) == (product.transposed, product.storage):
            products.setdefault(timing.product, {})[timing.implementation] = timing.seconds
    both = {product: seconds for product, seconds in products.items() if len(seconds) == 2}

    def distance(timed: Product) -> float:
        pairs = ((product.m, timed.m), (product.n, timed.n), (product.k, timed.k))
        return sum(abs(math.log2(ours / theirs)) for ours, theirs in pairs)

    best = min(both, key=distance, default=None)
    return None if best is None or distance(best) > _REACH else both[best]


def save(title: str, measured: Iterable[Timing]) -> Path:
    """Write the timings of a GPU into the file, replacing earlier ones of the same products; return the file.

    Raises:
        UserError: there is a file of another kind, or it cannot be written.
    """
    file = path()
    chips: dict[str, tuple[Timing, ...]] = {}
    if file.exists():
        stat = file.stat()
        chips = dict(_read(file, stat.st_mtime_ns, stat.st_size))
    kept = {dataclasses.replace(timing, seconds=0.0): timing for timing in chips.get(title, ())}
    kept |= {dataclasses.replace(timing, seconds=0.0): timing for timing in measured}
    chips[title] = tuple(kept.values())
    content = {
        "format": _FORMAT,
        "chips": {name: [_entry(timing) for timing in each] for name, each in chips.items()},
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content, indent=1)
    except OSError as error:
        raise UserError(f"The timings {file} cannot be written: {error.strerror}; set {VARIABLE}.") from error
    return file


@functools.lru_cache(maxsize=4)
def _read(file: Path, modified: int, size: int) -> dict[str, tuple[Timing, ...]]:
    """Timings by the GPU's title; `modified` and `size` make a changed file another entry of the cache."""
    del modified
    if size > _MOST_BYTES:
        raise _unusable(file, f"it has more than {_MOST_BYTES} bytes")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise _unusable(file, str(error)) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _unusable(file, f'its "format" is not {_FORMAT!r}')
    try:
        return {title: tuple(map(_timing, entries)) for title, entries in content["chips"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unusable(file, f"an entry is not a timing ({error!r})") from error


def _entry(timing: Timing) -> dict[str, Any]:
    return {
        **timing.product.to_json(),
        "implementation": timing.implementation,
        "seconds": timing.seconds,
    }


def _timing(entry: dict[str, Any]) -> Timing:
    # Files without it are of NF4.
    product = Product.from_json(entry, absent=NF4)
    # Files written before the implementation was renamed.
    implementation = "unfused" if entry["implementation"] == "dequantize" else entry["implementation"]
    timing = Timing(product, implementation, entry["seconds"])
    if implementation not in ("fused", "unfused") or not 0 < timing.seconds < math.inf:
        raise ValueError(f"{entry}")
    return timing


def _unusable(file: Path, why: str) -> UserError:
    return UserError(
        f"The kernel timings {file} cannot be used: {why}. Delete the file, or write it again with "
        "scripts/benchmark.py kernels."
    )
