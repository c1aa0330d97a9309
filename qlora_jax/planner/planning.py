"""Plans before the first step: does a run fit a GPU, how long may its sequences be, what would make it fit."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qlora_jax.extras import install_command
from qlora_jax.formatting import format_bytes
from qlora_jax.gpus import CHIPS, Chip
from qlora_jax.models import DecoderConfig
from qlora_jax.nn.long_sequence import TILE, tile_size
from qlora_jax.planner import Allowance, Bound, Longest, Plan, bound, describe, describe_bound, longest_sequence
from qlora_jax.planner.compiler import AttentionKind, CompilationFailed, CompiledStep, Compiler
from qlora_jax.training import setup
from qlora_jax.training.config import TrainConfig

LEAST_RANK = 8
"""Adapters are not advised to be smaller."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """A plan and its sources.

    Attributes:
        config: of the run.
        length: tokens of a sequence.
        plan: bytes.
        compiled: the compiled step.
        positions: the model's own longest context, by its config.json.
    """

    config: TrainConfig
    length: int
    plan: Plan
    compiled: CompiledStep
    positions: int

    @property
    def bound(self) -> Bound:
        """Lower bound on the time of a step."""
        return bound(self.plan.chip, self.compiled.work)

    @property
    def _tokens(self) -> int:
        return self.config.per_device_train_batch_size * self.length

    @property
    def tile(self) -> int | None:
        """Tokens that everything but attention takes at a time; None if it takes all at once."""
        tile = self._tokens if self.config.remat_policy == "none" else tile_size(self._tokens)
        return tile if tile < self._tokens else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences that limit the plan's validity, or name a cost that another setting would not have."""
        found = beyond_positions(self.length, self.positions)
        if self.tile is None and self.config.remat_policy != "none" and self._tokens > 2 * TILE:
            found.append(
                f"{self._tokens:,} tokens do not divide into tiles, which would take far less memory; a multiple of "
                "512 does."
            )
        return (*found, *map(self._attention_warning, self.fallbacks))

    @property
    def fallbacks(self) -> tuple[AttentionKind, ...]:
        """Kinds of attention that XLA does, because cuDNN cannot."""
        return tuple(kind for kind in self.compiled.attentions if kind.obstacle is not None)

    def _attention_warning(self, kind: AttentionKind) -> str:
        layers = sum(other.layers for other in self.compiled.attentions)
        which = "Attention" if kind.layers == layers else f"Attention of {kind.layers} of {layers} layers"
        shape = " x ".join(f"{size:,}" for size in kind.scores)
        cost = f"XLA's, which keeps float32 scores [{shape}], {format_bytes(kind.score_bytes)} at a time"
        if self.compiled.cudnn or self.config.bf16 is False:
            return f"{which} is {cost}; cuDNN cannot: {kind.obstacle}"
        return (
            f"{which} was compiled as {cost}, because cuDNN is not installed here; a GPU run has cuDNN's, which keeps "
            f"none: {install_command('plan')}."
        )


def beyond_positions(length: int, positions: int) -> list[str]:
    """List a sentence if there are more tokens than the model has positions."""
    if length <= positions:
        return []
    return [
        f"config.json gives the model {positions:,} positions; the plan counts the memory of more, and says nothing of "
        "what the model makes of them."
    ]


@dataclasses.dataclass(frozen=True)
class Advice:
    """Settings that would make a run fit.

    Attributes:
        changes: fields of `TrainConfig` and the values they would need.
        length: tokens of a sequence, if it would have to be shorter; else None.
        planned: plan with those; it does not fit if nothing here helps.
    """

    changes: Mapping[str, Any]
    length: int | None
    planned: StepPlan

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of `TrainConfig` and their values, those that set the length of a sequence included."""
        shorter = {} if self.length is None else length_fields(self.planned.config, self.length)
        return {**self.changes, **shorter}

    def sentence(self, settings: str | None = None) -> str:
        """Put the advice in words.

        Args:
            settings: `fields` as the reader would set them; by default as fields, "`remat=offload`".
        """
        if settings is None:
            settings = " ".join(f"`{name}={value}`" for name, value in self.fields.items())
        plan = self.planned.plan
        if plan.fits:
            return f"It would fit with {settings}: {plan.device_bytes / 1e9:.2f} of {plan.device_limit / 1e9:.2f} GB."
        tried = f", not with {settings} either" if settings else ""
        if plan.device_excess <= 0:
            return f"No setting here makes it fit{tried}: it takes {plan.host_bytes / 1e9:.1f} GB of host memory."
        larger = smallest_gpu_for(plan)
        takes = "more than any GPU known here has" if larger is None else f"a GPU like {larger.name}"
        return f"No setting here makes it fit{tried}: it takes {takes}."


def length_fields(config: TrainConfig, length: int) -> dict[str, int]:
    """Fields of `TrainConfig` that make sequences at most `length` tokens; source and target keep their proportion."""
    if config.packing:
        return {"sequence_length": length}
    target = max(1, length * config.target_max_len // (config.source_max_len + config.target_max_len))
    return {"source_max_len": length - target, "target_max_len": target}


def smallest_gpu_for(plan: Plan) -> Chip | None:
    """Return the smallest GPU known that has this plan's bytes; it was not compiled for."""
    needed = plan.device_bytes - plan.allowance.total
    holding = [chip for chip in CHIPS.values() if needed + Allowance.of(chip).total <= chip.memory_bytes]
    return min(holding, key=lambda chip: chip.memory_bytes, default=None)


