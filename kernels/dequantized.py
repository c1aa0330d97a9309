"""Decode the whole weight with a kernel of our own, then let XLA multiply: a 16-bit copy lives between the two."""

import dataclasses

import jax

from qlora_jax.kernels import xla
from qlora_jax.kernels.mosaic import launch
from qlora_jax.kernels.weights import Weight


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """Return x @ W^T, [..., N] in x.dtype, summed in float32."""
    return xla.multiply(x, launch.dequantize(launch.operands(w), x.dtype), axis=1)


def matmul_transposed(dy: jax.Array, w: Weight) -> jax.Array:
    """Return dy @ W, [..., K] in dy.dtype, summed in float32."""
    operands = launch.operands(w)
    # Decoded again, not kept from the forward pass of the layer: see `xla.matmul_transposed`.
    dy, layer = jax.lax.optimization_barrier((dy, operands.layer))
    return xla.multiply(dy, launch.dequantize(dataclasses.replace(operands, layer=layer), dy.dtype), axis=0)
