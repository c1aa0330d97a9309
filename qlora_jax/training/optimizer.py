"""Learning-rate schedules and the optimizer of a run."""

import math

import optax

from qlora_jax.training.config import TrainConfig


def learning_rate_schedule(config: TrainConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: a rise from 0 over the warm-up, then constant, linear to 0 or cosine to 0.

    Steps and rates are those of transformers' schedulers of the same names, but that `constant` warms up too (the paper
    trains with a constant schedule and warm-up; transformers calls that constant_with_warmup).
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


def make_optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW (Loshchilov & Hutter 2019), as the reference program trains."""
    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    if config.max_grad_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
