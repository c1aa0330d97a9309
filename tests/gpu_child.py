"""Runs a function in a child process that can compile for GPUs, so that a compiler that aborts fails one test only.

The child sees no GPU and keeps off the compilation cache; what the function returns comes back as JSON.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
PLUGIN = importlib.util.find_spec("jax_plugins") is not None and importlib.util.find_spec("jax_plugins.xla_cuda13")
needs_plugin = pytest.mark.skipif(not PLUGIN, reason="needs JAX's CUDA plugin: pip install 'qlora-jax[plan]'")

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def call(function: str, *arguments: Any, environment: dict[str, str] | None = None, timeout: float = 300) -> Any:
    """What "module:function" returns, called in a child with JSON arguments; `module` lies in tests/ or is installed.

    `environment` adds variables, such as those that make the compiler write its intermediate results.
    """
    done = subprocess.run(
        [sys.executable, __file__, function, json.dumps(arguments)],
        env={**os.environ, **_ENVIRONMENT, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{function} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.rpartition("\n@")[2])


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))
    print("\n@" + json.dumps(result))