class Planner:
    """Plans for one model on one GPU; each setting is compiled once.

    Args:
        chip: the GPU.
        model_config: the model's shapes and constants.
        compile_step: compiles a step, see `Compiler`.
        host_limit: bytes of pinned host memory that may be used; None for no limit.
    """

    def __init__(
        self,
        chip: Chip,
        model_config: DecoderConfig,
        compile_step: Callable[[TrainConfig, DecoderConfig, int], CompiledStep],
        host_limit: int | None = None,
    ):
        self.chip, self.model_config, self.compile_step, self.host_limit = chip, model_config, compile_step, host_limit
        self._known: dict[tuple[TrainConfig, int], StepPlan] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, chip: Chip, model_config: DecoderConfig, *, host_limit: int | None = None) -> Iterator["Planner"]:
        """Make a planner with a compiler of its own, a child process that ends with the context."""
        with Compiler(chip) as compiler:
            yield cls(chip, model_config, compiler, host_limit)

    def plan(self, config: TrainConfig, length: int) -> StepPlan:
        """Plan a run whose micro-batches are `per_device_train_batch_size` sequences of `length` tokens.

        Raises:
            UserError: a configuration that no run could use; CompilationFailed if the step does not compile.
        """
        key = (config, length)
        if key not in self._known:
            compiled = self.compile_step(config, self.model_config, length)
            plan = Plan(self.chip, compiled.phases, compiled.host, self.host_limit)
            positions = self.model_config.max_position_embeddings
            self._known[key] = StepPlan(config, length, plan, compiled, positions)
        return self._known[key]

    def longest(self, config: TrainConfig, start: int, maximum: int | None = None) -> Longest:
        """Find the longest sequence that fits, see `longest_sequence`; one that does not compile does not fit."""

        def excess(length: int) -> float:
            try:
                return float(self.plan(config, length).plan.excess)
            except CompilationFailed:
                return math.inf

        return longest_sequence(excess, start=start, maximum=maximum)

    def advice(self, config: TrainConfig, length: int) -> Advice:
        """Find settings that make a plan fit: each is compiled in turn, and kept if it helps, until the plan fits.

        First come those that a run which is resumed may change, then others, at last shorter sequences. The first
        change no result but by rounding, and by other dropout masks where they leave `remat` "none", see `StepConfig`.
        """
        best, changes = self.plan(config, length), dict[str, Any]()
        fusible = setup.stores_4_bits(config, self.model_config)
        for remedy in remedies(config, host_lacks=best.plan.host_excess > 0, fusible=fusible):
            try:
                tried = self.plan(dataclasses.replace(best.config, **remedy), length)
            except CompilationFailed:
                continue
            if tried.plan.excess < best.plan.excess:
                best = tried
                changes |= {name: value for name, value in remedy.items() if getattr(config, name) != value}
            if best.plan.fits:
                return Advice(changes, None, best)
        found = self.longest(best.config, length // 2, maximum=length).length
        if not found:
            return Advice(changes, None, best)
        return Advice(changes, found, self.plan(best.config, found))


def remedies(config: TrainConfig, *, host_lacks: bool = False, fusible: bool = True) -> Iterator[dict[str, Any]]:
    """Settings that take less device memory, or less host memory if that lacks; the least costly first.

    Args:
        config: of the run.
        host_lacks: host memory is what lacks.
        fusible: the linear weights are such that kernels can dequantize them while they multiply.
    """
    if host_lacks and config.remat_policy == "offload":
        yield {"gradient_checkpointing": True, "remat": "full"}
    if config.optim_placement != "host" and not host_lacks:
        yield {"optim_placement": "host"}
    if config.remat_policy in ("none", "save_attention"):
        yield {"gradient_checkpointing": True, "remat": "full"}
    if fusible and config.kernel != "fused":
        yield {"kernel": "fused"}
    if config.remat_policy != "offload" and not host_lacks:
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
    """Put all that is known of a plan in words."""
    lines = [describe(planned.plan), describe_bound(planned.bound, dataset_seconds)]
    if planned.tile is not None:
        lines.insert(1, f"All but attention takes {planned.tile:,} tokens at a time.")
    return "\n".join([*lines, *(f"Note: {warning}" for warning in planned.warnings)])


def describe_longest(longest: Longest, at_longest: StepPlan | None) -> str:
    """Put the result of a search in words."""
    if at_longest is None:
        return f"Not even {longest.next_length} tokens a sequence fit."
    beyond = "" if longest.next_length is None else f"; {longest.next_length:,} do not"
    host = f"with {at_longest.plan.host_bytes / 1e9:.1f} GB of host memory"
    seconds = f"at least {format_seconds(at_longest.bound.seconds)} a step"
    compiled = f"({len(longest.evaluations)} compiled)"
    return f"Longest sequence that fits: {longest.length:,} tokens, {host}, {seconds}{beyond} {compiled}."


def format_seconds(seconds: float) -> str:
    """Write a time in the unit that suits it: "19.6 s", "12 min", "3.1 h"."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
