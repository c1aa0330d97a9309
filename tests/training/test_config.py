"""Values that no run could use are refused before anything is read."""

import math

import pytest

from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_grad_norm", math.nan, "must be finite"),
        ("weight_decay", math.nan, "must be finite"),
        ("lora_alpha", math.inf, "must be finite"),
        ("num_train_epochs", math.inf, "must be finite"),
        ("learning_rate", math.nan, "must be positive"),
        ("seed", -1, "must not be negative"),
        ("warmup_steps", -5, "must not be negative"),
        ("seed", 2**31, "must be below 2147483648"),
        ("max_steps", 10**30, "must be below 2147483648"),
    ],
)
def test_numbers_are_finite_and_can_be_counted(field, value, message):
    with pytest.raises(UserError, match=f"^`{field}={value}`: {message}"):
        TrainConfig(**{field: value})


def test_all_that_is_refused_is_told():
    with pytest.raises(UserError) as error:
        TrainConfig(block_size=33, lora_r=0, sequence_length=64)
    assert str(error.value).splitlines() == [
        "3 settings are wrong:",
        "  `block_size=33`: choose a power of two from 32 to 4096.",
        "  `lora_r=0`: must be at least 1.",
        "  `sequence_length=64` has no effect without `packing`; give that too, or leave it out.",
    ]
