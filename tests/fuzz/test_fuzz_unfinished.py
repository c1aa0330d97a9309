"""Directories of killed exports and conversions, mutated before they are gone on with: the result is the same."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.checkpoint_helpers import random_tensors, write_hf
from fixtures.finetune_helpers import make_model_with_merges
from fixtures.tiny_configs import BIASED_LLAMA
from fixtures.trained_adapters import write_adapter
from fixtures.unfinished import Stopped, contents, write
from fuzz.mutations import mutated_bytes

from qlora_jax.checkpoints import conversion
from qlora_jax.checkpoints.conversion import convert
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.exporting import ExportConfig, export
from qlora_jax.files import JOURNAL_NAME
from qlora_jax.quantization import QuantizationConfig

pytestmark = pytest.mark.fuzz


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def mutate(staging: Path, rng: random.Random) -> None:
    """Change one to three files or directories: their bytes, names, kinds, or whether they are there."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        entries = sorted(staging.rglob("*"))
        journal = staging / JOURNAL_NAME
        path = journal if rng.random() < 0.4 and journal in entries else rng.choice(entries or [staging])
        action = rng.random()
        if path == staging:
            return
        if action < 0.7 and path.is_file():
            path.write_bytes(mutated_bytes(path.read_bytes(), rng))
        elif action < 0.75 and path.is_file() and path.stat().st_size:
            os.truncate(path, rng.randrange(path.stat().st_size))
        elif action < 0.8:
            other = rng.choice(entries)
            if path.is_file() and other.is_file() and path != other:
                shutil.copyfile(other, path)
        elif action < 0.85:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif action < 0.9:
            path.rename(path.with_name(rng.choice((f"{path.name}x", ".x", "model.safetensors"))))
        elif action < 0.95:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            rng.choice((path.mkdir, path.touch, lambda path=path: path.symlink_to("/dev/zero")))()
        else:
            (path.parent / rng.choice((".journal", "export.json", ".tensors-00000", "part-00000", "x"))).touch()


def run_staged_cases(cases: int, staged: Path, go_on: Callable[[], None], check: Callable[[], None]) -> None:
    """Mutate a temporary directory, go on with it, and check what comes out; the seed of a case is its number."""
    template = staged.rename(staged.with_name("template"))
    out = staged.with_name(staged.name.removeprefix(".").removesuffix(".tmp"))
    for seed in range(cases):
        shutil.copytree(template, staged)
        mutate(staged, random.Random(seed))
        try:
            go_on()
            check()
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {str(error)[:500]}")
        assert not staged.exists(), f"seed {seed}"
        shutil.rmtree(out)


@pytest.mark.parametrize("aligned", [False, True], ids=["safetensors", "aligned"])
@pytest.mark.parametrize("stop", [7, 12], ids=["tensors", "at the end"])
def test_unfinished_tensors(cases: int, tmp_path: Path, aligned: bool, stop: int):
    write(tmp_path / "left-alone", aligned=aligned)
    expected = contents(tmp_path / "left-alone")
    out, kept = tmp_path / "out", set()
    with pytest.raises(Stopped):
        write(out, stop, aligned=aligned)

    def check() -> None:
        assert contents(out) == expected

    def go_on() -> None:
        kept.add(12 - len(write(out, aligned=aligned)))

    run_staged_cases(cases // 8, tmp_path / ".out.tmp", go_on, check)
    assert len(kept) > 5  # it is neither all refused nor all taken


@pytest.mark.parametrize("target", ["bitsandbytes", "gguf-q4_0"])
def test_unfinished_exports(cases: int, tmp_path: Path, target: str):
    model = make_model_with_merges(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", open_source(model).config, base=str(model))
    config = ExportConfig(str(adapter), str(tmp_path / "out"), to=target, max_shard_bytes=60_000)
    expected = contents(export(config).directory)
    shutil.rmtree(tmp_path / "out")

    def stop(done: int, total: int) -> None:
        if done == total - 2:
            raise Stopped

    with pytest.raises(Stopped):
        export(config, stop)

    def check() -> None:
        assert contents(tmp_path / "out") == expected

    run_staged_cases(cases // 300, tmp_path / ".out.tmp", lambda: export(config), check)


def test_unfinished_conversions(cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "_PART_BYTES", 60_000)
    source = write_hf(tmp_path / "hf", BIASED_LLAMA, random_tensors(BIASED_LLAMA))
    storage = QuantizationConfig("nf4", 64, True)
    expected = convert(source, tmp_path / "out", storage, "bfloat16")
    digest = load_base(tmp_path / "out", quantization=storage, dtype="bfloat16").digest
    shutil.rmtree(tmp_path / "out")

    def stop(done: int, total: int) -> None:
        if done == total - 2:
            raise Stopped

    def go_on() -> None:
        result = convert(source, tmp_path / "out", storage, "bfloat16")
        assert result.bytes_by_class == expected.bytes_by_class

    def check() -> None:
        assert load_base(tmp_path / "out", quantization=storage, dtype="bfloat16").digest == digest

    with pytest.raises(Stopped):
        convert(source, tmp_path / "out", storage, "bfloat16", progress=stop)
    run_staged_cases(cases // 300, tmp_path / ".out.tmp", go_on, check)
