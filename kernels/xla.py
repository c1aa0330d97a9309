"""The XLA implementation of the products with frozen weights: the reference, and the fallback on every platform.

The weight is dequantized to the dtype of the activations and multiplied; both are ordinary XLA operations.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax import quantization
from qlora_jax.kernels.weights import StackedWeight, Weight
from qlora_jax.quantization import QuantizedTensor

WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}
"""Compiler options of programs that dequantize on CPUs.

XLA keeps to 256-bit vectors on CPUs that have 512 bits; dequantizing 4-bit weights gains more than clocks lose (a third
of its time; 2 to 5 % of a step of training on a Zen 5). CPUs without them take the widest they have."""


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """Return x @ W^T, [..., N] in x.dtype, summed in float32."""
    return multiply(x, dequantize(w, x.dtype), axis=1)


def matmul_transposed(dy: jax.Array, w: Weight) -> jax.Array:
    """Return dy @ W, [..., K] in dy.dtype, summed in float32: the gradient of `matmul` with respect to x."""
    dy, w = jax.lax.platform_dependent(dy, w, cpu=_as_they_are, default=_after)
    return multiply(dy, dequantize(w, dy.dtype), axis=0)


def multiply(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """Contract the last axis of x with `axis` of a dequantized weight [N, K], in x.dtype, summed in float32."""
    return contract(x, weight, axis).astype(x.dtype)


def contract(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """Return what `multiply` does, in float32."""
    if x.dtype.itemsize == 2 and x.size == x.shape[-1]:
        return jax.lax.platform_dependent(
            x,
            weight,
            cpu=functools.partial(_contract_doubled, axis=axis),
            default=functools.partial(_contract, axis=axis),
        )
    return _contract(x, weight, axis)


def _contract(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, weight, contracted, preferred_element_type=jnp.float32)


def _contract_doubled(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    # XLA's CPU backend multiplies a single row of 16-bit numbers element by element, two rows by its library: 49152x576
    # in 50 ms and 3 ms on a Zen 5.
    rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))
    return _contract(rows, weight, axis)[:1].reshape(*x.shape[:-1], -1)


def dequantize(w: Weight, dtype: Any) -> jax.Array:
    """Return a weight, a stack of them, one of a stack, or a plain array in `dtype`."""
    if isinstance(w, StackedWeight):
        w = w.take()
    with jax.named_scope("dequantize"):
        return quantization.dequantize(w, dtype) if isinstance(w, QuantizedTensor) else w.astype(dtype)


def _as_they_are(dy: jax.Array, w: Weight) -> tuple[jax.Array, Weight]:
    return dy, w


def _after(dy: jax.Array, w: Weight) -> tuple[jax.Array, Weight]:
    # XLA would dequantize once for a layer's recomputed forward pass and its backward pass, and so keep the dequantized
    # weights of the whole layer. A CPU has the memory and gains the time; elsewhere dequantizing waits until dy is
    # there. The barrier copies its operands: it takes the smallest buffer that dequantizing needs, not the codes.
    if isinstance(w, StackedWeight):
        dy, layer = jax.lax.optimization_barrier((dy, w.layer))
        return dy, dataclasses.replace(w, layer=layer)
    if not isinstance(w, QuantizedTensor):
        return dy, w
    name = next(name for name in ("offset", "scale_map", "absmax") if getattr(w, name) is not None)
    dy, waited = jax.lax.optimization_barrier((dy, getattr(w, name)))
    return dy, dataclasses.replace(w, **{name: waited})
