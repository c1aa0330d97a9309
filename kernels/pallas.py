"""The implementations of the products by Pallas kernels, for 4-bit weights on CUDA GPUs: `Fused` and `Unfused`."""

import dataclasses

import jax

from qlora_jax.gpus import Chip
from qlora_jax.kernels import selection, xla
from qlora_jax.kernels.mosaic import dispatch
from qlora_jax.kernels.mosaic.kernel import GPU, Execution
from qlora_jax.kernels.weights import Weight


@dataclasses.dataclass(frozen=True)
class Fused:
    """Kernels that dequantize codes while they multiply: no 16-bit weight exists in memory.

    Which kernel runs depends on the GPU's architecture and on the rows of x; see `qlora_jax.kernels.mosaic`.

    Attributes:
        chip: the GPU whose kernels run; None for the one that the program is traced for.
        execution: on that GPU, or interpreted.
    """

    chip: Chip | None = None
    execution: Execution = GPU

    def matmul(self, x: jax.Array, w: Weight) -> jax.Array:
        """Return x @ W^T, [..., N] in x.dtype, summed in float32."""
        return self._product(x, w, transposed=False)

    def matmul_transposed(self, dy: jax.Array, w: Weight) -> jax.Array:
        """Return dy @ W, [..., K] in dy.dtype, summed in float32, from the same packed codes."""
        return self._product(dy, w, transposed=True)

    def _product(self, x: jax.Array, w: Weight, *, transposed: bool) -> jax.Array:
        chip = self.chip or selection.target_chip()
        if chip is None:
            raise RuntimeError("fused products are selected for CUDA GPUs only")
        rows, packed = x.reshape(-1, x.shape[-1]), dispatch.pack(w)
        y = dispatch.matmul(rows, packed, transposed=transposed, chip=chip, execution=self.execution)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def dequantize(self, w: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the weight [N, K] in bfloat16 or float16."""
        return dispatch.dequantize(dispatch.pack(w), dtype, execution=self.execution)


@dataclasses.dataclass(frozen=True)
class Unfused:
    """A kernel that dequantizes the whole weight, then XLA's product: a 16-bit copy lives between the two.

    Attributes:
        execution: on a GPU, or interpreted.
    """

    execution: Execution = GPU

    def matmul(self, x: jax.Array, w: Weight) -> jax.Array:
        """Return x @ W^T, [..., N] in x.dtype, summed in float32."""
        return xla.multiply(x, self.dequantize(w, x.dtype), axis=1)

    def matmul_transposed(self, dy: jax.Array, w: Weight) -> jax.Array:
        """Return dy @ W, [..., K] in dy.dtype, summed in float32."""
        packed = dispatch.pack(w)
        # Dequantized again, not kept from the forward pass of the layer: see `xla.matmul_transposed`.
        dy, layer = jax.lax.optimization_barrier((dy, packed.layer))
        packed = dataclasses.replace(packed, layer=layer)
        return xla.multiply(dy, dispatch.dequantize(packed, dy.dtype, execution=self.execution), axis=0)

    def dequantize(self, w: Weight, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the weight [N, K] in bfloat16 or float16."""
        return dispatch.dequantize(dispatch.pack(w), dtype, execution=self.execution)
