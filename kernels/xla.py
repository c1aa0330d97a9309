"""The XLA implementation of the products with frozen weights: the reference, and what every platform can run.

The weight is decoded to the dtype of the activations and multiplied; both are ordinary XLA operations.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qlora_jax.kernels.weights import StackedWeight, Weight
from qlora_jax.quantization import QuantizedTensor, dequantize


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """Return x @ W^T, [..., N] in x.dtype, summed in float32."""
    return multiply(x, _decode(w, x.dtype), axis=1)


def matmul_transposed(dy: jax.Array, w: Weight) -> jax.Array:
    """Return dy @ W, [..., K] in dy.dtype, summed in float32: the gradient of `matmul` with respect to x."""
    dy, w = jax.lax.platform_dependent(dy, w, cpu=_as_they_are, default=_decode_later)
    return multiply(dy, _decode(w, dy.dtype), axis=0)


def multiply(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of x with `axis` of a decoded weight [N, K], in x.dtype, summed in float32."""
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, weight, contracted, preferred_element_type=jnp.float32).astype(x.dtype)


def _decode(w: Weight, dtype: jnp.dtype) -> jax.Array:
    if isinstance(w, StackedWeight):
        w = w.take()
    return dequantize(w, dtype) if isinstance(w, QuantizedTensor) else w.astype(dtype)


def _as_they_are(dy: jax.Array, w: Weight) -> tuple[jax.Array, Weight]:
    return dy, w


def _decode_later(dy: jax.Array, w: Weight) -> tuple[jax.Array, Weight]:
    # XLA would decode once for a layer's recomputed forward pass and its backward pass, and so keep the decoded
    # weights of the whole layer. A CPU has the memory and gains the time; elsewhere decoding waits until dy is there.
    # What goes through the barrier is copied, so it is the smallest buffer that decoding needs, not the codes.
    if isinstance(w, StackedWeight):
        dy, layer = jax.lax.optimization_barrier((dy, w.layer))
        return dy, dataclasses.replace(w, layer=layer)
    if not isinstance(w, QuantizedTensor):
        return dy, w
    name = "offset" if w.double_quant else "absmax"
    dy, waited = jax.lax.optimization_barrier((dy, getattr(w, name)))
    return dy, dataclasses.replace(w, **{name: waited})
