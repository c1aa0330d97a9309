"""Directories that are gone on with: what is kept of them, whatever became of their files meanwhile."""

import json
import logging
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures.unfinished import IDENTITY, TENSORS, Stopped, contents, write

from qlora_jax.checkpoints import journal as journal_module
from qlora_jax.checkpoints.journal import Journal, fingerprint, resumable_directory
from qlora_jax.checkpoints.tensor_files import TensorFiles
from qlora_jax.errors import UserError
from qlora_jax.files import JOURNAL_NAME, damaged_file, file_sizes


@pytest.fixture(scope="module", params=[False, True], ids=["safetensors", "aligned"])
def aligned(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def expected(aligned: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    assert write(out, aligned=aligned) == list(range(len(TENSORS)))
    assert JOURNAL_NAME not in contents(out)
    assert damaged_file(out) is None
    return contents(out)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def staging(out: Path) -> Path:
    return out.with_name(".out.tmp")


@pytest.mark.parametrize("stops", [[1], [5], [11], [12], [2, 2, 7], [0, 12, 12]])
def test_goes_on_after_the_last_whole_tensor(
    out: Path, staging: Path, stops: list[int], expected: Any, aligned: bool, caplog: pytest.LogCaptureFixture
):
    for stop in stops:
        with pytest.raises(Stopped):
            write(out, stop, aligned=aligned)
        assert not out.exists()
        assert staging.exists() == (stop > 0)  # nothing is recorded: nothing is kept
        assert (f"what was written is kept in {staging}: run the same command again" in caplog.text) == (stop > 0)
    assert write(out, aligned=aligned) == list(range(stops[-1], len(TENSORS)))
    assert contents(out) == expected
    assert os.listdir(out.parent) == ["out"]


def flip(file: Path, at: int) -> None:
    changed = bytearray(file.read_bytes())
    changed[at] ^= 4
    file.write_bytes(changed)


def lines(staging: Path, change: Callable[[list[bytes]], Any]) -> None:
    """Change the list of a journal's lines in place."""
    file = staging / JOURNAL_NAME
    found = file.read_bytes().splitlines(keepends=True)
    change(found)
    file.write_bytes(b"".join(found))


def place(staging: Path, tensor: int) -> tuple[Path, int]:
    """File and offset of a tensor's last array."""
    record = json.loads((staging / JOURNAL_NAME).read_bytes().splitlines()[tensor + 1][9:])
    piece = record["pieces"][-1]
    return staging / f".tensors-{piece['file']:05d}", piece["offset"]


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"torn")


def linked(path: Path) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


DAMAGES: dict[str, tuple[Callable[[Path], Any], int]] = {
    "nothing": (lambda staging: None, 8),
    "torn tail": (lambda staging: longer(place(staging, 7)[0]), 8),
    "last byte cut": (lambda staging: os.truncate(*place(staging, 7)), 7),
    "cut in the middle": (lambda staging: os.truncate(*place(staging, 4)), 4),
    "flipped byte": (lambda staging: flip(*place(staging, 5)), 5),
    "flipped byte of the first": (lambda staging: flip(*place(staging, 0)), 0),
    "file gone": (lambda staging: place(staging, 3)[0].unlink(), -1),
    "a link": (lambda staging: linked(place(staging, 0)[0]), 0),
    "other files": (lambda staging: (staging / ".README.md.tmp").mkdir(), 8),
    "journal cut in a line": (lambda staging: os.truncate(staging / JOURNAL_NAME, 900), -1),
    "line flipped": (lambda staging: lines(staging, lambda ls: ls.__setitem__(6, ls[6].replace(b"a", b"b", 1))), 5),
    "line twice": (lambda staging: lines(staging, lambda ls: ls.insert(4, ls[4])), 4),
    "lines exchanged": (lambda staging: lines(staging, lambda ls: ls.insert(3, ls.pop(4))), 2),
    "line gone": (lambda staging: lines(staging, lambda ls: ls.pop(7)), 6),
    "journal gone": (lambda staging: (staging / JOURNAL_NAME).unlink(), 0),
    "journal of zeros": (lambda staging: (staging / JOURNAL_NAME).write_bytes(bytes(3000)), 0),
    "journal a directory": (lambda staging: [(staging / JOURNAL_NAME).unlink(), (staging / JOURNAL_NAME).mkdir()], 0),
    "journal a link": (lambda staging: linked(staging / JOURNAL_NAME), 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(
    out: Path, staging: Path, damage: str, expected: Any, aligned: bool, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(Stopped):
        write(out, 8, aligned=aligned)
    change, kept = DAMAGES[damage]
    change(staging)
    caplog.clear()
    caplog.set_level(logging.INFO)
    done = write(out, aligned=aligned)
    assert contents(out) == expected
    assert os.listdir(out.parent) == ["out"]
    assert kept == -1 or done[0] == kept
    anew = damage.startswith("journal ") and damage != "journal cut in a line"
    assert ("has no journal that can be read" in caplog.text) == anew


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def test_another_work_starts_anew(out: Path, expected: Any, aligned: bool, caplog: pytest.LogCaptureFixture):
    for change in ({"adapter": {"a": "c"}}, {"sizes": [1, 3]}, {"more": None}):
        with pytest.raises(Stopped):
            write(out, 5, IDENTITY | change, aligned=aligned)
    assert "differs in adapter (a), sizes; it is deleted" in warnings(caplog)
    assert write(out, aligned=aligned)[0] == 0
    assert "differs in more, sizes; it is deleted" in warnings(caplog)
    assert contents(out) == expected


def test_a_full_disk_keeps_what_is_recorded(out: Path, staging: Path, expected: Any, aligned: bool):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    first_tensors = 1000 if aligned else 4300  # behind room for the header
    for limit, said in (
        (20, "choose another output directory"),
        (first_tensors, "run the same command again to go on"),
    ):
        # A limit on the size of files is the full disk that a test can have.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match=rf"out cannot be written: .*; free some space (and|or) {said}\.$"):
                write(out, aligned=aligned)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert staging.exists() == ("again" in said)
    assert write(out, aligned=aligned)[0] > 0
    assert contents(out) == expected


def test_a_disk_that_tells_only_at_the_end(out: Path, monkeypatch: pytest.MonkeyPatch, expected: Any, aligned: bool):
    def full(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.files, "flush_all_to_disk", full)
        with pytest.raises(UserError, match=r"the disk is full; free some space and run the same command again"):
            write(out, aligned=aligned)
    assert not out.exists()
    assert write(out, aligned=aligned) == []
    assert contents(out) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(39, "Directory not empty"), PermissionError(13, "no")])
@pytest.mark.parametrize("where", ["flush_all_to_disk", "the renaming", "the second renaming"])
def test_nothing_is_lost_in_the_last_moment(
    out: Path, staging: Path, error: BaseException, where: str, expected: Any, aligned: bool, monkeypatch: Any
):
    replace = where == "the second renaming"
    if replace:
        out.mkdir()
        (out / "earlier").touch()
    rename = os.rename

    def failing(*paths: Path) -> None:
        if replace and paths[0] == out:
            rename(*paths)
            return
        if paths[0] in (staging, (staging,)):
            raise error
        rename(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(*((journal_module.files, where) if where == "flush_all_to_disk" else (os, "rename")), failing)
        with pytest.raises((KeyboardInterrupt, UserError)) as raised:
            write(out, aligned=aligned, replace=replace)
    assert isinstance(raised.value, KeyboardInterrupt) or "run the same command again to go on" in str(raised.value)
    assert sorted(os.listdir(out.parent)) == [".out.tmp", *(["out"] if replace else [])]
    assert not replace or os.listdir(out) == ["earlier"]
    assert write(out, aligned=aligned, replace=replace) == []
    assert contents(out) == expected
    assert os.listdir(out.parent) == ["out"]


def test_a_finished_directory_may_still_have_its_journal(
    out: Path, expected: Any, aligned: bool, monkeypatch: pytest.MonkeyPatch
):
    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            write(out, aligned=aligned)
    assert contents(out).keys() - expected.keys() == {JOURNAL_NAME}
    assert damaged_file(out) is None
    assert file_sizes(out) == {name: len(data) for name, data in expected.items()}
    assert write(out, aligned=aligned, replace=True) == list(range(len(TENSORS)))
    assert contents(out) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("call", ["pathlib.Path.read_bytes", "os.truncate"])
def test_a_journal_that_cannot_be_read_is_left_alone(
    out: Path, staging: Path, call: str, error: BaseException, expected: Any, aligned: bool, monkeypatch: Any
):
    with pytest.raises(Stopped):
        write(out, 8, aligned=aligned)
    before = contents(staging)

    def failing(*args: Any, **options: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(call, failing)
        with pytest.raises((KeyboardInterrupt, UserError)) as raised:
            write(out, aligned=aligned)
    said = f"{staging / JOURNAL_NAME} cannot be used: Input/output error; run the same command again once the cause"
    assert isinstance(raised.value, KeyboardInterrupt) or said in str(raised.value)
    assert contents(staging) == before
    assert write(out, aligned=aligned)[0] == 8
    assert contents(out) == expected


def test_a_journal_that_cannot_be_begun_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "_append", full)
    with pytest.raises(UserError, match="the disk is full; free some space or choose another output directory"):
        write(out)
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(5, "Input/output error"), "run the same command again to go on"),
        (KeyboardInterrupt(), "run the same command again to go on"),
        (UserError("tensor a does not fit float16."), "run the same command again once the cause is mended"),
        (ValueError("a fault of the program"), "run the same command again once the cause is mended"),
    ],
)
def test_advice_is_of_use(
    out: Path, staging: Path, error: BaseException, advice: str, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        with resumable_directory(out, IDENTITY) as journal:
            journal.add("a record")
            raise error
    assert f"what was written is kept in {staging}: {advice}, or delete it" in warnings(caplog)


def test_a_directory_in_use_is_refused_at_once(out: Path):
    with (
        pytest.raises(UserError, match="another process is writing"),
        resumable_directory(out, IDENTITY) as journal,
    ):
        journal.add("a record")
        write(out)
    assert (out.with_name(".out.tmp") / JOURNAL_NAME).is_file()


def test_room_is_asked_for_what_is_missing(out: Path, monkeypatch: pytest.MonkeyPatch, aligned: bool):
    with pytest.raises(Stopped):
        write(out, 8, aligned=aligned)
    asked = []
    monkeypatch.setattr("qlora_jax.files.check_room", lambda directory, needed, *said: asked.append((needed, said)))
    with resumable_directory(out, IDENTITY) as journal:
        tensors = TensorFiles(journal.directory, lambda count: [], journal)
        held = sum(file.stat().st_size for file in journal.directory.glob(".tensors-*"))
        tensors.check_room(100_000)
    assert asked == [(100_000 - held, (f"the disk of {out.parent}", "the rest of the export"))]


def test_journal_forgets_what_follows_a_line_that_is_not_whole(tmp_path: Path):
    journal = Journal(tmp_path, IDENTITY)
    records = [{"i": i, "text": "\u2028\r\n" * i} for i in range(4)]
    for record in records:
        journal.add(record)
    whole = (tmp_path / JOURNAL_NAME).read_bytes()
    assert Journal(tmp_path, IDENTITY).records == records
    ends = [0]
    for line in whole.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    for cut in range(ends[2], len(whole)):
        (tmp_path / JOURNAL_NAME).write_bytes(whole[:cut])
        journal = Journal(tmp_path, IDENTITY)
        count = sum(end <= cut for end in ends[2:])
        assert journal.records == records[:count]
        for record in records[count:]:
            journal.add(record)
        assert (tmp_path / JOURNAL_NAME).read_bytes() == whole
    journal.keep(2, [])
    assert journal.records == Journal(tmp_path, IDENTITY).records == records[:2]
    journal.add(records[2])
    assert Journal(tmp_path, IDENTITY).records == records[:3]


def test_every_bit_of_a_journal_counts(tmp_path: Path):
    journal = Journal(tmp_path, IDENTITY)
    for i in range(3):
        journal.add({"i": i})
    file = tmp_path / JOURNAL_NAME
    whole, rng = file.read_bytes(), random.Random(0)
    for at in range(len(b"".join(whole.splitlines(keepends=True)[:2])), len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        assert Journal(tmp_path, IDENTITY).records in ([{"i": 0}], [{"i": 0}, {"i": 1}])


def test_models_are_told_apart_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    model.mkdir()
    for file in (model / "config.json", model / "hf_quant_config.json", model / "tokenizer.json", elsewhere):
        file.write_text("a")
    before = fingerprint(model, {elsewhere, model / "config.json"})
    assert before == fingerprint(model, [elsewhere])
    (model / ".out.tmp").mkdir()  # an output in the model's own directory
    for name in ("README.md", ".DS_Store", ".gitattributes", "training_args.bin"):
        (model / name).write_text("anything")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for same in (model, Path("model"), tmp_path / "link"):
        assert before == fingerprint(same, [elsewhere])
    assert before != fingerprint(model)
    for file in (*(model / name for name in ("config.json", "hf_quant_config.json", "tokenizer.json")), elsewhere):
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert fingerprint(model, [elsewhere]) != before
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert fingerprint(model, [elsewhere]) == before
        file.write_text("ab")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert fingerprint(model, [elsewhere]) != before
        file.write_text("a")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(elsewhere)["files"].keys() == {str(elsewhere)}
