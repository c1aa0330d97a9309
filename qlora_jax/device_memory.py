"""Memory of a GPU, its host and compiled programs: limits, peaks, allowances. Importing this loads no JAX."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

CONTEXT_BYTES = 512 * 2**20
"""Of a GPU's memory, set aside for CUDA's context, the kernels' machine code, and those workspaces of cuBLAS and cuDNN
that XLA does not assign."""

RESERVE_FRACTION = 0.02
"""Of a GPU's memory, set aside for what the driver keeps and what the allocator loses, half of it each."""

PINNED_FRACTION = 0.9
"""Of the host's memory, the largest part that is pinned; the rest is for the process itself and the system."""

PINNED_LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""Environment variable that caps JAX's pool of pinned host memory, in GiB; read when its GPU client is made."""
_PINNED_LIMIT_DEFAULT = 64
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Bytes of one compiled program on one device, by XLA's buffer assignment.

    Attributes:
        arguments: buffers of the arguments that the program reads.
        outputs: buffers of its results.
        aliased: of those, the ones that are written over (donated) arguments.
        temporaries: its heap at the fullest moment.
        code: machine code and constants it keeps loaded.
        host_temporaries: pinned host memory for what is offloaded while it runs.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    host_temporaries: int

    @classmethod
    def of(cls, compiled: "jax.stages.Compiled") -> "ProgramMemory":
        """Read the memory analysis of a program compiled for a CPU or a GPU; other backends have none."""
        memory: Any = compiled.memory_analysis()
        return cls(
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            host_temporaries=memory.host_temp_size_in_bytes,
        )

    @property
    def peak(self) -> int:
        """Device bytes while the program runs: arguments, results that are not written over them, heap and code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def allowance_bytes(memory_bytes: int) -> int:
    """Bytes set aside on a GPU of `memory_bytes`: `CONTEXT_BYTES` and `RESERVE_FRACTION` of its memory."""
    return CONTEXT_BYTES + math.ceil(RESERVE_FRACTION * memory_bytes)


def device_limit(device: "jax.Device") -> int | None:
    """Bytes that JAX may allocate on a device; None if it has no limit of its own, as a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def device_peak(device: "jax.Device") -> int | None:
    """Most bytes that were allocated on a device at once, so far; None where nobody counts, as on a CPU."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def host_memory() -> int:
    """Bytes of memory of this machine, or of the control group (container, batch job) the process is in, if less."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_control_group_limits()])


def _control_group_limits() -> Iterator[int]:
    """Memory limits of the process's control group and those above it, of either version."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, file = (_CGROUPS, "memory.max") if not controllers else (_CGROUPS / "memory", "memory.limit_in_bytes")
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            try:
                yield int((directory / file).read_text(encoding="utf-8"))
            except (OSError, ValueError):  # no such file above the root; "max" where there is no limit
                continue


def pinned_share() -> int:
    """GiB of this host's memory that JAX should be let pin: `PINNED_FRACTION` of it, at least one."""
    return max(1, int(PINNED_FRACTION * host_memory()) >> 30)


def pinned_limit() -> int:
    """Bytes of pinned host memory that JAX can allocate in this process, and the host has."""
    try:
        allowed = int(os.environ[PINNED_LIMIT_VARIABLE])
    except (KeyError, ValueError):
        allowed = _PINNED_LIMIT_DEFAULT
    return min(allowed, pinned_share()) << 30
