"""What to tell a run whose step ran out of device memory: its plan, and flags that would need less."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from qlora_jax import gpus
from qlora_jax.device_memory import device_limit
from qlora_jax.errors import UserError
from qlora_jax.formatting import format_bytes
from qlora_jax.planner.compiler import Compiler
from qlora_jax.planner.planning import Planner, describe_run
from qlora_jax.training.config import TrainConfig


def memory_advice(config: TrainConfig, shape: tuple[int, ...]) -> list[str]:
    """What makes a step on a batch [A, B, S] need less device memory, one flag a line; only what is not yet done."""
    _, rows, length = shape
    advice = []
    if config.remat_policy == "none":
        advice.append("--remat full recomputes a layer's activations instead of keeping them")
    if config.remat_policy != "offload":
        advice.append("--remat offload keeps no more of a layer than its input, and that in host memory")
    if rows > jax.device_count():
        advice.append(
            "a lower --per_device_train_batch_size, with --gradient_accumulation_steps raised as much, trains the same"
        )
    if config.optim_placement == "device" or not (config.optim_placement or config.optim.startswith("paged_")):
        advice.append("--optim_placement host keeps the optimizer's state in host memory")
    source = "--sequence_length" if config.packing else "--source_max_len and --target_max_len"
    return [*advice, f"lower {source} shorten the rows, here of {length} tokens"]


def planned_advice(config: TrainConfig, shape: tuple[int, ...], *, model_config: Mapping[str, Any]) -> list[str]:
    """The plan of a step on a batch [A, B, S] and what would make it fit, one line each.

    Where no plan can be made (a GPU without a data sheet here, no compiler beside the one that runs), `memory_advice`.
    """
    device = jax.local_devices()[0]
    chip = gpus.chip_of(device)
    if chip is None:
        return memory_advice(config, shape)
    accumulated, rows, length = shape
    config = dataclasses.replace(
        config,
        gradient_accumulation_steps=accumulated,
        per_device_train_batch_size=rows // jax.device_count(),
    )
    try:
        with Compiler(chip) as compiler:
            planner = Planner(chip, model_config, compiler)
            planned = planner.plan(config, length)
            advice = None if planned.plan.fits else planner.advice(config, length)
    except UserError:
        return memory_advice(config, shape)
    lines = describe_run(planned).splitlines()
    if advice is not None:
        return [*lines, advice.sentence({"seq": length_flags(config)})]
    limit = device_limit(device) or chip.memory_bytes
    return [
        *lines,
        f"The plan fits, so it is other programs, or JAX's share of the GPU: it had {format_bytes(limit)} of "
        f"{format_bytes(chip.memory_bytes)}, and XLA_PYTHON_CLIENT_MEM_FRACTION sets that.",
    ]


def length_flags(config: TrainConfig) -> str:
    """What a run calls the tokens of a sequence."""
    return "sequence_length" if config.packing else "source_max_len plus --target_max_len"
