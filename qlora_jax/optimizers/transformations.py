"""Optimizers by name, as optax transformations of one matrix."""

from typing import NamedTuple

import optax

from qlora_jax.errors import UserError
from qlora_jax.optimizers.blockwise8bit import scale_by_adam_8bit, scale_by_lion_8bit


class Optimizer(NamedTuple):
    """An optimizer's update rule, and its default placement: `paged` moves state to the host where memory is short."""

    transformation: str
    paged: bool


OPTIMIZERS = {
    "adamw_32bit": Optimizer("adamw_32bit", paged=False),
    "adamw_8bit": Optimizer("adamw_8bit", paged=False),
    "lion_8bit": Optimizer("lion_8bit", paged=False),
    "adafactor": Optimizer("adafactor", paged=False),
    "sgd": Optimizer("sgd", paged=False),
    "paged_adamw_32bit": Optimizer("adamw_32bit", paged=True),
    "paged_adamw_8bit": Optimizer("adamw_8bit", paged=True),
    "paged_lion_8bit": Optimizer("lion_8bit", paged=True),
}


def find_optimizer(name: str) -> Optimizer:
    """Look up an optimizer by name (the values of the field `optim`); UserError lists the names."""
    if name not in OPTIMIZERS:
        raise UserError(f"`optim={name}`: choose one of {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]


def transformation(
    name: str, learning_rate: optax.ScalarOrSchedule, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """Return the update rule called `name` (see `Optimizer.transformation`), for one matrix at a time.

    Rules and arguments are those of transformers' Trainer under the same name (torch's AdamW for adamw_32bit), with
    decoupled weight decay (Loshchilov & Hutter 2019; for sgd that is the same as the coupled one). Lion takes b1 and
    b2, and no eps. Adafactor (Shazeer & Stern 2018) factors every matrix, clips its update to root mean square 1 and
    takes the learning rate as given; it has no first moment, and an eps of its own. A schedule is evaluated at the
    number of updates made before.
    """
    if name == "adamw_32bit":
        return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    rules = {
        "adamw_8bit": lambda: scale_by_adam_8bit(b1, b2, eps),
        "lion_8bit": lambda: scale_by_lion_8bit(b1, b2),
        # optax.adafactor would not multiply the weight decay by the learning rate.
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0)
        ),
        "sgd": optax.identity,
    }
    return optax.chain(
        rules[name](), optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate)
    )
