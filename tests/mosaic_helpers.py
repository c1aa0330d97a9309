"""Weights and products to check the Mosaic kernels with, in Pallas' interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from qlora_jax.kernels import dequantize
from qlora_jax.kernels.mosaic import operands, reference
from qlora_jax.quantization import quantize


def array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def check(
    module,
    shape,
    *,
    transposed=False,
    races=False,
    dtype=jnp.bfloat16,
    quant_type="nf4",
    block_size=64,
    double_quant=True,
    **config,
):
    """Multiply by the second of two stacked weights in interpret mode, and compare with NumPy."""
    m, n, k = shape
    layers = [
        quantize(array(n, k, seed=seed), quant_type=quant_type, block_size=block_size, double_quant=double_quant)
        for seed in (1, 2)
    ]
    w = operands.Operands.of(jax.tree.map(lambda *buffers: jnp.stack(buffers), *layers), jnp.int32(1))
    config = module.Config(**config)
    x = array(m, n if transposed else k, dtype=dtype)
    y = module.matmul(
        operands.pad_contraction(x, n, config.block_k) if transposed else x,
        w,
        config=config,
        transposed=transposed,
        seam=reference,
        interpret=plgpu.InterpretGPUParams(detect_races=races),
    )
    decoded = np.asarray(dequantize(jax.tree.map(jnp.asarray, layers[1]), dtype), np.float64)
    expected = np.float64(x) @ (decoded if transposed else decoded.T)
    assert y.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2 * eps, atol=1e-6 * (n + k))
