"""Memory of a GPU: what is set aside of it, its limit and its peak. Importing this loads no JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

CONTEXT_BYTES = 512 * 2**20
"""Of a GPU's memory, set aside for CUDA's context, the kernels' machine code, and those workspaces of cuBLAS and cuDNN
that XLA does not assign."""

RESERVE_FRACTION = 0.02
"""Of a GPU's memory, set aside for what the driver keeps and what the allocator loses, half of it each."""


def device_limit(device: "jax.Device") -> int | None:
    """Bytes that JAX may allocate on a device; None if it has no limit of its own, as a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def device_peak(device: "jax.Device") -> int | None:
    """Most bytes that were allocated on a device at once, so far; None where nobody counts, as on a CPU."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
