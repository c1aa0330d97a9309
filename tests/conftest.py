"""Run-time shape checks for every test: the package is imported through jaxtyping with beartype."""

import os
from typing import Any

import pytest
from jaxtyping import install_import_hook

# Must come before the first import of the package.
_hook = install_import_hook("qlora_jax", "beartype.beartype")

from qlora_jax.environment import keep_off_cuda_without_a_gpu  # noqa: E402

# Before any test loads JAX.
keep_off_cuda_without_a_gpu()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a CUDA GPU, `gpu` tests are reported as skipped, never as passed."""
    import jax

    if any(device.platform == "gpu" for device in jax.devices()):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def launches(request: pytest.FixtureRequest) -> Any:
    """Of every `ptx_kernels.Case` that a selected test has as `case`: they are cheap to compile only all at once."""
    from fixtures.simulated_kernels import Case, compile_all

    params = [getattr(getattr(item, "callspec", None), "params", {}) for item in request.session.items]
    return compile_all(found["case"] for found in params if isinstance(found.get("case"), Case))


@pytest.fixture
def launch(case: Any, launches: Any) -> Any:
    """The compiled kernel of a test's `case`."""
    found = launches[case]
    assert not isinstance(found, str), found
    return found


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must pass without a model hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
