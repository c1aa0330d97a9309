"""The implementations that `auto` resolves to, as data: a run records them once and keeps to them when it resumes.

Left alone, `auto` reads the timings that `scripts/benchmark.py kernels` wrote, a file outside the run: benchmarking
between a stop and a resume would change which kernels the resumed run compiles, and so the last bits of its numbers. A
run therefore resolves its products when it begins, records the answer beside its other facts, and traces all its
programs while that answer is pinned:

    choices = kernels.resolve(weights, rows, dtype, implementation=flag)     # a new run
    record["kernels"] = kernels.choices_to_json(choices)
    choices = kernels.choices_from_json(record["kernels"])                   # a resumed one
    with kernels.pinned(choices):
        ...                                                                  # everything that traces or compiles
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from qlora_jax.errors import UserError
from qlora_jax.kernels.product import Product


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation of one product.

    Attributes:
        product: its shape and storage.
        implementation: "xla", "fused" or "unfused".
        reason: a few words for people; not part of the choice, two choices may differ in it and be equal.
        weights: names of the weights that are multiplied so; not part of the choice.
    """

    product: Product
    implementation: str
    reason: str = dataclasses.field(default="", compare=False)
    weights: tuple[str, ...] = dataclasses.field(default=(), compare=False)


# None: nothing is pinned. A part of the key of JAX's caches: a function traced under other choices is traced again.
_pinned: Any = jax.make_user_context(None)


def pinned(choices: Iterable[Choice]) -> contextlib.AbstractContextManager[None]:
    """Make `auto` follow these choices, and no file of timings, in all that is traced inside the returned context.

    A product that is not among them is chosen by the roofline model alone, which depends on the GPU and nothing else. A
    choice never makes a kernel run where it cannot: on other hardware, and for weights and dtypes that the kernels do
    not take, `auto` falls back to XLA as ever. An implementation asked for by name is not affected.

    JAX traces a function when it is first called with new shapes, and a backward pass when it is called: keep the
    context open around a run's calls, not only around the definition of its functions. It holds in this thread only.
    """
    return _pinned(tuple(choices))


def pinned_implementation(product: Product) -> tuple[bool, str | None]:
    """Return (choices are pinned, the implementation they name for a product or None)."""
    choices = _pinned.value
    if choices is None:
        return False, None
    named = _by_product(choices)
    return True, named.get(product) or named.get(dataclasses.replace(product, storage=None))


@functools.lru_cache(maxsize=8)
def _by_product(choices: tuple[Choice, ...]) -> dict[Product, str]:
    return {choice.product: choice.implementation for choice in choices}


def choices_to_json(choices: Iterable[Choice]) -> list[dict[str, Any]]:
    """Return choices as JSON values, without their reasons: equal for runs that compile the same kernels."""
    return [
        {**choice.product.to_json(), "implementation": choice.implementation}
        for choice in sorted(choices, key=lambda choice: _order(choice.product))
    ]


def _order(product: Product) -> tuple[Any, ...]:
    return product.m, product.n, product.k, product.transposed, repr(product.storage)


def choices_from_json(value: Any) -> tuple[Choice, ...]:
    """Return the choices of `choices_to_json`; one that says no storage, as earlier versions wrote it, is for any.

    Raises:
        UserError: the value is something else.
    """
    try:
        choices = tuple(
            Choice(Product.from_json(entry, absent=None), entry["implementation"], "recorded choice") for entry in value
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The recorded kernel choices cannot be read ({error!r}): start the run anew.") from error
    for choice in choices:
        if choice.implementation not in ("xla", "fused", "unfused"):
            raise UserError(f"The recorded kernel choice {choice} cannot be used: start the run anew.")
    return choices


def describe(choices: Sequence[Choice]) -> list[str]:
    """Format choices for people: a line for each number of rows and each implementation with its reason."""
    lines = []
    for m in dict.fromkeys(choice.product.m for choice in choices):
        of_rows = [choice for choice in choices if choice.product.m == m]
        groups: dict[tuple[str, str], list[Choice]] = {}
        for choice in of_rows:
            groups.setdefault((choice.implementation, choice.reason), []).append(choice)
        total = len({name for choice in of_rows for name in choice.weights})
        for (implementation, reason), group in groups.items():
            where = f"{total} of {total} linears, forward and backward,"
            if len(groups) > 1:
                where = "; ".join(_shapes(group))
            lines.append(f"kernel: {implementation} ({reason}) for {where} at M={m}")
    return lines


def _shapes(choices: Iterable[Choice]) -> list[str]:
    """Weights and directions of some choices; the direction is left out where both are there."""
    directions: dict[str, list[str]] = {}
    for choice in choices:
        for name in choice.weights:
            shape = f"{name} {choice.product.n}x{choice.product.k}"
            directions.setdefault(shape, []).append("backward" if choice.product.transposed else "forward")
    return [shape if len(found) > 1 else f"{shape} {found[0]}" for shape, found in directions.items()]
