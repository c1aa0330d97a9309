"""Whether a run fits a GPU before its first step, how long its sequences may be, and what would make it fit."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qlora_jax.gpus import CHIPS, Chip
from qlora_jax.nn.long_sequence import tile_size
from qlora_jax.planner import Allowance, Bound, Longest, Plan, bound, describe, describe_bound, longest_sequence
from qlora_jax.planner.compiler import CompilationFailed, CompiledStep
from qlora_jax.training.config import TrainConfig

LEAST_RANK = 8
"""Adapters are not advised to be smaller."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A plan with what it was made from.

    Attributes:
        config: flags of the run.
        length: tokens of a sequence.
        plan: bytes.
        measurement: what the compiler said.
        positions: the model's own longest context, by its config.json; None if it does not say.
    """

    config: TrainConfig
    length: int
    plan: Plan
    measurement: CompiledStep
    positions: int | None = None

    @property
    def bound(self) -> Bound:
        """Lower bound on the time of a step."""
        return bound(self.plan.chip, self.measurement.work)

    @property
    def tile(self) -> int | None:
        """Tokens that everything but attention takes at a time; None if it takes all at once."""
        tokens = self.config.per_device_train_batch_size * self.length
        tile = tokens if self.config.remat_policy == "none" else tile_size(tokens)
        return tile if tile < tokens else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What keeps the plan from being that of the run, or as good as it could be."""
        found = []
        if self.positions is not None and self.length > self.positions:
            found.append(
                f"config.json gives the model {self.positions:,} positions; the plan says what more of them take, not "
                "what the model makes of them."
            )
        if self.measurement.flash or self.config.bf16 is False:
            return tuple(found)
        if not self.measurement.cudnn:
            found.append(
                "cuDNN is not installed here, so attention was compiled as XLA's, which keeps [S, S] scores; a GPU run "
                "has cuDNN's, which does not: pip install 'qlora-jax[plan]'."
            )
        else:
            found.append("cuDNN cannot do this model's attention at this length; XLA's keeps [S, S] scores.")
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Advice:
    """What would make a run fit.

    Attributes:
        changes: flags and the values they would need.
        planned: with those; not fitting if nothing here helps.
    """

    changes: Mapping[str, Any]
    planned: StepPlan

    def sentence(self, names: Mapping[str, str]) -> str:
        """For people; `names` gives the flags that are called otherwise where this is read."""
        flags = " ".join(f"--{names.get(name, name)} {value}" for name, value in self.changes.items())
        plan = self.planned.plan
        if plan.fits:
            return f"It would fit with {flags}: {plan.device_bytes / 1e9:.2f} of {plan.device_limit / 1e9:.2f} GB."
        tried = f", not with {flags} either" if flags else ""
        larger = smallest_gpu_for(plan)
        takes = "more than any GPU known here has" if larger is None else f"a GPU like {larger.name}"
        return f"No setting here makes it fit{tried}: it takes {takes}."


def smallest_gpu_for(plan: Plan) -> Chip | None:
    """The smallest GPU known that has this plan's bytes; it was not compiled for."""
    needed = plan.device_bytes - plan.allowance.total
    holding = [chip for chip in CHIPS.values() if needed + Allowance.of(chip).total <= chip.memory_bytes]
    return min(holding, key=lambda chip: chip.memory_bytes, default=None)


