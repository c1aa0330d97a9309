"""The implementations of the products by Pallas kernels, for 4-bit weights on CUDA GPUs: `Fused` and `Unfused`."""

import dataclasses

import jax

from qlora_jax.kernels import selection, xla
from qlora_jax.kernels.mosaic import launch
from qlora_jax.kernels.weights import Weight


class Fused:
    """Kernels that dequantize codes while they multiply: no 16-bit weight exists in memory.

    Which kernel runs depends on the GPU's architecture and on the rows of x; see `qlora_jax.kernels.mosaic`.
    """

    def matmul(self, x: jax.Array, w: Weight) -> jax.Array:
        """Return x @ W^T, [..., N] in x.dtype, summed in float32."""
        return self._product(x, w, transposed=False)

    def matmul_transposed(self, dy: jax.Array, w: Weight) -> jax.Array:
        """Return dy @ W, [..., K] in dy.dtype, summed in float32, from the same packed codes."""
        return self._product(dy, w, transposed=True)

    def _product(self, x: jax.Array, w: Weight, *, transposed: bool) -> jax.Array:
        chip = selection.target_chip()
        if chip is None:
            raise RuntimeError("fused products are selected for CUDA GPUs only")
        y = launch.matmul(x.reshape(-1, x.shape[-1]), launch.operands(w), transposed=transposed, chip=chip)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Unfused:
    """A kernel that dequantizes the whole weight, then XLA's product: a 16-bit copy lives between the two."""

    def matmul(self, x: jax.Array, w: Weight) -> jax.Array:
        """Return x @ W^T, [..., N] in x.dtype, summed in float32."""
        return xla.multiply(x, launch.dequantize(launch.operands(w), x.dtype), axis=1)

    def matmul_transposed(self, dy: jax.Array, w: Weight) -> jax.Array:
        """Return dy @ W, [..., K] in dy.dtype, summed in float32."""
        operands = launch.operands(w)
        # Dequantized again, not kept from the forward pass of the layer: see `xla.matmul_transposed`.
        dy, layer = jax.lax.optimization_barrier((dy, operands.layer))
        return xla.multiply(dy, launch.dequantize(dataclasses.replace(operands, layer=layer), dy.dtype), axis=0)
