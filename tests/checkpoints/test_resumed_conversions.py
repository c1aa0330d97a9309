"""Conversions that were interrupted and given again: they go on after the last whole part."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fixtures.checkpoint_helpers import hf_shapes, random_tensors, write_hf
from fixtures.tiny_configs import BIASED_LLAMA

from qlora_jax.checkpoints import conversion
from qlora_jax.checkpoints.conversion import Conversion, convert
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.manifest import MANIFEST_NAME, read_manifest
from qlora_jax.checkpoints.safetensors_source import SafetensorsSource
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.errors import UserError
from qlora_jax.files import JOURNAL_NAME, read_checked_json
from qlora_jax.quantization import QuantizationConfig

TENSORS = len(hf_shapes(BIASED_LLAMA))
NF4 = QuantizationConfig("nf4", 64, True)


@pytest.fixture(scope="module", autouse=True)
def parts_are_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_PART_BYTES", 15_000)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("source") / "hf", BIASED_LLAMA, random_tensors(BIASED_LLAMA), shards=2)


@pytest.fixture(scope="module")
def left_alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return convert(source, tmp_path_factory.mktemp("left-alone") / "out", NF4, "bfloat16")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    pieces = SafetensorsSource.pieces
    noted = lambda self, name, *more: (found.append(name), pieces(self, name, *more))[1]  # noqa: E731
    monkeypatch.setattr(SafetensorsSource, "pieces", noted)
    return found


def interrupt(source: Path, out: Path, after: int, quantization: QuantizationConfig = NF4) -> None:
    """Convert until so many tensors are quantised."""

    def progress(done: int, total: int) -> None:
        assert total == TENSORS
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, quantization, "bfloat16", progress=progress)


def described(directory: Path) -> dict[str, Any]:
    """The manifest without the digests of files, which differ in names and times that orbax gives them."""
    manifest = read_checked_json(directory / MANIFEST_NAME)
    for part in manifest["parts"]:
        del part["files"], part["digests"]
    return manifest


def recorded(staging: Path) -> list[dict[str, Any]]:
    return [json.loads(line[9:]) for line in (staging / JOURNAL_NAME).read_bytes().splitlines()[1:]]


def test_goes_on_after_the_last_whole_part(
    source: Path, tmp_path: Path, left_alone: Conversion, reads: list[str], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    out, staging = tmp_path / "out", tmp_path / ".out.tmp"
    kept: dict[str, int] = {}
    done = 0
    for point in (TENSORS // 4, TENSORS // 2, TENSORS - 1):
        reads.clear()
        interrupt(source, out, point)
        assert point - done <= len(reads) <= point - done + 2  # threads read ahead
        if done:
            assert f"continuing: {done} of {TENSORS} tensors were written before" in caplog.text
        records = recorded(staging)
        done = sum(tensor["layers"] for record in records for tensor in record["part"]["tensors"])
        assert 0 < done <= point
        assert {name: os.stat(staging / name).st_ino for name in kept} == kept  # not written again
        kept = {record["part"]["name"]: os.stat(staging / record["part"]["name"]).st_ino for record in records}
        for path in (staging, *staging.iterdir()):
            with pytest.raises(UserError):
                open_source(path)
            with pytest.raises(UserError):
                load_base(path, quantization=NF4, dtype="bfloat16")
    reads.clear()
    result = convert(source, out, NF4, "bfloat16")
    assert len(reads) == TENSORS - done
    assert {name: os.stat(out / name).st_ino for name in kept} == kept
    assert described(out) == described(left_alone.directory)
    assert result.bytes_by_class == left_alone.bytes_by_class
    assert {file.name for file in out.iterdir()} == {file.name for file in left_alone.directory.iterdir()}
    assert len(reads) == len(set(reads))
    (out / JOURNAL_NAME).touch()  # killed before it was deleted
    loaded = load_base(out, quantization=NF4, dtype="bfloat16")
    assert loaded.digest == load_base(left_alone.directory, quantization=NF4, dtype="bfloat16").digest
    assert os.listdir(tmp_path) == ["out"]


def largest_file(part: Path) -> Path:
    return max((file for file in part.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file: Path) -> None:
    changed = bytearray(file.read_bytes())
    changed[len(changed) // 2] ^= 1
    file.write_bytes(changed)


DAMAGES: dict[str, tuple[Callable[[Path], Any], int]] = {
    "half a part": (lambda staging: shutil.copytree(staging / "part-00000", staging / "part-00009"), 4),
    "flipped byte": (lambda staging: flip(largest_file(staging / "part-00002")), 2),
    "cut": (lambda staging: os.truncate(largest_file(staging / "part-00001"), 9), 1),
    "another file": (lambda staging: (staging / "part-00003" / "x").touch(), 3),
    "part gone": (lambda staging: shutil.rmtree(staging / "part-00000"), 0),
    "journal's last line cut": (
        lambda staging: os.truncate(staging / JOURNAL_NAME, (staging / JOURNAL_NAME).stat().st_size - 1),
        3,
    ),
    "journal gone": (lambda staging: (staging / JOURNAL_NAME).unlink(), 0),
}


# The tests of journals have the same damages, and more.
OFTEN = ("flipped byte", "half a part")


@pytest.mark.parametrize("damage", [pytest.param(d, marks=() if d in OFTEN else pytest.mark.e2e) for d in DAMAGES])
def test_damage_is_found(source: Path, tmp_path: Path, left_alone: Conversion, damage: str, reads: list[str]):
    out, staging = tmp_path / "out", tmp_path / ".out.tmp"
    parts = read_manifest(left_alone.directory).parts
    layers = [sum(tensor.layers for tensor in part.tensors) for part in parts]
    interrupt(source, out, sum(layers[:4]) + 1)
    assert len(recorded(staging)) == 4
    change, kept = DAMAGES[damage]
    change(staging)
    reads.clear()
    convert(source, out, NF4, "bfloat16")
    assert len(reads) == TENSORS - sum(layers[:kept])
    assert described(out) == described(left_alone.directory)
    load_base(out, quantization=NF4, dtype="bfloat16")  # which compares all digests
    assert {file.name for file in out.iterdir()} == {file.name for file in left_alone.directory.iterdir()}


def test_another_conversion_starts_anew(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    out = tmp_path / "out"
    interrupt(source, out, TENSORS // 2)
    interrupt(source, out, TENSORS // 2, QuantizationConfig("fp4"))
    assert f"starting anew: what is in {tmp_path}/.out.tmp differs in quantization" in caplog.text
    copied = shutil.copytree(source, tmp_path / "copied")
    convert(copied, out, QuantizationConfig("fp4"), "bfloat16")
    assert f"starting anew: what is in {tmp_path}/.out.tmp differs in source" in caplog.text
    assert load_base(out, quantization=QuantizationConfig("fp4"), dtype="bfloat16")


def test_a_full_disk_is_gone_on_from(
    source: Path, tmp_path: Path, left_alone: Conversion, caplog: pytest.LogCaptureFixture, monkeypatch: Any
):
    caplog.set_level(logging.INFO)
    out = tmp_path / "out"
    save = conversion._save_tree

    def fills_up(path: Path, tree: Any) -> None:
        if path.name == "part-00003":
            path.with_name("part-00003.orbax-checkpoint-tmp").mkdir()
            raise OSError(28, "No space left on device")
        save(path, tree)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_save_tree", fills_up)
        with pytest.raises(
            UserError, match=r"part-00003 cannot be written: the disk is full; free some space and run the same command"
        ):
            convert(source, out, NF4, "bfloat16")
    assert not out.exists()
    convert(source, out, NF4, "bfloat16")
    assert "continuing: " in caplog.text
    assert described(out) == described(left_alone.directory)


def test_room_is_asked_for_what_is_missing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Usage(NamedTuple):
        free: int

    out, free = tmp_path / "out", 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free))
    interrupt(source, out, TENSORS - 1)
    held = sum(sum(record["bytes"].values()) for record in recorded(tmp_path / ".out.tmp"))
    free = 1
    with pytest.raises(UserError, match=r"^the rest of the converted model takes 0\.\d MB or more and the disk of"):
        convert(source, out, NF4, "bfloat16")
    free = held // 2
    convert(source, out, NF4, "bfloat16")
    assert out.is_dir()
