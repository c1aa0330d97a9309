"""Summary of a run: the contents of summary.json."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qlora_jax import data, models
from qlora_jax.checkpoints.streaming import inventory
from qlora_jax.defaults import DEFAULT_DATASET
from qlora_jax.device_memory import device_peak
from qlora_jax.optimizers import PagedOptimizer
from qlora_jax.quantization import QuantizedTensor
from qlora_jax.training.answers import Answer
from qlora_jax.training.model import Model
from qlora_jax.training.reporting import METRICS_FILE, read_metrics
from qlora_jax.training.step import TrainState
from qlora_jax.training.trainer import Trainer


def summarize(trainer: Trainer, answers: Sequence[Answer] = ()) -> dict[str, Any]:
    """Return the contents of summary.json; bytes and parameters are counted from the buffers."""
    config, directory, counters = trainer.config, trainer.directory, trainer.counters
    metrics = read_metrics(directory.path / METRICS_FILE)
    losses = [line["loss"] for line in metrics if "loss" in line]
    held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    step = trainer.programs.train
    return {
        "model": config.model_name_or_path,
        "base": trainer.model.base.description,
        "adapter": str(directory.path / "adapter") if config.do_train else config.adapter,
        "steps": int(trainer.state.step),
        "epochs": trainer.datasets.train.epoch,
        "tokens": counters.tokens,
        "trained_tokens": counters.trained_tokens,
        "seconds": counters.seconds,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "first_eval_loss": held_out[0] if held_out else None,
        "last_eval_loss": held_out[-1] if held_out else None,
        "step_shapes_compiled": len(step.programs),
        "planned_peak_bytes": step.planned_bytes or None,
        # Of the whole process: loading, evaluation and answers count too.
        "measured_peak_bytes": device_peak(jax.local_devices()[0]),
        **memory_summary(trainer.model, trainer.state, step.optimizer),
        **(_style(answers) if config.dataset == DEFAULT_DATASET and answers else {}),
    }


def _style(answers: Sequence[Answer]) -> dict[str, int]:
    return {
        "answers_in_style_before": sum(data.follows_style(answer.before) for answer in answers),
        "answers_in_style_after": sum(data.follows_style(answer.after) for answer in answers),
    }


def memory_summary(model: Model, state: TrainState, optimizer: PagedOptimizer) -> Mapping[str, Any]:
    """Count parameters, bits a parameter and bytes by class from the buffers that training holds.

    The classes: those of `inventory`; adapters as the model reads them; the optimizer's state, float32 masters included
    where the adapters are 16-bit, on device and host.
    """
    base = models.flatten(model.parts.frozen)
    quantized = sum(
        math.prod((*value.stack_shape, *value.shape)) for value in base.values() if isinstance(value, QuantizedTensor)
    )
    other = sum(value.size for value in base.values() if not isinstance(value, QuantizedTensor))
    trainable = sum(leaf.size for leaf in jax.tree.leaves(state.lora))
    sizes, on_host = inventory(base), optimizer.host_bytes(state.opt_state)
    bits = 8 * (sizes["base_packed"] + sizes["scales"]) / quantized if quantized else None
    return {
        "trainable_parameters": trainable,
        "total_parameters": quantized + other + trainable,
        "bits_per_quantized_parameter": bits,
        "bytes": {
            **sizes,
            "adapters": sum(leaf.nbytes for leaf in jax.tree.leaves(state.lora)),
            "optimizer_on_device": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) - on_host,
            "optimizer_on_host": on_host,
        },
    }
