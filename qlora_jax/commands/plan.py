"""`qlora-jax plan`: what fine-tuning would take of a GPU that need not be here."""

import dataclasses
import json
import sys
import types
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any, get_type_hints

from qlora_jax.choices import CacheDtype
from qlora_jax.cli import argument, command, flag, parse_flags, spellings, with_dashes
from qlora_jax.errors import UserError
from qlora_jax.training.config import STEP_FLAGS, TrainConfig
from qlora_jax.training.idle_fields import idle_notes, idle_refusals

if TYPE_CHECKING:
    from qlora_jax.planner.planning import Advice

DESCRIPTION = """Say what fine-tuning would take of a GPU that need not be here: bytes by class, the longest sequence,
its time. With --decode: what generation would take, and the most tokens a second."""


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    """Flags of `plan` that are not flags of a run."""

    model: str = argument("config.json, model directory, hub id, or a preset such as llama-3.1-8b.")
    gpu: str | None = flag(None, "The GPU to plan for, e.g. rtx4090, a6000, h100.", group="plan")
    all_gpus: bool = flag(False, "A table of all GPUs known instead.", group="plan")
    decode: bool = flag(
        False, "Bounds on generation instead, by batch and context: memory, time a token, tokens/s.", group="plan"
    )
    seq: int | None = flag(
        None,
        "Tokens of a sequence; by default what finetune keeps of a row at most, and with decode several.",
        group="plan",
    )
    batch: int = flag(
        1,
        "Sequences in a forward pass (finetune's per_device_train_batch_size); with decode several by default.",
        group="plan",
    )
    kv_cache_dtype: CacheDtype = flag("auto", "Type of keys and values, with decode; see generate.", group="plan")
    max_seq: bool = flag(False, "Find the longest sequence that fits, by compiling for a few.", group="plan")
    host_memory_gb: float | None = flag(None, "Host memory that may be used, in units of 1e9 bytes.", group="plan")
    dataset_tokens: int | None = flag(None, "Tokens of the data, for the least time an epoch takes.", group="plan")
    dataset_rows: int | None = flag(None, "Rows of the data, the same with --seq tokens each.", group="plan")
    json: bool = flag(False, "Print JSON.", group="plan")


SHAPES_GENERATION = frozenset(
    field.name for field in dataclasses.fields(PlanFlags)
) - {"max_seq", "host_memory_gb", "dataset_tokens", "dataset_rows"} | {
    "bits", "quant_type", "double_quant", "block_size", "bf16", "lora_r", "lora_modules", "adapter",
}  # fmt: skip
"""Flags that count with `decode`."""


def schema() -> type[Any]:
    """`PlanFlags`, and those of a run's flags that shape its step."""
    hints = get_type_hints(TrainConfig)
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    shared = [(n, hints[n], flag(fields[n].default, **fields[n].metadata)) for n in STEP_FLAGS]
    return dataclasses.make_dataclass("Flags", shared, bases=(PlanFlags,), frozen=True)


def main(argv: Sequence[str], *, prog: str = "qlora-jax plan") -> int:
    """Plan and print."""
    flags: Any
    flags, given = parse_flags(schema(), argv, prog=prog, description=DESCRIPTION, check=refusals)
    spelling = {**spellings(TrainConfig), **spellings(type(flags)), "per_device_train_batch_size": "--batch"}
    with command(spelling):
        config = run_config(flags)
        for note in idle_notes(config, given):
            print(f"Note: {with_dashes(note, spelling)}", file=sys.stderr)
        return plan_decoding(flags, config, given) if flags.decode else plan_step(flags, config)


def run_config(flags: Any) -> TrainConfig:
    """Return the configuration of the run that the flags are of."""
    shared = {name: getattr(flags, name) for name in STEP_FLAGS}
    return TrainConfig(**shared, model_name_or_path=flags.model, per_device_train_batch_size=flags.batch)


