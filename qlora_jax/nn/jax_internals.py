"""Knowledge of JAX beyond its documented interface; tried with jax 0.12.0.

`custom_vjp.defvjp_with_accums` hands a backward pass an accumulator for each input. JAX names no way to ask one
whether a gradient is wanted, or where the caller wants it added; tests/nn/test_jax_internals.py checks these.
"""

from typing import Any


def is_asked(accumulator: Any) -> bool:
    """True if the gradient of this input is wanted."""
    return hasattr(accumulator, "ref") or hasattr(accumulator, "val")


def given_ref(accumulator: Any) -> Any:
    """Reference to which the caller wants a gradient added (`vjp.with_refs`); None if it gave none."""
    return getattr(accumulator, "ref", None)
