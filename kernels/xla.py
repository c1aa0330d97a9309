"""The XLA implementation of the products with frozen weights: the reference, and what every platform can run.

The weight is decoded to the dtype of the activations and multiplied; both are ordinary XLA operations.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qlora_jax.quantization import QuantizedTensor, dequantize

_Weight = QuantizedTensor | jax.Array


def matmul(x: jax.Array, w: QuantizedTensor | jax.Array) -> jax.Array:
    """Return x @ W^T, [..., N] in x.dtype, summed in float32."""
    return _dot(x, w, axis=1)


def matmul_transposed(dy: jax.Array, w: QuantizedTensor | jax.Array) -> jax.Array:
    """Return dy @ W, [..., K] in dy.dtype, summed in float32: the gradient of `matmul` with respect to x."""
    dy, w = jax.lax.platform_dependent(dy, w, cpu=_as_they_are, default=_decode_later)
    return _dot(dy, w, axis=0)


def _dot(x: jax.Array, w: _Weight, axis: int) -> jax.Array:
    weight = dequantize(w, x.dtype) if isinstance(w, QuantizedTensor) else w.astype(x.dtype)
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, weight, contracted, preferred_element_type=jnp.float32).astype(x.dtype)


def _as_they_are(dy: jax.Array, w: _Weight) -> tuple[jax.Array, _Weight]:
    return dy, w


def _decode_later(dy: jax.Array, w: _Weight) -> tuple[jax.Array, _Weight]:
    # XLA would decode once for a layer's recomputed forward pass and its backward pass, and so keep the decoded
    # weights of the whole layer. A CPU has the memory and gains the time; elsewhere decoding waits until dy is there.
    # What goes through the barrier is copied, so it is the smallest buffer that decoding needs, not the codes.
    if not isinstance(w, QuantizedTensor):
        return dy, w
    name = "offset" if w.double_quant else "absmax"
    dy, waited = jax.lax.optimization_barrier((dy, getattr(w, name)))
    return dy, dataclasses.replace(w, **{name: waited})
