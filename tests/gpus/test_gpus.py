"""GPUs known by their data sheets, and programs compiled for them without one."""

import dataclasses
import re
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest
from fixtures import compile_in_child
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.errors import UserError
from qlora_jax.gpus import (
    CHIPS,
    REPRESENTATIVES,
    Chip,
    ahead_of_time,
    chip_like,
    chip_named,
    chip_of,
    compile_for,
    mesh,
)


def target_number(chip: Chip, field: str) -> float:
    """A number in XLA's description of a chip."""
    return float(re.search(rf"^ *{field}: ([\d.]+)$", chip.target, re.MULTILINE)[1])


@pytest.mark.parametrize("name", CHIPS)
def test_the_sheet_agrees_with_what_the_compiler_is_told(name):
    chip = CHIPS[name]
    assert chip.name == name
    assert f'device_description_str: "{chip.title}"' in chip.target
    assert chip.compute_capability == f"{target_number(chip, 'major'):.0f}.{target_number(chip, 'minor'):.0f}"
    assert chip.n_sms == target_number(chip, "core_count")
    assert chip.clock_hz == pytest.approx(target_number(chip, "clock_rate_ghz") * 1e9)
    assert chip.memory_bandwidth == pytest.approx(target_number(chip, "memory_bandwidth"), rel=1e-3)
    assert chip.l2_bytes == pytest.approx(target_number(chip, "l2_cache_size"), rel=1e-3)
    assert chip.shared_memory_bytes == target_number(chip, "shared_memory_per_block_optin")
    # The descriptions count a GB as 10^9 bytes, the sheets as 2^30.
    assert chip.memory_bytes == pytest.approx(target_number(chip, "device_memory_size"), rel=0.08)


@pytest.mark.parametrize("name", CHIPS)
def test_peaks_follow_from_cores_and_clocks(name):
    chip = CHIPS[name]
    assert chip.f32_flops == pytest.approx(
        2 * target_number(chip, "fpus_per_core") * chip.n_sms * chip.clock_hz, rel=0.02
    )
    # Dense bfloat16 multiply-adds of an SM in a clock, with float32 sums; tensor-bound clocks are lower on H100.
    per_clock = {"8.0": 1024, "8.6": 512, "8.9": 512, "9.0": 2048, "10.0": 4096, "12.0": 512}[chip.compute_capability]
    if "GeForce" in chip.title or name == "a10g":
        per_clock /= 2
    assert chip.bf16_flops == pytest.approx(2 * per_clock * chip.n_sms * chip.clock_hz, rel=0.09)
    assert chip.int32_ops == chip.int32_ops_per_clock * chip.n_sms * chip.clock_hz


def test_chips_by_name_and_by_device():
    assert chip_named("a6000").title == "NVIDIA RTX A6000"
    with pytest.raises(UserError, match=r"No GPU is called 'a5000' here: choose one of a100, .*b200\."):
        chip_named("a5000")
    assert chip_of(jax.devices("cpu")[0]) is None
    for chip in CHIPS.values():
        assert chip_named(chip.name) is chip_named(chip.title.upper()) is chip
    for kind, name in (("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s")):
        assert chip_of(Mock(jax.Device, device_kind=kind)) is CHIPS[name]
    for kind in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 3090 Ti"):
        assert chip_of(Mock(jax.Device, device_kind=kind)) is None


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("4090", "rtx4090"),
        ("RTX4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("3060", "rtx3060"),
        ("RTX A6000", "a6000"),
        ("A100", "a100"),
        ("A100-40GB", "a100"),
        ("a100_80gb", "a100-80gb"),
        ("H100 SXM", "h100"),
        ("A10G", "a10g"),
        ("NVIDIA A10", "a10"),
        ("L4", "l4"),
    ],
)
def test_a_gpu_is_known_by_what_people_call_it(name, chip):
    assert chip_named(name) is CHIPS[chip]


@pytest.mark.parametrize("name", ["RTX 4090 Laptop GPU", "3090 Ti", "H100 PCIe", "4080 Super", "A100X", "", "rtx"])
def test_another_model_is_not_taken_for_one_that_is_known(name):
    with pytest.raises(UserError, match=re.escape(f"No GPU is called {name!r} here")):
        chip_named(name)


