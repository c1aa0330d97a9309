"""Plans of one run on one GPU or on several, as text and as JSON: what the command `plan` prints."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.formatting import format_bytes, table
from qlora_jax.gpus import CHIPS, Chip
from qlora_jax.models import DecoderConfig
from qlora_jax.planner.planning import Advice, Planner, StepPlan, describe_longest, describe_run
from qlora_jax.planner.search import Longest
from qlora_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Request:
    """A run to be planned.

    Attributes:
        model: what the model is called, for people.
        model_config: its shapes and constants.
        config: of the run.
        length: tokens of a sequence.
        find_longest: also find the longest sequence that fits.
        host_limit: bytes of pinned host memory that may be used; None for no limit.
        dataset_tokens, dataset_rows: size of the data, for the least time of an epoch; at most one of the two.
    """

    model: str
    model_config: DecoderConfig
    config: TrainConfig
    length: int
    find_longest: bool = False
    host_limit: int | None = None
    dataset_tokens: int | None = None
    dataset_rows: int | None = None

    @property
    def title(self) -> str:
        """Size of a forward pass, for people."""
        return f"{self.config.per_device_train_batch_size} x {self.length:,} tokens in a forward pass"


@dataclasses.dataclass(frozen=True)
class GPUPlan:
    """Everything found about a run on one GPU.

    Attributes:
        request: the run.
        planned: its plan.
        longest: the longest sequence, if it was asked for.
        at_longest: plan of that; None if not even the shortest fits.
        advice: what would make the run fit; None if it fits or nobody asked.
    """

    request: Request
    planned: StepPlan
    longest: Longest | None = None
    at_longest: StepPlan | None = None
    advice: Advice | None = None

    @property
    def dataset_seconds(self) -> float | None:
        """Least seconds of an epoch; None where the request does not give the size of the data."""
        bound, config = self.planned.bound, self.request.config
        if self.request.dataset_tokens is not None:
            return self.request.dataset_tokens / bound.tokens_per_second
        if self.request.dataset_rows is not None:
            rows_a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
            return math.ceil(self.request.dataset_rows / rows_a_step) * bound.seconds
        return None


def plan_on(chip: Chip, request: Request, *, advise: bool = True) -> GPUPlan:
    """Plan a run on one GPU.

    Args:
        chip: the GPU.
        request: the run.
        advise: where the run does not fit, find settings with which it would.

    Raises:
        UserError: as `Planner.plan`.
    """
    with Planner.open(chip, request.model_config, host_limit=request.host_limit) as planner:
        planned = planner.plan(request.config, request.length)
        longest = planner.longest(request.config, request.length) if request.find_longest else None
        at_longest = planner.plan(request.config, longest.length) if longest is not None and longest.length else None
        advice = planner.advice(request.config, request.length) if advise and not planned.plan.fits else None
        return GPUPlan(request, planned, longest, at_longest, advice)


def compare(request: Request) -> dict[str, GPUPlan | UserError]:
    """Plan a run on every GPU known, without advice; GPU -> its plan, or why there is none.

    Raises:
        UserError: there is a plan for none of them.
    """

    def attempt(chip: Chip) -> GPUPlan | UserError:
        try:
            return plan_on(chip, request, advise=False)
        except UserError as error:
            return error

    # Two compilers at a time: each takes a gigabyte or two.
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(CHIPS, pool.map(attempt, CHIPS.values()), strict=True))
    errors = [value for value in found.values() if isinstance(value, UserError)]
    if len(errors) == len(found):
        raise errors[0]
    return found


def describe_gpu(found: GPUPlan) -> str:
    """Put everything found about a run on one GPU in words, but for the advice, see `Advice.sentence`."""
    lines = [
        f"{found.request.model} on {found.planned.plan.chip.title}: {found.request.title}",
        describe_run(found.planned, found.dataset_seconds),
    ]
    if found.longest is not None:
        lines.append(describe_longest(found.longest, found.at_longest))
        lines.extend(f"Note: {warning}" for warning in (found.at_longest.warnings if found.at_longest else ()))
    return "\n".join(lines)


def describe_comparison(request: Request, found: Mapping[str, GPUPlan | UserError]) -> str:
    """Write a line for each GPU; an error in place of a plan says why there is none."""
    searched = ["max_seq"] if request.find_longest else []
    lines: list[Sequence[str]] = [["GPU", "memory", "device", "host", "fits", *searched, "s/step >=", "tok/s <="]]
    failures = []
    for name, result in found.items():
        if isinstance(result, UserError):
            failures.append(f"  {name}: {result}")
            continue
        plan, bound = result.planned.plan, result.planned.bound
        lines.append(
            [
                name,
                *map(format_bytes, (plan.device_limit, plan.device_bytes, plan.host_bytes)),
                "yes" if plan.fits else "no",
                *([f"{result.longest.length:,}"] if result.longest is not None else []),
                f"{bound.seconds:.3g}",
                f"{bound.tokens_per_second:,.0f}",
            ]
        )
    return "\n".join([f"{request.model}: {request.title}", table(lines), *failures])


def warnings_of(found: Mapping[str, GPUPlan | UserError]) -> list[str]:
    """Warnings of all plans, each once."""
    plans = [result.planned for result in found.values() if isinstance(result, GPUPlan)]
    return sorted({warning for planned in plans for warning in planned.warnings})


def as_json(found: GPUPlan) -> dict[str, Any]:
    """Everything found, for programs; counts are bytes on one GPU and its host, times are lower bounds."""
    planned, at_longest, advice = found.planned, found.at_longest, found.advice
    plan, limit = planned.plan, planned.bound
    return {
        "model": found.request.model,
        "gpu": plan.chip.name,
        "seq": planned.length,
        "batch": planned.config.per_device_train_batch_size,
        "device_bytes": plan.device_bytes,
        "host_bytes": plan.host_bytes,
        "device_limit_bytes": plan.device_limit,
        "host_limit_bytes": plan.host_limit,
        "fits": plan.fits,
        "max_seq": None if found.longest is None else found.longest.length,
        "max_seq_device_bytes": None if at_longest is None else at_longest.plan.device_bytes,
        "max_seq_host_bytes": None if at_longest is None else at_longest.plan.host_bytes,
        "max_seq_seconds_a_step_at_least": None if at_longest is None else at_longest.bound.seconds,
        "by_class": {**plan.by_class, **{f"host_{name}": count for name, count in plan.host.items()}},
        "programs": [{**dataclasses.asdict(phase.program), "by_class": phase.by_class} for phase in plan.phases],
        "attention": "xla" if planned.fallbacks else "cudnn",
        "tile": planned.tile,
        "seconds_a_step_at_least": limit.seconds,
        "tokens_per_second_at_most": limit.tokens_per_second,
        "limited_by": limit.limited_by,
        "warnings": list(planned.warnings),
        "advice": None if advice is None else {"flags": _advised(advice), "fits": advice.planned.plan.fits},
        "seconds_for_the_dataset_at_least": found.dataset_seconds,
    }


def _advised(advice: Advice) -> dict[str, Any]:
    return {**advice.changes, **({} if advice.length is None else {"seq": advice.length})}