def plan_step(flags: Any, config: TrainConfig) -> int:
    """Plan for one GPU or for all, and print."""
    from qlora_jax.checkpoints.hub import resolve_config
    from qlora_jax.gpus import chip_named
    from qlora_jax.planner import comparison

    request = comparison.Request(
        model=flags.model,
        model_config=resolve_config(flags.model),
        config=config,
        length=flags.seq or config.source_max_len + config.target_max_len,
        find_longest=flags.max_seq,
        host_limit=None if flags.host_memory_gb is None else int(flags.host_memory_gb * 1e9),
        dataset_tokens=flags.dataset_tokens,
        dataset_rows=flags.dataset_rows,
    )
    if flags.gpu is not None:
        found = comparison.plan_on(chip_named(flags.gpu), request)
        if flags.json:
            print(json.dumps(comparison.as_json(found), indent=2))
            return 0
        print(comparison.describe_gpu(found))
        if found.advice is not None:
            print(found.advice.sentence(advised_flags(found.advice)))
        return 0
    results = comparison.compare(request)
    if flags.json:
        values = {
            n: {"error": str(f)} if isinstance(f, UserError) else comparison.as_json(f) for n, f in results.items()
        }
        print(json.dumps(values, indent=2))
        return 0
    print(comparison.describe_comparison(request, results))
    for warning in comparison.warnings_of(results):
        print(f"Note: {warning}", file=sys.stderr)
    return 0


def plan_decoding(flags: Any, config: TrainConfig, given: Set[str]) -> int:
    """Bound generation on one GPU or on all, and print."""
    from qlora_jax.checkpoints.hub import resolve_config
    from qlora_jax.gpus import CHIPS, chip_named
    from qlora_jax.planner import decoding

    chips = list(CHIPS.values()) if flags.gpu is None else [chip_named(flags.gpu)]
    model_config = resolve_config(flags.model)
    positions = model_config.max_position_embeddings
    contexts = (min(decoding.COMPARED_CONTEXT, positions),) if flags.all_gpus else decoding.contexts_within(positions)
    request = decoding.Request(
        model=flags.model,
        model_config=model_config,
        config=config,
        batches=(flags.batch,) if "batch" in given else decoding.BATCHES,
        contexts=contexts if flags.seq is None else (flags.seq,),
        cache_dtype=flags.kv_cache_dtype,
    )
    steps = decoding.decode_steps(request)
    if flags.json:
        values = {chip.name: decoding.as_json(request, chip, steps) for chip in chips}
        print(json.dumps(values if flags.all_gpus else values[chips[0].name], indent=2))
        return 0
    if flags.all_gpus:
        print(decoding.describe_comparison(request, chips, steps))
    else:
        print(decoding.describe(request, chips[0], steps))
    for warning in request.warnings:
        print(f"Note: {warning}", file=sys.stderr)
    return 0


def advised_flags(advice: "Advice") -> str:
    """Write the settings of an advice as flags of this command."""
    settings = {"batch" if name == "per_device_train_batch_size" else name: v for name, v in advice.changes.items()}
    settings |= {} if advice.length is None else {"seq": advice.length}
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def refusals(values: Any, given: Set[str]) -> list[str]:
    """List a sentence for every flag that cannot be used, or not beside the others."""
    found: list[str] = []
    try:
        run_config(values)
    except UserError as error:
        found += (text.replace("`per_device_train_batch_size=", "`batch=") for text in error.sentences)
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    found += idle_refusals(types.SimpleNamespace(**{**defaults, **vars(values)}), given)
    if values.decode:
        idle = sorted(given - SHAPES_GENERATION)
        found += (f"`{name}` has no effect with `decode`, which plans no training; leave it out." for name in idle)
    elif "kv_cache_dtype" in given:
        found.append("`kv_cache_dtype` has no effect without `decode`: training keeps no cache; leave it out.")
    for name in ("seq", "dataset_tokens", "dataset_rows", "host_memory_gb"):
        if (value := getattr(values, name)) is not None and value <= 0:
            found.append(f"`{name}={value}`: must be positive.")
    if values.dataset_tokens is not None and values.dataset_rows is not None:
        found.append("`dataset_tokens` and `dataset_rows` say the same thing: give one of them.")
    if (values.gpu is None) != values.all_gpus:
        from qlora_jax.gpus import CHIPS  # which loads JAX

        found.append(f"Give `gpu=NAME`, one of {', '.join(CHIPS)}, or `all_gpus`.")
    return found
