"""Advice for a run whose step ran out of device memory: its plan, and settings that would need less."""

import dataclasses
from collections.abc import Iterable

import jax

from qlora_jax import gpus
from qlora_jax.device_memory import device_limit, pinned_limit
from qlora_jax.errors import UserError
from qlora_jax.formatting import format_bytes
from qlora_jax.models import DecoderConfig
from qlora_jax.planner.planning import Planner, describe_run
from qlora_jax.training.config import FREE_FLAGS, TrainConfig

_ELSEWHERE = "a run that has checkpoints needs another `output_dir` for that"


def memory_advice(config: TrainConfig, shape: tuple[int, ...]) -> list[str]:
    """List settings that make a step on a batch [A, B, S] need less device memory, one a line, without those in use."""
    _, rows, length = shape
    advice = []
    if config.remat_policy == "none":
        advice.append("`remat=full` recomputes a layer's activations instead of keeping them")
    if config.remat_policy != "offload":
        advice.append("`remat=offload` keeps no more of a layer than its input, and that in host memory")
    if config.optim_placement == "device" or not (config.optim_placement or config.optim.startswith("paged_")):
        advice.append("`optim_placement=host` keeps the optimizer's state in host memory")
    # Those above may be changed in a run that is resumed.
    if rows > jax.device_count():
        advice.append(
            "a lower `per_device_train_batch_size`, with `gradient_accumulation_steps` raised as much, trains the "
            f"same; {_ELSEWHERE}"
        )
    source = "`sequence_length`" if config.packing else "`source_max_len` and `target_max_len`"
    return [*advice, f"lower {source} shorten the rows, here of {length} tokens; {_ELSEWHERE}"]


def fixed_fields(fields: Iterable[str]) -> list[str]:
    """List those that a run which is resumed may not change."""
    return [name for name in fields if name not in FREE_FLAGS]


def planned_advice(config: TrainConfig, shape: tuple[int, ...], *, model_config: DecoderConfig) -> list[str]:
    """Plan a step on a batch [A, B, S] for the GPU that is here, and find settings that fit; one line each.

    Where no plan can be made (a GPU without a data sheet here, no compiler beside the one that runs) the lines are the
    reason and `memory_advice`.
    """
    device = jax.local_devices()[0]
    chip = gpus.chip_of(device)
    if chip is None:
        reason = f"No plan of this step: {device.device_kind} is none of the GPUs known by their data sheets."
        return [reason, *memory_advice(config, shape)]
    accumulated, rows, length = shape
    config = dataclasses.replace(
        config,
        gradient_accumulation_steps=accumulated,
        per_device_train_batch_size=rows // jax.device_count(),
    )
    try:
        with Planner.open(chip, model_config, host_limit=pinned_limit()) as planner:
            planned = planner.plan(config, length)
            advice = None if planned.plan.fits else planner.advice(config, length)
    except UserError as error:
        return [f"No plan of this step: {error}", *memory_advice(config, shape)]
    lines = describe_run(planned).splitlines()
    if advice is not None:
        fixed = fixed_fields(advice.fields) if advice.planned.plan.fits else []
        names = " and ".join(f"`{name}`" for name in fixed)
        return [*lines, advice.sentence(), *([f"As to {names}: {_ELSEWHERE}."] if fixed else [])]
    limit = device_limit(device) or chip.memory_bytes
    return [
        *lines,
        f"The plan fits, so other programs take memory, or JAX's share of the GPU is too small: it had "
        f"{format_bytes(limit)} of {format_bytes(chip.memory_bytes)}, and XLA_PYTHON_CLIENT_MEM_FRACTION sets that.",
    ]
