"""Normalisations, computed in float32 whatever the activations' dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.nn.variables import frozen_array


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + weight) (Zhang & Sennrich 2019).

    Args:
        features: width of the last axis.
        eps: added to the mean square.
        offset: added to the weight: 0 for LLaMA, 1 for Gemma, which stores its weights around zero.
        stack: leading axes of the weight, removed before the call.
    """

    def __init__(self, features: int, *, eps: float, offset: float = 0.0, stack: tuple[int, ...] = ()):
        self.eps, self.offset = eps, offset
        self.weight = frozen_array((*stack, features), jnp.float32, "norm", (*("layers",) * len(stack), None))

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis; the result has x's dtype."""
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        weight = self.weight.get_value()
        return (h * (weight + self.offset if self.offset else weight)).astype(x.dtype)
