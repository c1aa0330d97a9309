"""Bounds on generation: bytes of a running batch, and the least time of its steps. Nothing is compiled or measured.

A step of the engine (`qlora_jax.generation.programs.advance`) adds a token to each of B rows, after which each has C.
Bytes are those of the arrays that the engine would hold, abstract. Of them a step moves at least

    base (B rows of an embedding that is not the head too) + one adapter + the cache of C tokens a row,

every byte once: a row's keys and values are read up to the new token's, which are written; a window has no others than
it sees. FLOPs are those of the matrix products in the traced step of a single row, times B. `planner.bounds` divides
both by data-sheet peaks.

Nothing is taken to stay in the level-two cache from one step to the next: a model that fits there may be faster.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.choices import CacheDtype
from qlora_jax.formatting import format_bytes, table
from qlora_jax.generation import Sampling, empty_stack
from qlora_jax.generation.programs import State, Structure, advance, empty_state
from qlora_jax.generation.sampling import Features, rows_of
from qlora_jax.gpus import Chip
from qlora_jax.models import DecoderConfig
from qlora_jax.planner import Allowance, BaseBytes, Bound, MatmulFlops, StepCost, bound, count_products, tree_bytes
from qlora_jax.planner.accounting import ALLOWANCE
from qlora_jax.planner.planning import beyond_positions
from qlora_jax.planner.report import class_title
from qlora_jax.training import setup
from qlora_jax.training.config import TrainConfig

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a batch, where nothing else is asked for."""
CONTEXTS = (2048, 8192, 32768, 131072)
"""Tokens of a row, where nothing else is asked for."""
COMPARED_CONTEXT = 8192
"""Tokens of a row in a comparison of GPUs, where nothing else is asked for."""
ADAPTERS = 2
"""Adapters in memory: the one of a run, and zeros for the base alone, which every model that is served has."""

_CACHE, _LOGITS, _HISTORY = "cache", "logits", "history"


@dataclasses.dataclass(frozen=True)
class Request:
    """Batches to be bounded.

    Attributes:
        model: what the model is called, for people.
        model_config: its shapes and constants.
        config: of the run whose adapter answers, for how its base is stored, its compute dtype and its adapter's shape.
        batches: numbers of rows.
        contexts: numbers of tokens of a row.
        cache_dtype: that keys and values are kept in.
    """

    model: str
    model_config: DecoderConfig
    config: TrainConfig
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    cache_dtype: CacheDtype = "auto"

    @property
    def positions(self) -> int:
        """The model's own longest context, by its config.json."""
        return self.model_config.max_position_embeddings

    @property
    def warnings(self) -> list[str]:
        """Sentences that limit the validity of a bound."""
        return beyond_positions(max(self.contexts), self.positions)


@dataclasses.dataclass(frozen=True)
class DecodeStep:
    """A step that adds a token to every row of a batch.

    Attributes:
        batch: rows, B.
        context: tokens of each row with the new one, C; there is room for no more.
        by_class: class -> bytes of the arrays that are there before and after it.
        cache_dtypes: dtypes of keys and values.
        work: its least work.
    """

    batch: int
    context: int
    by_class: Mapping[str, int]
    cache_dtypes: tuple[str, ...]
    work: StepCost


@dataclasses.dataclass(frozen=True)
class DecodeBound:
    """Bounds on a step on a GPU.

    Attributes:
        chip: the GPU.
        step: the step.
    """

    chip: Chip
    step: DecodeStep

    @property
    def by_class(self) -> dict[str, int]:
        """Class -> device bytes, the allowance included and the programs' temporaries not."""
        return {**self.step.by_class, ALLOWANCE: Allowance.of(self.chip).total}

    @property
    def device_bytes(self) -> int:
        """Least device bytes of all classes."""
        return sum(self.by_class.values())

    @property
    def fits(self) -> bool:
        """False if the device cannot hold the batch; True if it can hold all but temporaries."""
        return self.device_bytes <= self.chip.memory_bytes

    @property
    def bound(self) -> Bound:
        """Lower bound on the time of the step, which is that of a token of every row."""
        return bound(self.chip, self.step.work)


