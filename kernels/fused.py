"""The fused products: codes are decoded inside the kernel that multiplies, no 16-bit weight exists in memory.

Which kernel runs is a question of the architecture and of the rows of x; see `qlora_jax.kernels.mosaic`.
"""

import jax

from qlora_jax.kernels import selection
from qlora_jax.kernels.mosaic import launch
from qlora_jax.kernels.weights import Weight


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """Return x @ W^T, [..., N] in x.dtype, summed in float32."""
    return _product(x, w, transposed=False)


def matmul_transposed(dy: jax.Array, w: Weight) -> jax.Array:
    """Return dy @ W, [..., K] in dy.dtype, summed in float32, from the same packed codes."""
    return _product(dy, w, transposed=True)


def _product(x: jax.Array, w: Weight, *, transposed: bool) -> jax.Array:
    chip = selection.target_chip()
    if chip is None:
        raise RuntimeError("fused products are selected for CUDA GPUs only")
    y = launch.matmul(x.reshape(-1, x.shape[-1]), launch.operands(w), transposed=transposed, chip=chip)
    return y.reshape(*x.shape[:-1], y.shape[-1])
