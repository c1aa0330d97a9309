"""What only a CUDA GPU can show: the same code gives the same numbers there. Skipped, never passed, without one."""

import jax
import numpy as np
import pytest
import tiny
from test_training_step import adapters_with_b, batch_of, random_ids

from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import TrainState, make_train_step


def losses_on(device: jax.Device, dtype: str, remat: bool) -> list[float]:
    """Losses of four training steps of a tiny quantised model on one device."""
    with jax.default_device(device), jax.default_matmul_precision("float32"):
        graphdef, lora, frozen = tiny.build(quantization=QuantizationConfig(), dtype=dtype)
        optimizer = make_optimizer(TrainConfig(learning_rate=1e-2, warmup_ratio=0.0), 4)
        state = TrainState.create(adapters_with_b(lora), optimizer)
        step = make_train_step(graphdef, optimizer, remat=remat)
        batch = batch_of(random_ids(1, 2, 64))
        losses = []
        for _ in range(4):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("remat", [False, True])
def test_training_on_the_gpu_follows_the_cpu(dtype, tolerance, remat):
    cpu = losses_on(jax.devices("cpu")[0], "float32", remat)
    np.testing.assert_allclose(losses_on(jax.devices("gpu")[0], dtype, remat), cpu, rtol=tolerance)


def test_losses_on_a_device():
    """The comparison above, as far as a CPU goes: bfloat16 follows float32 within the same tolerance."""
    cpu = jax.devices("cpu")[0]
    want = losses_on(cpu, "float32", False)
    assert want[-1] < want[0]
    np.testing.assert_allclose(losses_on(cpu, "bfloat16", True), want, rtol=2e-2)