class Planner:
    """Plans for one model on one GPU; each setting is compiled once."""

    def __init__(
        self,
        chip: Chip,
        model_config: Mapping[str, Any],
        compile_step: Callable[[TrainConfig, Mapping[str, Any], int], CompiledStep],
        host_limit: int | None = None,
    ):
        self.chip, self.model_config, self.compile_step, self.host_limit = chip, model_config, compile_step, host_limit
        self._known: dict[tuple[TrainConfig, int], StepPlan] = {}

    def plan(self, config: TrainConfig, length: int) -> StepPlan:
        """The plan of a run whose micro-batches are `per_device_train_batch_size` sequences of `length` tokens.

        Raises:
            UserError: flags that no run could use; CompilationFailed if the step does not compile.
        """
        key = (config, length)
        if key not in self._known:
            measurement = self.compile_step(config, self.model_config, length)
            plan = Plan(self.chip, measurement.phases, measurement.host, self.host_limit)
            self._known[key] = StepPlan(
                config, length, plan, measurement, self.model_config.get("max_position_embeddings")
            )
        return self._known[key]

    def longest(self, config: TrainConfig, start: int, maximum: int | None = None) -> Longest:
        """The longest sequence that fits, see `longest_sequence`; one that does not compile does not fit."""

        def excess(length: int) -> float:
            try:
                return float(self.plan(config, length).plan.excess)
            except CompilationFailed:
                return math.inf

        return longest_sequence(excess, start=start, maximum=maximum)

    def advice(self, config: TrainConfig, length: int) -> Advice:
        """Settings that make a plan fit: one after the other is compiled, and kept if it helps, until one does.

        First those that change no result, then those that do, at last shorter sequences.
        """
        best, changes = self.plan(config, length), dict[str, Any]()
        for remedy in remedies(config):
            try:
                tried = self.plan(dataclasses.replace(best.config, **remedy), length)
            except CompilationFailed:
                continue
            if tried.plan.excess < best.plan.excess:
                best = tried
                changes |= {name: value for name, value in remedy.items() if getattr(config, name) != value}
            if best.plan.fits:
                return Advice(changes, best)
        found = self.longest(best.config, length // 2, maximum=length).length
        if not found:
            return Advice(changes, best)
        return Advice({**changes, "seq": found}, self.plan(best.config, found))


def remedies(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Settings that take less memory, the least costly first."""
    if config.optim_placement != "host":
        yield {"optim_placement": "host"}
    if config.remat_policy in ("none", "save_attention"):
        yield {"gradient_checkpointing": True, "remat": "full"}
    if config.bits == 4 and config.kernel != "fused":
        yield {"kernel": "fused"}
    if config.remat_policy != "offload":
        yield {"gradient_checkpointing": True, "remat": "offload"}
    rows = config.per_device_train_batch_size
    accumulated = config.gradient_accumulation_steps
    while rows > 1:
        # As many sequences a step as before.
        rows, accumulated = rows // 2, math.ceil(config.per_device_train_batch_size * accumulated / (rows // 2))
        yield {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
    if (smaller := config.optim.replace("32bit", "8bit")) != config.optim:
        yield {"optim": smaller}
    if config.adapter is None and config.lora_r > LEAST_RANK:
        yield {"lora_r": LEAST_RANK}


def describe_run(planned: StepPlan, dataset_seconds: float | None = None) -> str:
    """All that is known of a plan, for people."""
    lines = [describe(planned.plan), describe_bound(planned.bound, dataset_seconds)]
    if planned.tile is not None:
        lines.insert(1, f"All but attention takes {planned.tile:,} tokens at a time.")
    return "\n".join([*lines, *(f"Note: {warning}" for warning in planned.warnings)])


def as_json(
    planned: StepPlan, longest: Longest | None = None, at_longest: StepPlan | None = None, advice: Advice | None = None
) -> dict[str, Any]:
    """A plan as `scripts/plan.py --json` prints it; counts are bytes on one GPU and its host, times are bounds."""
    plan, limit = planned.plan, planned.bound
    return {
        "gpu": plan.chip.name,
        "seq": planned.length,
        "batch": planned.config.per_device_train_batch_size,
        "device_bytes": plan.device_bytes,
        "host_bytes": plan.host_bytes,
        "device_limit_bytes": plan.device_limit,
        "host_limit_bytes": plan.host_limit,
        "fits": plan.fits,
        "max_seq": None if longest is None else longest.length,
        "max_seq_device_bytes": None if at_longest is None else at_longest.plan.device_bytes,
        "max_seq_host_bytes": None if at_longest is None else at_longest.plan.host_bytes,
        "by_class": {**plan.by_class, **{f"host_{name}": count for name, count in plan.host.items()}},
        "programs": [{**dataclasses.asdict(phase.program), "by_class": phase.by_class} for phase in plan.phases],
        "attention": "cudnn" if planned.measurement.flash else "xla",
        "tile": planned.tile,
        "seconds_a_step_at_least": limit.seconds,
        "tokens_per_second_at_most": limit.tokens_per_second,
        "limited_by": limit.limited_by,
        "warnings": list(planned.warnings),
        "advice": None if advice is None else {"flags": dict(advice.changes), "fits": advice.planned.plan.fits},
    }


def describe_longest(longest: Longest, at_longest: StepPlan | None) -> str:
    """What a search came to, for people."""
    if at_longest is None:
        return f"Not even {longest.next_length} tokens a sequence fit."
    beyond = "" if longest.next_length is None else f"; {longest.next_length:,} do not"
    host = f"with {at_longest.plan.host_bytes / 1e9:.1f} GB of host memory"
    compiled = f"({len(longest.evaluations)} compiled)"
    return f"Longest sequence that fits: {longest.length:,} tokens, {host}{beyond} {compiled}."
