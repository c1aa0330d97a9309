"""Run-time shape checks for every test: the package is imported through jaxtyping with beartype.

Compiled programs are kept in pytest's cache directory, for test processes and their children alike; `--cache-clear`
deletes them.
"""

import os
import pickle
import shutil
import signal
import sys
from collections.abc import Iterator
from typing import Any

import filelock
import pytest
from fixtures.compile_in_child import PLUGIN
from jaxtyping import install_import_hook

from qlora_jax.environment import keep_off_cuda_without_a_gpu

# Before any test loads JAX, which the import hook does with the first module it checks.
keep_off_cuda_without_a_gpu()
for _name in [name for name in sys.modules if name.partition(".")[0] == "qlora_jax"]:
    del sys.modules[_name]  # was imported without the hook
install_import_hook("qlora_jax", "beartype.beartype")

# Programs of sources that have changed are never looked up again: from this size on, the cache starts anew.
_MOST_CACHED_BYTES = 2**30


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the number of mutants that each test of tests/fuzz reads."""
    parser.addoption("--cases", type=int, default=2000, help="mutants of each format in tests marked fuzz")


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> int:
    """Mutants to read."""
    return request.config.getoption("--cases")


def pytest_configure(config: pytest.Config) -> None:
    """Let JAX, which is not loaded yet, keep what it compiles, unless the caller's environment already says where.

    JAX's key holds the program, the compiler's version and flags, and the processor. Its writes are not atomic, so that
    each worker has a directory of its own.
    """
    assert "jax" not in sys.modules, "JAX has read its settings already"
    starts_workers = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or starts_workers or not hasattr(config, "cache"):
        return
    worker = getattr(config, "workerinput", {"workerid": "main"})["workerid"]
    directory = config.cache.mkdir("jax") / worker
    directory.mkdir(exist_ok=True)
    if sum(entry.stat().st_size for entry in os.scandir(directory)) > _MOST_CACHED_BYTES:
        shutil.rmtree(directory)
        directory.mkdir()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    # Most programs of tests are small, and compiling them all the same takes longer than reading them.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Report `gpu` tests as skipped, never as passed, without a CUDA GPU, and `compile` tests without JAX's plugin."""
    import jax

    missing = {}
    if not any(device.platform == "gpu" for device in jax.devices()):
        missing["gpu"] = "needs a CUDA GPU"
    if not PLUGIN:
        missing["compile"] = "needs JAX's CUDA plugin: pip install 'qlora-jax[plan]'"
    for item in items:
        for mark, reason in missing.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of every `simulated_kernels.Case` that a selected test has as `case`: they are cheap to compile only all at once.

    Workers share the work: each compiles for the chips that no other compiles for.
    """
    from fixtures.simulated_kernels import Case, compile_all

    params = [getattr(getattr(item, "callspec", None), "params", {}) for item in request.session.items]
    cases = dict.fromkeys(found["case"] for found in params if isinstance(found.get("case"), Case))
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    chips = list(dict.fromkeys(case.chip for case in cases))
    compiled: dict[str, Any] = {}
    for timeout in (0, -1):  # whatever nobody is at first, then wait for what others are at
        for chip in (chip for chip in chips if chip not in compiled):
            path = shared / f"launches-{chip}.pickle"
            try:
                with filelock.FileLock(f"{path}.lock", timeout=timeout):
                    if not path.exists():
                        path.write_bytes(pickle.dumps(compile_all(case for case in cases if case.chip == chip)))
                    compiled[chip] = pickle.loads(path.read_bytes())
            except filelock.Timeout:
                continue
    return {case: launch for of_chip in compiled.values() for case, launch in of_chip.items()}


@pytest.fixture
def launch(case: Any, launches: Any) -> Any:
    """The compiled kernel of a test's `case`."""
    found = launches[case]
    assert not isinstance(found, str), found
    return found


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Let XLA optimise little, for modules that compile many programs of tiny models and run each a few times.

    Unless the environment sets JAX_DISABLE_MOST_OPTIMIZATIONS, with which CI also runs them as users' programs are.
    Programs that were compiled one way are not used in the other.
    """
    import jax

    if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for children
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must pass without a model hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def handlers():
    """Python's own handlers of signals, whatever the parent of this process ignores; restored afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
