"""Figures of NVIDIA's data sheets for the GPUs that plans and roofline predictions are made for. Nothing is measured.

Sheets: NVIDIA A100 data sheet (2020, 2021 for 80 GB); RTX A6000 data sheet (2020); A10 data sheet (2021) and that of
the A10G (for AWS, 2021); "NVIDIA Ampere GA102 GPU Architecture" (3090); "NVIDIA Ada GPU Architecture" (4090, 4080); L4
and L40S data sheets (2023); "NVIDIA H100 Tensor Core GPU Architecture" and the H100 and H200 data sheets (SXM modules);
HGX B200 data sheet (2024); "NVIDIA RTX Blackwell GPU Architecture" (5090, 5080); product pages of the GeForce RTX 3060
(12 GB) and 4070; PCI Express base specifications 4.0 and 5.0. Tensor figures are dense: half of what a sheet prints
"with sparsity".

What those do not print:
- A10: SMs and clock; 9,216 cores at 1695 MHz are listed elsewhere (72 SMs), and make the 31.2 TFLOP/s that it prints.
- A10G: SMs and L2 as the driver reports them (80, 6 MiB; 22,587 MiB of memory are free for programs); the clock is the
  one at which 80 SMs make the 35 TFLOP/s that it prints, and they make the 70 of its tensor cores at half rate.
- RTX 3060 and 4070: bandwidth (192 bits of 15 and 21 Gbit/s), L2 and exact clock as in tables of reviews, where the
  pages round to 1.78 and 2.48 GHz; the tensor figures follow from SMs and clock as in the papers about their kin.
"""

import dataclasses
import functools
import importlib.resources
import re
from types import MappingProxyType
from typing import Any

import jax

from qlora_jax.errors import UserError

_GIB = 2**30
# Of one direction: 16 lanes of 16 or 32 GT/s, 128 bits of every 130.
_PCIE_X16 = {4: 31.5e9, 5: 63.0e9}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU model: peak figures from its data sheet at its boost clock.

    Attributes:
        name: Key in `CHIPS`, and the name on a command line.
        title: Exact name that the CUDA driver gives it: `jax.Device.device_kind`.
        compute_capability: "major.minor".
        arch: ptxas' target for kernels written for this GPU alone.
        memory_bytes: Device memory. The sheets' GB are 2^30 bytes; the driver and XLA keep some of it.
        memory_bandwidth: Bytes a second.
        bf16_flops: Dense bfloat16 tensor FLOP/s accumulated in float32, which GeForce cards and the A10G do at half
            rate.
        f32_flops: float32 FLOP/s outside the tensor cores, two for a fused multiply-add.
        int32_ops_per_clock: 32-bit integer instructions (add, logic, shift, byte permute) of one SM in one clock:
            the CUDA C++ Programming Guide's throughput table up to 9.0; 128 on 12.0, where the Blackwell paper has
            every core do both integers and floats; for 10.0 no sheet gives one, and Hopper's stands in.
        n_sms: Streaming multiprocessors.
        clock_hz: Boost clock.
        l2_bytes: Level-two cache.
        shared_memory_bytes: Shared memory that one block may have.
        host_bandwidth: Bytes a second to the host, and as many from it at the same time: sixteen PCIe lanes of the
            generation on the sheet, less their line code.
    """

    name: str
    title: str
    compute_capability: str
    arch: str
    memory_bytes: int
    memory_bandwidth: float
    bf16_flops: float
    f32_flops: float
    int32_ops_per_clock: int
    n_sms: int
    clock_hz: float
    l2_bytes: int
    shared_memory_bytes: int
    host_bandwidth: float

    @property
    def int32_ops(self) -> float:
        """32-bit integer instructions a second, of the whole chip, counted per thread."""
        return self.int32_ops_per_clock * self.n_sms * self.clock_hz

    @property
    def target(self) -> str:
        """XLA's description of the GPU, a text proto that the compiler takes in place of a device."""
        return importlib.resources.files("qlora_jax.gpus").joinpath("targets", f"{self.name}.txtpb").read_text("utf-8")


