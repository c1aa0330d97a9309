"""The process's surroundings: settings that command lines make before JAX is loaded, and a quiet import."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from qlora_jax.device_memory import CONTEXT_BYTES, PINNED_LIMIT_VARIABLE, RESERVE_FRACTION, pinned_share

_KEPT_PROGRAMS_BYTES = 2 * 2**30


def keep_off_cuda_without_a_gpu() -> None:
    """Let JAX, if it is not loaded yet, run on the CPU where its CUDA plugin is installed but no GPU is.

    `[plan]` installs the plugin to compile for GPUs that are elsewhere. It otherwise prints a traceback
    about libraries that this machine need not have, and is then lost. Child processes inherit the setting.
    """
    # /dev/dxg: Windows' subsystem for Linux.
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if sys.platform == "linux" and not has_gpu and importlib.util.find_spec("jax_plugins") is not None:
        plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
        if any(importlib.util.find_spec(plugin) is not None for plugin in plugins):
            os.environ.setdefault("JAX_PLATFORMS", "cpu")


def let_jax_fill_the_gpu() -> None:
    """Let JAX, if it is not loaded yet, take a GPU's memory but for what the planner sets aside.

    Of itself it takes three quarters, and a run that was planned to fit would not.
    """
    variable = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    if variable in os.environ or shutil.which("nvidia-smi") is None:
        return
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        smallest = min(int(mebibytes) for mebibytes in listed.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):  # a driver that does not answer has no GPU to fill
        return
    os.environ[variable] = f"{1 - CONTEXT_BYTES / smallest - RESERVE_FRACTION / 2:.3f}"


def let_jax_pin_the_hosts_memory() -> None:
    """Let JAX, if it is not loaded yet, pin as much host memory as the host can spare.

    Of itself it stops at 64 GiB, and offloaded activations of long sequences take more; on a smaller host the limit
    makes an allocation fail that would otherwise end in the process being killed.
    """
    os.environ.setdefault(PINNED_LIMIT_VARIABLE, str(pinned_share()))


def user_cache() -> Path:
    """Return this program's directory among the user's caches; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-jax"


def keep_compiled_programs(directory: str = "auto", *, all_of_them: bool = False) -> None:
    """Let JAX, if it is not loaded yet, keep what it compiles, so that a run is resumed in seconds.

    JAX knows a program by its contents, compiler and device, and compiles again where one cannot be read. In this
    program's own directory it keeps 2 GiB, those that were used last.

    Args:
        directory: "none" for no such directory; "auto" for the one that JAX's own variable names, else the user's
            cache.
        all_of_them: also those that compile in less than a second, which JAX leaves out.
    """
    if all_of_them:
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    if directory == "none":
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        return
    if directory != "auto":
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(directory).expanduser().absolute())
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(user_cache() / "programs")
        # Of our own directory only: JAX deletes whatever programs it finds beyond the limit.
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_KEPT_PROGRAMS_BYTES))


def multiplies_bfloat16(cpuinfo: str | None = None) -> bool:
    """True if this machine's processor has instructions that multiply bfloat16 (AVX-512 BF16, AMX).

    Args:
        cpuinfo: contents of Linux's /proc/cpuinfo; by default this machine's. Elsewhere nothing is known: False.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return False
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.partition(":")[2].split())


def import_transformers() -> ModuleType:
    """Import transformers without its advice to install PyTorch, which would alarm people who do not need it."""
    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(variable)
    os.environ.setdefault(variable, "1")
    try:
        return importlib.import_module("transformers")
    finally:
        if before is None:
            del os.environ[variable]
