"""Training on two devices, here of a CPU, is training on one."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from fixtures.compile_in_child import call


def losses_and_adapters(devices: int, dropout: float, placement: str = "device") -> list[Any]:
    """Three steps over four rows; the losses and every adapter's elements."""
    from fixtures import tiny_model
    from fixtures.batches import adapters_with_b, batch_of, random_ids
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from qlora_jax.quantization import QuantizationConfig
    from qlora_jax.sharding import Devices
    from qlora_jax.training.config import StepConfig, TrainConfig
    from qlora_jax.training.schedule import make_optimizer
    from qlora_jax.training.step import TrainState, make_train_step

    assert jax.device_count() == 2
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    graphdef, lora, frozen = tiny_model.build(seed=1, quantization=QuantizationConfig(), dropout=dropout)
    optimizer = make_optimizer(TrainConfig(learning_rate=1e-2, optim_placement=placement), 10, lora)
    step = make_train_step(
        graphdef, optimizer, StepConfig(dropout=dropout > 0, max_grad_norm=0.3), devices=Devices(mesh)
    )
    whole = NamedSharding(mesh, PartitionSpec())
    state = TrainState.create(jax.device_put(adapters_with_b(lora), whole), optimizer)
    state = dataclasses.replace(state, step=jax.device_put(state.step, whole))
    frozen = jax.device_put(frozen, whole)
    labels = np.array(ids := random_ids(1, 4, 16))
    labels[:, 0, 5:] = -100  # devices train different numbers of tokens
    batch = jax.device_put(batch_of(ids, labels), NamedSharding(mesh, PartitionSpec(None, "data")))
    losses = []
    for _ in range(3):
        state, report = step(state, frozen, batch)
        losses.append(float(report.loss))
    return [losses, [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(state.lora)]]


@pytest.fixture(scope="module")
def run():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return lambda *arguments: call("test_data_parallel:losses_and_adapters", *arguments, environment=environment)


@pytest.mark.e2e
def test_two_devices_train_as_one(run):
    (losses, adapters), (losses_of_one, adapters_of_one) = run(2, 0.0), run(1, 0.0)
    np.testing.assert_allclose(losses, losses_of_one, rtol=1e-5)
    for ours, theirs in zip(adapters, adapters_of_one, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.e2e
def test_two_devices_page_their_state(run):
    assert run(2, 0.0, "host") == run(2, 0.0)


@pytest.mark.e2e
def test_dropout_on_two_devices(run):
    losses, _ = run(2, 0.3)
    assert np.all(np.isfinite(losses))
    assert losses != run(2, 0.0)[0]