def _chip(
    arch: str,
    name: str,
    title: str,
    *,
    gib: float,
    gb_per_second: float,
    bf16: float,
    f32: float,
    int32: int,
    sms: int,
    mhz: int,
    l2_mib: float,
    shared_kib: int,
    pcie: int,
) -> tuple[str, Chip]:
    """A row of the table in the sheets' own units: TFLOP/s, GB/s, MHz, KiB of shared memory."""
    digits = arch.removeprefix("sm_").removesuffix("a")
    return name, Chip(
        name=name,
        title=title,
        compute_capability=f"{digits[:-1]}.{digits[-1]}",
        arch=arch,
        memory_bytes=round(gib * _GIB),
        memory_bandwidth=gb_per_second * 1e9,
        bf16_flops=bf16 * 1e12,
        f32_flops=f32 * 1e12,
        int32_ops_per_clock=int32,
        n_sms=sms,
        clock_hz=mhz * 1e6,
        l2_bytes=round(l2_mib * 2**20),
        shared_memory_bytes=shared_kib * 1024,
        host_bandwidth=_PCIE_X16[pcie],
    )


_a100 = functools.partial(
    _chip, "sm_80", bf16=312.0, f32=19.5, int32=64, sms=108, mhz=1410, l2_mib=40.0, shared_kib=163, pcie=4
)
_h100 = functools.partial(
    _chip, "sm_90a", bf16=989.4, f32=66.9, int32=64, sms=132, mhz=1980, l2_mib=50.0, shared_kib=227, pcie=5
)
# L4, L40S and A10 are shipped with error correction on, which keeps a sixteenth of GDDR6; the sheets say 24 and 48 GB.
_GDDR_ECC = 15 / 16

CHIPS: MappingProxyType[str, Chip] = MappingProxyType(
    dict(
        (
            _a100("a100", "NVIDIA A100-SXM4-40GB", gib=40.0, gb_per_second=1555.0),
            _a100("a100-80gb", "NVIDIA A100-SXM4-80GB", gib=80.0, gb_per_second=2039.0),
            _chip(
                "sm_86", "a6000", "NVIDIA RTX A6000", gib=48.0, gb_per_second=768.0, bf16=154.8, f32=38.7,
                int32=64, sms=84, mhz=1800, l2_mib=6.0, shared_kib=99, pcie=4,
            ),
            _chip(
                "sm_86", "a10", "NVIDIA A10", gib=24.0 * _GDDR_ECC, gb_per_second=600.0, bf16=125.0, f32=31.2,
                int32=64, sms=72, mhz=1695, l2_mib=6.0, shared_kib=99, pcie=4,
            ),
            _chip(
                "sm_86", "a10g", "NVIDIA A10G", gib=24.0 * _GDDR_ECC, gb_per_second=600.0, bf16=70.0, f32=35.0,
                int32=64, sms=80, mhz=1710, l2_mib=6.0, shared_kib=99, pcie=4,
            ),
            _chip(
                "sm_86", "rtx3060", "NVIDIA GeForce RTX 3060", gib=12.0, gb_per_second=360.0, bf16=25.5, f32=12.7,
                int32=64, sms=28, mhz=1777, l2_mib=3.0, shared_kib=99, pcie=4,
            ),
            _chip(
                "sm_86", "rtx3090", "NVIDIA GeForce RTX 3090", gib=24.0, gb_per_second=936.0, bf16=71.0, f32=35.6,
                int32=64, sms=82, mhz=1695, l2_mib=6.0, shared_kib=99, pcie=4,
            ),
            _chip(
                "sm_89", "rtx4070", "NVIDIA GeForce RTX 4070", gib=12.0, gb_per_second=504.0, bf16=58.3, f32=29.1,
                int32=64, sms=46, mhz=2475, l2_mib=36.0, shared_kib=99, pcie=4,
            ),
            _chip(
                "sm_89", "rtx4080", "NVIDIA GeForce RTX 4080", gib=16.0, gb_per_second=716.8, bf16=97.5, f32=48.7,
                int32=64, sms=76, mhz=2505, l2_mib=64.0, shared_kib=99, pcie=4,
            ),
            _chip(
                "sm_89", "rtx4090", "NVIDIA GeForce RTX 4090", gib=24.0, gb_per_second=1008.0, bf16=165.2, f32=82.6,
                int32=64, sms=128, mhz=2520, l2_mib=72.0, shared_kib=99, pcie=4,
            ),
            _chip(
                "sm_120a", "rtx5080", "NVIDIA GeForce RTX 5080", gib=16.0, gb_per_second=960.0, bf16=112.6, f32=56.3,
                int32=128, sms=84, mhz=2617, l2_mib=64.0, shared_kib=99, pcie=5,
            ),
            _chip(
                "sm_120a", "rtx5090", "NVIDIA GeForce RTX 5090", gib=32.0, gb_per_second=1792.0, bf16=209.5, f32=104.8,
                int32=128, sms=170, mhz=2407, l2_mib=96.0, shared_kib=99, pcie=5,
            ),
            _chip(
                "sm_89", "l4", "NVIDIA L4", gib=24.0 * _GDDR_ECC, gb_per_second=300.0, bf16=121.0, f32=30.3,
                int32=64, sms=58, mhz=2040, l2_mib=48.0, shared_kib=99, pcie=4,
            ),
            _chip(
                "sm_89", "l40s", "NVIDIA L40S", gib=48.0 * _GDDR_ECC, gb_per_second=864.0, bf16=362.05, f32=91.6,
                int32=64, sms=142, mhz=2520, l2_mib=96.0, shared_kib=99, pcie=4,
            ),
            _h100("h100", "NVIDIA H100 80GB HBM3", gib=80.0, gb_per_second=3352.0),
            _h100("h200", "NVIDIA H200", gib=141.0, gb_per_second=4800.0),
            _chip(
                "sm_100a", "b200", "NVIDIA B200", gib=180.0, gb_per_second=8000.0, bf16=2250.0, f32=75.0,
                int32=64, sms=148, mhz=1965, l2_mib=126.5, shared_kib=227, pcie=5,
            ),
        )
    )
)  # fmt: skip
"""Every known GPU by its short name."""

