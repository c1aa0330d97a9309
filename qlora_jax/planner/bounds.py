"""A lower bound on the time of a training step: counted work against data-sheet peaks. Not a prediction.

    seconds >= max(FLOPs / tensor peak, device bytes / memory bandwidth, host bytes / link bandwidth)

No program reaches those peaks, nor overlaps all three; nothing here is measured.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

from qlora_jax.gpus import Chip
from qlora_jax.nn.attention import Attention


@dataclasses.dataclass(frozen=True)
class MatmulFlops:
    """FLOPs of a program's matrix products, two for a multiply-add.

    Attributes:
        plain: of products without batch dimensions, those with weights.
        batched: of products with batch dimensions, those of attention.
    """

    plain: float = 0.0
    batched: float = 0.0

    def __add__(self, other: "MatmulFlops") -> "MatmulFlops":
        """Add up."""
        return MatmulFlops(self.plain + other.plain, self.batched + other.batched)

    def __mul__(self, times: float | int) -> "MatmulFlops":
        """Repeat."""
        return MatmulFlops(times * self.plain, times * self.batched)


def count_products(jaxpr: core.ClosedJaxpr, *, trips: float) -> MatmulFlops:
    """Count the matrix products of a program, loops included, except those whose results nothing reads.

    Where a program differs by platform the portable variant counts; of other branches, the cheapest.

    Args:
        jaxpr: the program, traced in a form without custom kernels, whose products would not be seen.
        trips: iterations of its `while` loops, which no program states.
    """
    live, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _count(live, trips)


def _count(jaxpr: core.Jaxpr, trips: float) -> MatmulFlops:
    total = MatmulFlops()
    for equation in jaxpr.eqns:
        params = equation.params
        match equation.primitive.name:
            case "dot_general":
                total += _dot(equation)
            case "cond":
                total += _branch(params, trips)
            case "scan":
                total += _count(params["jaxpr"].jaxpr, trips) * params["length"]
            case "while":
                total += (_count(params["cond_jaxpr"].jaxpr, trips) + _count(params["body_jaxpr"].jaxpr, trips)) * trips
            case "custom_vjp_call" | "custom_jvp_call":
                # The rules for derivatives are parameters too; they are not run.
                total += _count((params.get("call_jaxpr") or params["jaxpr"]).jaxpr, trips)
            case "shard_map":
                total += _count(params["jaxpr"], trips) * math.prod(params["mesh"].shape.values())
            case _:
                for inner in _inner(params):
                    total += _count(inner, trips)
    return total


def _branch(params: dict[str, Any], trips: float) -> MatmulFlops:
    branches = [_count(branch.jaxpr, trips) for branch in params["branches"]]
    platforms = params.get("branches_platforms")
    if platforms is not None and None in platforms:
        return branches[platforms.index(None)]
    return min(branches, key=lambda products: products.plain + products.batched)


def _dot(equation: Any) -> MatmulFlops:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    lhs, out = equation.invars[0].aval, equation.outvars[0].aval
    flops = 2.0 * math.prod(out.shape) * math.prod(lhs.shape[dim] for dim in contracted)
    return MatmulFlops(batched=flops) if batch else MatmulFlops(plain=flops)


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def visible_fraction(length: int, facts: Attention) -> float:
    """Share of the S x S scores of an attention over `length` tokens that its facts show: those it must compute."""
    if facts.window is None:
        return (length + 1) / (2 * length) if facts.causal else 1.0
    reach = min(length, facts.window)
    # Query i sees min(i + 1, reach) keys to the left, itself included, and as many to the right if it is not causal.
    left = (reach * (reach + 1) / 2 + (length - reach) * reach) / length**2
    return left if facts.causal else 2 * left - 1 / length


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Least work of one training step.

    Attributes:
        tokens: tokens trained on.
        flops: FLOPs of matrix products.
        device_bytes: bytes read from or written to device memory.
        host_bytes: bytes over the link between host and device, in the direction that carries more.
    """

    tokens: int
    flops: float
    device_bytes: int
    host_bytes: int


@dataclasses.dataclass(frozen=True)
class Bound:
    """Lower bound on the time of a step on a GPU.

    Attributes:
        tokens: tokens of the step.
        compute, memory, link: seconds that each takes by itself.
    """

    tokens: int
    compute: float
    memory: float
    link: float

    @property
    def seconds(self) -> float:
        """Least seconds of a step."""
        return max(self.compute, self.memory, self.link)

    @property
    def limited_by(self) -> str:
        """The one that takes longest: compute, memory or host link."""
        return max(
            ("compute", self.compute), ("memory", self.memory), ("host link", self.link), key=lambda pair: pair[1]
        )[0]

    @property
    def tokens_per_second(self) -> float:
        """Most tokens a second."""
        return self.tokens / self.seconds


def bound(chip: Chip, work: StepCost) -> Bound:
    """Divide a step's work by the peaks of a GPU."""
    return Bound(
        work.tokens,
        compute=work.flops / chip.bf16_flops,
        memory=work.device_bytes / chip.memory_bandwidth,
        link=work.host_bytes / chip.host_bandwidth,
    )
