"""Compile for a GPU that this machine does not have: XLA needs its CUDA plugin and the chip's description.

The result cannot run here, but it is the program that would: `memory_analysis()` is XLA's own buffer assignment,
`as_text()` the optimized HLO. Traps:

- An `LLVM ERROR` or a failed check in XLA ends the process, with no exception to catch: where a program may be one the
  compiler cannot take, compile in a child process.
- The devices list no memories, so a sharding's `memory_kind="pinned_host"` becomes None without a word and
  host-resident *arguments* are counted as device bytes. `jax.device_put` to `jax.memory.Space.Host` inside the
  function does lower and is counted in `host_temp_size_in_bytes`.
- Without the target as the default device, Pallas guesses another architecture; `compile_for` sets it.
- All Pallas kernels of a process are assembled for the architecture of its first, which `compile_for` refuses for
  another: one architecture a process.
- Of the target's `device_memory_size` XLA takes 80 % as its limit, beyond which it rematerialises on its own and makes
  collectives synchronous; on a GPU that is here the limit is what the allocator may take. `_target` states a size of
  which 80 % is what the planner gives to a program.
- JAX drops the plugin, compiler and all, when it looks for CUDA devices and finds none or misses a CUDA library: on a
  machine without a GPU the process needs `JAX_PLATFORMS=cpu` in its environment from the start.
"""

import contextlib
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo  # its checks of a GPU have no public hook
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from qlora_jax.device_memory import allowance_bytes
from qlora_jax.errors import UserError
from qlora_jax.extras import install_command
from qlora_jax.gpus.chips import Chip

# The architecture of the first Pallas kernel: the compiler assembles every later one for it too, whatever the chip.
_pallas_arch: dict[str, str] = {}
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def _plugin_installed() -> bool:
    """Return True if JAX's CUDA compiler is installed, of whichever CUDA version."""
    try:
        return any(importlib.util.find_spec(name) for name in _PLUGINS)
    except ModuleNotFoundError:  # not even the package the plugins share
        return False


_XLA_SHARE = 0.8


def _target(chip: Chip) -> str:
    """The chip's target proto with the memory size that makes XLA's limit the chip's memory less the allowance."""
    size = round((chip.memory_bytes - allowance_bytes(chip.memory_bytes)) / _XLA_SHARE)
    target, replaced = re.subn(r"(?<=device_memory_size: )\d+", str(size), chip.target)
    assert replaced == 1, chip.name
    return target


@functools.cache
def topology(chip: Chip, n_devices: int = 1) -> topologies.TopologyDescription:
    """`n_devices` GPUs of one model in one machine, to compile for; the same object each time.

    Raises:
        UserError: JAX's CUDA plugin is not installed, or was dropped for want of a GPU.
    """
    if not _plugin_installed():
        raise UserError(f"Compiling for a GPU needs JAX's CUDA plugin: {install_command('plan')}.")
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=_target(chip), topology=f"1x1x{n_devices}"
        )
    except NotImplementedError as error:
        raise UserError(
            "JAX found no GPU and dropped its CUDA plugin: set JAX_PLATFORMS=cpu to compile for a GPU without one."
        ) from error


def mesh(chip: Chip, n_devices: int = 1, axis: str = "data") -> Mesh:
    """A one-axis mesh over all the devices of `topology(chip, n_devices)`, for the shardings of abstract arguments.

    Raises:
        UserError: JAX's CUDA plugin is not installed, or was dropped for want of a GPU.
    """
    devices: np.ndarray = np.array(topology(chip, n_devices).devices)
    return Mesh(devices, (axis,), axis_types=(AxisType.Auto,))


@contextlib.contextmanager
def _cudnn_asks(chip: Chip) -> Iterator[None]:
    """Let JAX's cuDNN attention ask `chip` for its compute capability: it knows the GPUs of this machine only.

    Without it heads wider than 128, which cuDNN takes from Hopper on, would be planned with XLA's attention and run
    with cuDNN's.
    """
    own = tuple(int(part) for part in chip.compute_capability.split("."))

    def at_least(capability: str) -> bool:
        return own >= tuple(int(part) for part in capability.split("."))

    def equal(capability: str) -> bool:
        return own == tuple(int(part) for part in capability.split("."))

    replaced = {"check_compute_capability": at_least, "is_cuda_compute_capability_equal": equal}
    before = {name: getattr(fused_attention_stablehlo, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(fused_attention_stablehlo, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(fused_attention_stablehlo, name, function)


@contextlib.contextmanager
def tracing_for(chip: Chip) -> Iterator[None]:
    """Trace as on a machine with this GPU: JAX takes it for the default device, and knows what its cuDNN can do."""
    with jax.default_device(topology(chip).devices[0]), _cudnn_asks(chip):
        yield


def compile_for(
    chip: Chip,
    function: Callable[..., Any],
    *args: Any,
    n_devices: int = 1,
    compiler_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> jax.stages.Compiled:
    """`function`, jitted or to be jitted, compiled for `chip` on a machine that need not have one.

    Args:
        chip: The GPU.
        function: A function, or what `jax.jit` returned (with its donations, static arguments and shardings).
        *args: Its arguments, abstract (`jax.ShapeDtypeStruct`) or not. More than one device: each abstract array has a
            `sharding` over `mesh(chip, n_devices)`, or `function` was jitted with `in_shardings` over it.
        n_devices: GPUs that the program runs on.
        compiler_options: XLA's debug options, such as `xla_dump_to`, beside those of `function`.
        **kwargs: Its keyword arguments.

    Raises:
        UserError: JAX's CUDA plugin is not installed, or was dropped for want of a GPU; or `function` has Pallas
            kernels and this process compiled some for another architecture.
    """
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with tracing_for(chip):
        lowered = jitted.trace(*args, **kwargs).lower(lowering_platforms=("cuda",))
        if "custom_call @mosaic_gpu" in lowered.as_text():
            first = _pallas_arch.setdefault("first", chip.arch)
            if chip.arch != first:
                raise UserError(
                    f"This process has compiled Pallas kernels for {first} and would take {chip.arch} for the same:"
                    " compile for it in another process."
                )
        return lowered.compile(compiler_options=compiler_options)
