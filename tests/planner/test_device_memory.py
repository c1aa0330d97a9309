"""Limits of a GPU's and a host's memory, and what JAX and XLA are told of them."""

import os
import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from qlora_jax import device_memory
from qlora_jax.device_memory import PINNED_LIMIT_VARIABLE, host_memory, pinned_limit
from qlora_jax.environment import let_jax_pin_the_hosts_memory
from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS, ahead_of_time
from qlora_jax.optimizers import PagedOptimizer
from qlora_jax.planner import Allowance
from qlora_jax.training.step import TrainStep

GIB = 2**30
ANALYSED = [f"{name}_size_in_bytes" for name in ("argument", "output", "alias", "temp", "generated_code", "host_temp")]


@pytest.mark.parametrize("name", CHIPS)
def test_xla_may_use_what_the_planner_counts_on(name):
    """XLA's limit of a program compiled ahead of time is 80 % of the size in the target."""
    chip = CHIPS[name]
    sizes = re.findall(r"device_memory_size: (\d+)\n", ahead_of_time._target(chip))
    assert [int(size) * 80 // 100 for size in sizes] == [
        pytest.approx(chip.memory_bytes - Allowance.of(chip).total, abs=2)
    ]


@pytest.fixture
def host(monkeypatch):
    """Give the host so many GiB; the variable is unset, and afterwards as it was."""

    def set_memory(gib: float) -> None:
        monkeypatch.setattr(device_memory, "host_memory", lambda: int(gib * GIB))

    monkeypatch.setenv(PINNED_LIMIT_VARIABLE, "")
    monkeypatch.delenv(PINNED_LIMIT_VARIABLE)
    return set_memory


@pytest.mark.parametrize(("gib", "limit"), [(1007.6, "906"), (64, "57"), (0.5, "1")])
def test_jax_may_pin_the_host_memory_but_a_tenth(gib, limit, host):
    host(gib)
    let_jax_pin_the_hosts_memory()
    assert os.environ[PINNED_LIMIT_VARIABLE] == limit
    assert pinned_limit() == int(limit) * GIB


def test_a_pinned_limit_that_is_set_stays(host, monkeypatch):
    host(512)
    assert pinned_limit() == 64 * GIB  # what JAX takes of itself
    monkeypatch.setenv(PINNED_LIMIT_VARIABLE, "200")
    let_jax_pin_the_hosts_memory()
    assert os.environ[PINNED_LIMIT_VARIABLE] == "200"
    assert pinned_limit() == 200 * GIB
    monkeypatch.setenv(PINNED_LIMIT_VARIABLE, "9000")  # more than the host has
    assert pinned_limit() == 460 * GIB


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job/step\n", {"job/memory.max": "4294967296\n", "job/step/memory.max": "max\n"}, 4 * GIB),
        ("3:cpu:/a\n2:memory:/a\n", {"memory/a/memory.limit_in_bytes": "2147483648\n"}, 2 * GIB),
        ("0::/\n", {"memory.max": "1073741824\n"}, GIB),
        ("0::/\n", {"memory.max": "max\n"}, None),
    ],
)
def test_a_container_has_the_memory_of_its_control_group(membership, files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr(device_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(device_memory, "_MEMBERSHIP", tmp_path / "membership")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host_memory() == min(expected or physical, physical)
    monkeypatch.setattr(device_memory, "_MEMBERSHIP", tmp_path / "absent")
    assert host_memory() == physical


@pytest.mark.parametrize(("backend", "gib", "refused"), [("gpu", 100, True), ("gpu", 500, False), ("cpu", 100, False)])
def test_a_step_that_the_host_cannot_hold_is_refused_before_it_runs(backend, gib, refused, host, monkeypatch):
    """80 GB of offloaded activations and 30 GB of optimizer state, none of it on the device."""
    host(gib)
    monkeypatch.setenv(PINNED_LIMIT_VARIABLE, "1000")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    optimizer = Mock(PagedOptimizer, state_bytes=30 * 10**9)
    optimizer.resident_chunks.return_value = optimizer.resident_bytes.return_value = 0
    analysis = Mock(**{**dict.fromkeys(ANALYSED, 0), "host_temp_size_in_bytes": 80 * 10**9})
    compiled = Mock(jax.stages.Compiled, **{"memory_analysis.return_value": analysis})
    gradient_step = Mock(**{"lower.return_value.compile.return_value": compiled})
    arguments = nnx.State({}), nnx.State({}), {"input_ids": jnp.zeros((1, 1, 64))}, 0
    step = TrainStep(gradient_step, optimizer)
    if not refused:
        assert step.program(*arguments) is step.compiled(arguments[2])
        return
    with pytest.raises(
        UserError, match=r"110\.0 GB of pinned host memory and 96\.6 GB may be pinned here .*remat=full"
    ):
        step.program(*arguments)
