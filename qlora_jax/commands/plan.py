"""`qlora-jax plan`: what fine-tuning would take of a GPU that need not be here."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

from qlora_jax.cli import argument, command, flag, parse_flags, spellings
from qlora_jax.errors import UserError
from qlora_jax.training.config import STEP_FLAGS, TrainConfig

DESCRIPTION = """Say what fine-tuning would take of a GPU that need not be here: bytes by class, the longest sequence,
its time."""


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """Flags of `plan` that are not flags of a run."""

    model: str = argument("config.json, model directory, hub id, or a preset such as llama-3.1-8b.")
    gpu: str | None = flag(None, "The GPU to plan for, e.g. rtx4090, a6000, h100.", group="plan")
    all_gpus: bool = flag(False, "A table of all GPUs known instead.", group="plan")
    seq: int | None = flag(None, "Tokens of a sequence; by default what finetune keeps of a row at most.", group="plan")
    batch: int = flag(1, "Sequences in a forward pass (finetune's per_device_train_batch_size).", group="plan")
    max_seq: bool = flag(False, "Find the longest sequence that fits, by compiling for a few.", group="plan")
    host_memory_gb: float | None = flag(None, "Host memory that may be used, in units of 1e9 bytes.", group="plan")
    dataset_tokens: int | None = flag(None, "Tokens of the data, for the least time an epoch takes.", group="plan")
    dataset_rows: int | None = flag(None, "Rows of the data, the same with --seq tokens each.", group="plan")
    json: bool = flag(False, "Print JSON.", group="plan")


def schema() -> type[Any]:
    """`PlanFlags`, and those of a run's flags that shape its step."""
    hints = get_type_hints(TrainConfig)
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    shared = [(n, hints[n], flag(fields[n].default, **fields[n].metadata)) for n in STEP_FLAGS]
    return dataclasses.make_dataclass("Flags", shared, bases=(PlanFlags,), frozen=True)


def main(argv: Sequence[str], *, prog: str = "qlora-jax plan") -> int:
    """Plan and print."""
    flags: Any
    flags, _ = parse_flags(schema(), argv, prog=prog, description=DESCRIPTION)
    with command({**spellings(TrainConfig), **spellings(type(flags)), "per_device_train_batch_size": "--batch"}):
        return plan_step(flags)


def plan_step(flags: Any) -> int:
    """Plan for one GPU or for all, and print."""
    from qlora_jax.checkpoints.hub import resolve_config
    from qlora_jax.gpus import CHIPS, chip_named
    from qlora_jax.planner import comparison, planning
    from qlora_jax.planner.compiler import Compiler

    for name in ("seq", "batch", "dataset_tokens", "dataset_rows", "host_memory_gb"):
        if (value := getattr(flags, name)) is not None and value <= 0:
            raise UserError(f"--{name} {value}: must be positive.")
    if flags.dataset_tokens is not None and flags.dataset_rows is not None:
        raise UserError("--dataset_tokens and --dataset_rows say the same thing: give one of them.")
    if (flags.gpu is None) != flags.all_gpus:
        raise UserError(f"Give --gpu NAME, one of {', '.join(CHIPS)}, or --all_gpus.")
    shared = {name: getattr(flags, name) for name in STEP_FLAGS}
    config = TrainConfig(**shared, per_device_train_batch_size=flags.batch)
    length = flags.seq or config.source_max_len + config.target_max_len
    model_config = resolve_config(flags.model)
    host_limit = None if flags.host_memory_gb is None else int(flags.host_memory_gb * 1e9)

    def plan(name: str) -> tuple[Any, Any, Any, Any]:
        with Compiler(chip_named(name)) as compiler:
            planner = planning.Planner(compiler.chip, model_config, compiler, host_limit)
            planned = planner.plan(config, length)
            longest = planner.longest(config, length) if flags.max_seq else None
            at_longest = planner.plan(config, longest.length) if longest is not None and longest.length else None
            advice = None if planned.plan.fits or flags.all_gpus else planner.advice(config, length)
            return planned, longest, at_longest, advice

    def seconds(planned: Any) -> float | None:
        if flags.dataset_tokens is not None:
            return flags.dataset_tokens / planned.bound.tokens_per_second
        if flags.dataset_rows is not None:
            rows_a_step = flags.batch * config.gradient_accumulation_steps
            return math.ceil(flags.dataset_rows / rows_a_step) * planned.bound.seconds
        return None

    def as_json(found: tuple[Any, Any, Any, Any]) -> dict[str, Any]:
        return {"model": flags.model, **planning.as_json(*found), "seconds_for_the_dataset_at_least": seconds(found[0])}

    if not flags.all_gpus:
        found = planned, longest, at_longest, advice = plan(flags.gpu)
        if flags.json:
            print(json.dumps(as_json(found), indent=2))
            return 0
        chip = planned.plan.chip
        print(f"{flags.model} on {chip.title}: {flags.batch} x {length:,} tokens in a forward pass")
        print(planning.describe_run(planned, seconds(planned)))
        if longest is not None:
            print(planning.describe_longest(longest, at_longest))
            for warning in at_longest.warnings if at_longest is not None else ():
                print(f"Note: {warning}")
        if advice is not None:
            print(advice.sentence({"per_device_train_batch_size": "batch"}))
        return 0

    def attempt(name: str) -> tuple[Any, Any, Any, Any] | str:
        try:
            return plan(name)
        except UserError as error:
            return str(error)

    # Two compilers at a time: each takes a gigabyte or two.
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(CHIPS, pool.map(attempt, CHIPS), strict=True))
    if all(isinstance(found, str) for found in results.values()):
        raise UserError(next(iter(results.values())))
    if flags.json:
        values = {name: {"error": f} if isinstance(f, str) else as_json(f) for name, f in results.items()}
        print(json.dumps(values, indent=2))
        return 0
    print(f"{flags.model}: {flags.batch} x {length:,} tokens in a forward pass")
    rows = {
        name: found if isinstance(found, str) else (found[0].plan, found[0].bound, found[1] and found[1].length)
        for name, found in results.items()
    }
    print(comparison(rows, with_longest=flags.max_seq))
    for warning in sorted({w for found in results.values() if not isinstance(found, str) for w in found[0].warnings}):
        print(f"Note: {warning}", file=sys.stderr)
    return 0
