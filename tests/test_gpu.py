"""Tests that only a CUDA GPU can pass: the same code, the same numbers. Skipped, never passed, without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import tiny_model
from fixtures.batches import adapters_with_b, batch_of, random_ids

from qlora_jax import kernels
from qlora_jax.quantization import QuantizationConfig, quantize
from qlora_jax.training.config import StepConfig, TrainConfig
from qlora_jax.training.schedule import make_optimizer
from qlora_jax.training.step import TrainState, make_train_step


def losses_on(device: jax.Device, dtype: str, remat: str) -> list[float]:
    """Losses of four training steps of a tiny quantised model on one device."""
    with jax.default_device(device), jax.default_matmul_precision("float32"):
        graphdef, lora, frozen = tiny_model.build(quantization=QuantizationConfig(), dtype=dtype)
        optimizer = make_optimizer(TrainConfig(learning_rate=1e-2, warmup_ratio=0.0), 4, lora, dtype=dtype)
        state = TrainState.create(adapters_with_b(lora), optimizer)
        step = make_train_step(graphdef, optimizer, StepConfig(remat=remat, max_grad_norm=0.3))
        batch = batch_of(random_ids(1, 2, 64))
        losses = []
        for _ in range(4):
            state, report = step(state, frozen, batch)
            losses.append(float(report.loss))
    return losses


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("remat", ["none", "full", "save_attention", "offload"])
def test_training_on_the_gpu_follows_the_cpu(dtype, tolerance, remat):
    cpu = losses_on(jax.devices("cpu")[0], "float32", remat)
    np.testing.assert_allclose(losses_on(jax.devices("gpu")[0], dtype, remat), cpu, rtol=tolerance)


@pytest.mark.e2e
def test_losses_on_a_device():
    """The comparison above, as far as a CPU goes: bfloat16 follows float32 within the same tolerance."""
    cpu = jax.devices("cpu")[0]
    want = losses_on(cpu, "float32", "none")
    assert want[-1] < want[0]
    np.testing.assert_allclose(losses_on(cpu, "bfloat16", "full"), want, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 8192), (576, 1536), (192, 576)])
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 100, 512, 2048])
def test_kernels_at_real_shapes(rows, shape):
    """Both kernels against XLA's decode-and-multiply, forward and backward, for one layer of a stack."""
    n, k = shape
    weights = [quantize(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)) for i in range(2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    w = kernels.StackedWeight(stack, jnp.int32(1))
    x = jax.random.normal(jax.random.key(2), (rows, k), jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(3), (rows, n), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, x, dy, w):
        y, vjp = jax.vjp(lambda x: kernels.matmul(x, w, implementation=implementation), x)
        return y, vjp(dy)[0], kernels.dequantize(w, jnp.bfloat16, implementation=implementation)

    *expected, decoded = run("xla", x, dy, w)
    for implementation in ("fused", "unfused"):
        *products, ours = run(implementation, x, dy, w)
        np.testing.assert_array_equal(ours, decoded)
        for got, want in zip(products, expected, strict=True):
            got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
            np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-8 * np.sqrt(np.mean(want**2)))
