"""Run-time shape checks for every test: the package is imported through jaxtyping with beartype."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# The CUDA plugin, which the tests compile with, otherwise complains in every process of the libraries and devices that
# a machine without a GPU has not; children inherit it. /dev/dxg: Windows' subsystem for Linux.
if not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Must come before the first import of the package.
_hook = install_import_hook("qlora_jax", "beartype.beartype")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a CUDA GPU, `gpu` tests are reported as skipped, never as passed."""
    import jax

    if any(device.platform == "gpu" for device in jax.devices()):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must pass without a model hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
