"""Learning-rate schedules and the optimizer of a run."""

import math
from typing import Any

import jax.numpy as jnp
import optax

from qlora_jax.optimizers import PagedOptimizer, find_optimizer, transformation
from qlora_jax.training.config import TrainConfig


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Make the learning rate of step 0, 1, ...: linear from 0 over the warm-up, then constant, linear or cosine to 0.

    Steps and rates are those of transformers' schedulers of the same names, except that `constant` warms up too (the
    paper trains with a constant schedule and warm-up; transformers calls that constant_with_warmup).
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_ratio * total_steps)
    peak, decay_steps = config.learning_rate, max(1, total_steps - warmup)
    if config.lr_scheduler_type == "constant":
        after = optax.constant_schedule(peak)
    elif config.lr_scheduler_type == "linear":
        after = optax.linear_schedule(peak, 0.0, decay_steps)
    else:
        after = optax.cosine_decay_schedule(peak, decay_steps)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(
    config: TrainConfig, total_steps: int, lora: Any, *, dtype: Any = jnp.float32, limit: int | None = None
) -> PagedOptimizer:
    """Make the optimizer of `optim`, placed as `optim_placement` says. Clipping is the gradient step's.

    Args:
        config: the run's flags.
        total_steps: optimizer steps of the run, for the schedule.
        lora: the adapters, or their shapes.
        dtype: compute dtype, and that of the working copy of the adapters.
        limit: bytes of device memory, for placement `auto`; None for no limit.
    """
    optimizer = find_optimizer(config.optim)
    rule = transformation(
        optimizer.transformation,
        learning_rate_schedule(config, total_steps),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    placement = config.optim_placement or ("auto" if optimizer.paged else "device")
    return PagedOptimizer(rule, lora, dtype=dtype, placement=placement, limit=limit)