REPRESENTATIVES = MappingProxyType(
    {"8.0": "a100", "8.6": "a6000", "8.9": "l40s", "9.0": "h100", "10.0": "b200", "12.0": "rtx5090"}
)
"""A chip of each compute capability, whose figures stand in for a GPU that is not in `CHIPS`."""


_TOO_OLD = {
    "t4": ("T4", "7.5"), "2080ti": ("GeForce RTX 2080 Ti", "7.5"), "2080": ("GeForce RTX 2080", "7.5"),
    "2070": ("GeForce RTX 2070", "7.5"), "2060": ("GeForce RTX 2060", "7.5"), "v100": ("V100", "7.0"),
    "p100": ("P100", "6.0"), "1080ti": ("GeForce GTX 1080 Ti", "6.1"),
}  # fmt: skip
"""GPUs that people have and that cannot be planned for, by their key, with title and compute capability."""

_ALIASES = {
    "a100 40gb": "a100", "a100 sxm": "a100", "a100 80gb sxm": "a100-80gb", "h100 sxm": "h100", "h100 80gb": "h100",
    "rtx 3060 12gb": "rtx3060",
}  # fmt: skip
"""Further names of GPUs, beside their titles -> name here."""


def _key(name: str) -> str:
    """Reduce what people and drivers call a GPU to letters and digits: "NVIDIA GeForce RTX 4090" is "4090"."""
    found = re.sub("[^a-z0-9]", "", name.lower())
    for maker in ("nvidia", "tesla", "geforce", "rtx", "gtx"):
        found = found.removeprefix(maker)
    return found


@functools.cache
def _named() -> dict[str, Chip]:
    """Every chip by the keys of its names; where two have a key, the first has it."""
    found: dict[str, Chip] = {}
    for chip in CHIPS.values():
        for name in (chip.name, chip.title):
            found.setdefault(_key(name), chip)
    return found | {_key(alias): CHIPS[name] for alias, name in _ALIASES.items()}


def chip_named(name: str) -> Chip:
    """Return the GPU of a name: its short name or the driver's, in any case, with or without "NVIDIA GeForce RTX".

    Raises:
        UserError: there is none of that name, or it has no tensor cores for bfloat16.
    """
    key = _key(name)
    if key in _TOO_OLD:
        title, capability = _TOO_OLD[key]
        raise UserError(
            f"The {title} (compute capability {capability}) cannot be planned for: it has no bfloat16 tensor cores, "
            f"as GPUs have from 8.0 on; choose one of {', '.join(CHIPS)}."
        )
    if key not in _named():
        raise UserError(f"No GPU is called {name!r} here: choose one of {', '.join(CHIPS)}.")
    return _named()[key]


def chip_of(device: jax.Device) -> Chip | None:
    """Return the data sheet of a device, real or compiled for; None for a GPU not in the table and for other devices.

    Only the exact model counts: a PCIe, NVL, Ti, D or laptop version has other clocks, SMs and bandwidth.
    """
    return next((chip for chip in CHIPS.values() if chip.title == device.device_kind), None)


def chip_like(device: Any) -> Chip | None:
    """Return a GPU's data sheet, or that of its capability's representative under its own title; None without a GPU."""
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        return None
    if chip := chip_of(device):
        return chip
    representative = REPRESENTATIVES.get(capability)
    if representative is None:
        return None
    return dataclasses.replace(CHIPS[representative], title=device.device_kind)