def contexts_within(positions: int) -> tuple[int, ...]:
    """List the usual contexts that a model with so many positions has; at least one."""
    return tuple(context for context in CONTEXTS if context <= positions) or (positions,)


def decode_steps(request: Request) -> tuple[DecodeStep, ...]:
    """Count the bytes and the least work of a step of every batch and context asked for; contexts of a batch in turn.

    Raises:
        UserError: a configuration or a model that no run could use.
    """
    # The kernels' products would not be seen.
    config = dataclasses.replace(request.config, kernel="xla")
    model = setup.declare(config, request.model_config, "gpu").parts
    dtype = setup.compute_dtype(config, "gpu")
    adapters = jax.eval_shape(lambda: empty_stack(model.lora, ADAPTERS, dtype))
    structure = Structure(model.graphdef)
    base, adapter_bytes = BaseBytes.of(model.frozen), tree_bytes(adapters)

    def state_of(batch: int, context: int) -> State:
        arguments = structure, adapters, model.frozen, batch, context
        return jax.eval_shape(lambda: empty_state(*arguments, cache_dtype=request.cache_dtype))

    def products_of_a_row(context: int) -> MatmulFlops:
        busy, adapter = jax.ShapeDtypeStruct((1,), jnp.bool_), jax.ShapeDtypeStruct((1,), jnp.int32)
        traced = advance.trace(
            adapters,
            model.frozen,
            state_of(1, context),
            busy,
            (rows_of([Sampling()]), adapter),
            structure=structure,
            features=Features(),
            eos_ids=request.model_config.eos_token_ids,
            likeliest=0,
        )
        return count_products(traced.jaxpr, trips=0.0)  # it has no `while` loop

    products = {context: products_of_a_row(context) for context in request.contexts}

    def step(batch: int, context: int) -> DecodeStep:
        state = state_of(batch, context)
        cache = tree_bytes(state.cache)
        rows = batch * base.looked_up // request.model_config.vocab_size
        flops = batch * (products[context].plain + products[context].batched)
        return DecodeStep(
            batch,
            context,
            by_class={
                **base.by_class,
                "adapters": adapter_bytes,
                _CACHE: cache,
                _LOGITS: tree_bytes(state.logits),
                _HISTORY: tree_bytes((state.history, state.generated)),
            },
            cache_dtypes=_dtypes((state.cache.keys, state.cache.values)),
            work=StepCost(batch, flops, base.decoded + rows + adapter_bytes // ADAPTERS + cache, host_bytes=0),
        )

    return tuple(step(batch, context) for batch in request.batches for context in request.contexts)


def _dtypes(tree: Any) -> tuple[str, ...]:
    return tuple(sorted({leaf.dtype.name for leaf in jax.tree.leaves(tree)}))


def largest_that_fits(bounds: Sequence[DecodeBound]) -> DecodeBound | None:
    """Return the one with most rows among those that fit; None if none does."""
    return max((each for each in bounds if each.fits), key=lambda each: each.step.batch, default=None)


NOT_MEASURED = (
    "Bounds from data-sheet peaks, not measurements or predictions: a step moves the base, one adapter and all keys\n"
    "and values once at full bandwidth, or multiplies at the peak rate, whichever takes longer. Memory that programs\n"
    "need beside their arrays is not counted."
)


def describe(request: Request, chip: Chip, steps: Sequence[DecodeStep]) -> str:
    """Write what every batch takes of one GPU, then tables of batch by context: bytes, least time, most tokens/s."""
    bounds = {(step.batch, step.context): DecodeBound(chip, step) for step in steps}
    classes = DecodeBound(chip, steps[0]).by_class
    fixed = {name: count for name, count in classes.items() if name not in (_CACHE, _LOGITS, _HISTORY)}

    def grid(title: str, cell: Callable[[DecodeBound], str]) -> str:
        header = ["batch", *(f"{context:,}" for context in request.contexts)]
        rows = [[f"{b:,}", *(cell(bounds[b, c]) for c in request.contexts)] for b in request.batches]
        return f"{title}\n{table([header, *rows])}"

    return "\n".join(
        [
            f"{request.model} on {chip.title}: {_generation(request, steps[0])}",
            table([("whatever the batch", ""), *((class_title(n), format_bytes(c)) for n, c in fixed.items())]),
            grid(f"Least device memory, of {format_bytes(chip.memory_bytes)}, by batch and tokens of a row:", _memory),
            grid("Least ms a token (a step), by memory unless it says compute:", _milliseconds),
            grid("Most tokens/s of all rows, and in brackets of each:", _rates),
            NOT_MEASURED,
        ]
    )


def describe_comparison(request: Request, chips: Sequence[Chip], steps: Sequence[DecodeStep]) -> str:
    """Write a line for each GPU, of the smallest batch and of the largest that fits, at one context."""
    several = len(request.batches) > 1
    header = ["GPU", "memory", f"batch {request.batches[0]:,} >=", "ms/token >=", "tok/s <="]
    lines = [header + (["largest batch", "ms/token >=", "tok/s of all <="] if several else [])]
    for chip in chips:
        bounds = [DecodeBound(chip, step) for step in steps]
        lines.append([chip.name, format_bytes(chip.memory_bytes), _memory(bounds[0]), *_times(bounds[0])])
        if several:
            largest = largest_that_fits(bounds)
            lines[-1] += ["-" if largest is None else f"{largest.step.batch:,}", *_times(largest)]
    title = f"{request.model}: {request.contexts[0]:,} tokens a row, {_generation(request, steps[0])}"
    tried = [f"The largest batch of at most {request.batches[-1]} rows, in powers of two."] if several else []
    return "\n".join([title, table(lines), *tried, NOT_MEASURED])


def _generation(request: Request, step: DecodeStep) -> str:
    dtypes = " and ".join(step.cache_dtypes)
    return f"generation with a cache in {dtypes}; the model has {request.positions:,} positions"


_UNFIT = "does not fit"


def _memory(one: DecodeBound) -> str:
    needed = format_bytes(one.device_bytes)
    return needed if one.fits else f"{_UNFIT}: {needed}"


def _milliseconds(one: DecodeBound) -> str:
    if not one.fits:
        return _UNFIT
    by = " (compute)" if one.bound.limited_by == "compute" else ""
    return f"{_figure(1e3 * one.bound.seconds)}{by}"


def _rates(one: DecodeBound) -> str:
    if not one.fits:
        return _UNFIT
    total = one.bound.tokens_per_second
    return f"{_figure(total)} ({_figure(total / one.step.batch)})"


def _times(one: DecodeBound | None) -> list[str]:
    if one is None or not one.fits:
        return ["-", "-"]
    return [_milliseconds(one), _figure(one.bound.tokens_per_second)]


def _figure(value: float) -> str:
    """Write three digits, or all of a number that has more before its point."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:,.0f}"


def as_json(request: Request, chip: Chip, steps: Sequence[DecodeStep]) -> dict[str, Any]:
    """All bounds on one GPU, for programs: memory and times are lower bounds, tokens/s upper ones."""
    return {
        "model": request.model,
        "gpu": chip.name,
        "max_position_embeddings": request.positions,
        "device_limit_bytes": chip.memory_bytes,
        "cache_dtypes": list(steps[0].cache_dtypes),
        "steps": [_step_as_json(DecodeBound(chip, step)) for step in steps],
        "warnings": request.warnings,
    }


def _step_as_json(one: DecodeBound) -> dict[str, Any]:
    step, limit = one.step, one.bound
    return {
        "batch": step.batch,
        "seq": step.context,
        "device_bytes_at_least": one.device_bytes,
        "fits": one.fits,
        "by_class": one.by_class,
        "bytes_moved_at_least": step.work.device_bytes,
        "flops_at_least": step.work.flops,
        "seconds_a_token_at_least": limit.seconds,
        "tokens_per_second_a_row_at_most": limit.tokens_per_second / step.batch,
        "tokens_per_second_at_most": limit.tokens_per_second,
        "limited_by": limit.limited_by,
    }