@pytest.mark.parametrize("name", ["T4", "Tesla T4", "nvidia-t4", "V100", "RTX 2080 Ti"])
def test_a_gpu_before_ampere_is_refused_by_its_capability(name):
    message = r"^The .* \(compute capability 7\.[05]\) cannot be planned for: it has no bfloat16 tensor cores, as"
    with pytest.raises(UserError, match=message):
        chip_named(name)


def test_an_unknown_gpu_is_like_another_under_its_own_name():
    def gpu(title, capability):
        return Mock(jax.Device, device_kind=title, compute_capability=capability)

    assert chip_like(gpu("NVIDIA H100 PCIe", "9.0")) == dataclasses.replace(CHIPS["h100"], title="NVIDIA H100 PCIe")
    assert chip_like(gpu("NVIDIA H200", "9.0")) is CHIPS["h200"]
    assert chip_like(gpu("NVIDIA T4", "7.5")) is None
    assert chip_like(jax.devices("cpu")[0]) is None
    assert {CHIPS[name].compute_capability for name in REPRESENTATIVES.values()} == set(REPRESENTATIVES)
    assert set(REPRESENTATIVES) == {chip.compute_capability for chip in CHIPS.values()}


def test_without_the_plugin_one_sentence_says_what_to_install(monkeypatch):
    chip = dataclasses.replace(CHIPS["a6000"], name="never asked for before")
    monkeypatch.setattr(ahead_of_time, "_PLUGINS", ("jax_plugins.no_such_plugin", "no_such_package.plugin"))
    with pytest.raises(UserError, match=r"^Compiling for a GPU needs .*: pip install .*\[plan\]'\.$"):
        compile_for(chip, jnp.sin, jax.ShapeDtypeStruct((4,), jnp.float32))


def test_a_plugin_that_jax_dropped_is_told_apart_from_a_missing_one(monkeypatch):
    def not_implemented(**_):
        raise NotImplementedError("topology not implemented for cuda")

    chip = dataclasses.replace(CHIPS["a6000"], bf16_flops=0.0)
    monkeypatch.setattr(ahead_of_time, "_PLUGINS", ("jax.numpy",))
    monkeypatch.setattr(ahead_of_time.topologies, "get_topology_desc", not_implemented)
    with pytest.raises(UserError, match="set JAX_PLATFORMS=cpu to compile for a GPU without one"):
        mesh(chip)


def compile_everywhere(names: list[str]) -> dict[str, Any]:
    """A matrix product for each chip, and one for two GPUs; runs in a child."""
    x, w = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16), jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)
    found: dict[str, Any] = {}
    for name in names:
        compiled = compile_for(CHIPS[name], lambda x, w: jnp.tanh(x @ w), x, w)
        memory = compiled.memory_analysis()
        found[name] = {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "hlo": compiled.as_text()[:200],
            "chip": chip_of(mesh(CHIPS[name]).devices.flat[0]).name,
        }
    two = mesh(CHIPS["h100"], 2)
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(two, PartitionSpec("data")))
    w = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=NamedSharding(two, PartitionSpec()))
    step = jax.jit(lambda x, w: w - x.T @ (x @ w), donate_argnums=1)
    compiled = compile_for(CHIPS["h100"], step, x, w, n_devices=2)
    found["two"] = {
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
        "aliased": compiled.memory_analysis().alias_size_in_bytes,
        "all-reduce": "all-reduce" in compiled.as_text(),
    }
    return found


@pytest.mark.compile
def test_compiles_for_every_chip_without_one():
    found = compile_in_child.call("test_gpus:compile_everywhere", list(CHIPS))
    for name in CHIPS:
        assert found[name]["chip"] == name
        assert found[name]["arguments"] == 2 * (256 * 512 + 512 * 128)
        assert found[name]["outputs"] == 2 * 256 * 128
        assert found[name]["temporaries"] >= 0
        assert found[name]["hlo"].startswith("HloModule")
    assert found["two"] == {"arguments": 2 * (128 * 512 + 512 * 128), "aliased": 2 * 512 * 128, "all-reduce": True}
