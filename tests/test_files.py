"""Files that are whole or absent, whatever happens to their writer."""

import json
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qlora_jax import files
from qlora_jax.errors import UserError


def names(directory):
    return sorted(os.listdir(directory))


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path  # a rename within one file system
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_a_block_that_raises_changes_no_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyError), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_what_a_killed_process_left_is_not_in_the_file(tmp_path):
    (tmp_path / ".a.json.tmp").write_text("something longer")
    with files.atomic_write(tmp_path / "a.json") as temporary, open(temporary, "a") as stream:
        stream.write("new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert names(tmp_path) == ["a.json"]


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    files.write_json(tmp_path / "a.json", {"a": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1]}
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_writers_of_one_file_take_turns(tmp_path):
    path = tmp_path / "a"
    errors = []

    def write(letter):
        try:
            for _ in range(50):
                with files.atomic_write(path) as temporary, open(temporary, "w", buffering=1) as stream:
                    for _ in range(10):
                        stream.write(f"{letter}\n")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert path.read_text() in {f"{letter}\n" * 10 for letter in "abcd"}
    assert names(tmp_path) == ["a"]


def test_a_directory_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "out"
    with files.staged_directory(path) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "a").write_text("a")
        assert not path.exists()
    assert (path / "part" / "a").read_text() == "a"
    assert names(path.parent) == ["out"]


def test_a_block_that_raises_makes_no_directory(tmp_path):
    with pytest.raises(KeyError), files.staged_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("a")
        raise KeyError
    assert names(tmp_path) == []


def test_a_directory_is_replaced_only_if_asked_or_empty(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    with files.staged_directory(path) as staging:
        (staging / "a").write_text("first")
    with pytest.raises(OSError, match="not empty"), files.staged_directory(path) as staging:
        (staging / "a").write_text("second")
    assert (path / "a").read_text() == "first"
    with files.staged_directory(path, replace=True) as staging:
        (staging / "b").write_text("third")
    assert names(path) == ["b"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("leftover", ["directory", "file", "link"])
def test_a_directory_starts_empty_whatever_is_left_of_others(tmp_path, leftover):
    staging = tmp_path / ".out.tmp"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    if leftover == "directory":
        (staging / "part").mkdir(parents=True)
        (staging / "link").symlink_to(tmp_path / "elsewhere")
    elif leftover == "file":
        staging.touch()
    else:
        staging.symlink_to(tmp_path / "elsewhere")
    with files.staged_directory(tmp_path / "out") as made:
        assert names(made) == []
    assert names(tmp_path) == ["elsewhere", "out"]
    assert names(tmp_path / "elsewhere") == ["kept"]


def hold(path, ready, release):
    with files.staged_directory(path) as staging:
        (staging / "a").touch()
        ready.set()
        release.wait(60)


def test_a_directory_behind_a_link_is_replaced_there(tmp_path):
    path, real = tmp_path / "link", tmp_path / "disk" / "real"
    path.symlink_to(real)
    for replace in (False, True):
        with files.staged_directory(path, replace=replace) as staging:
            (staging / "file").write_text(str(replace))
        assert path.is_symlink() and (real / "file").read_text() == str(replace)
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"] and os.listdir(tmp_path / "disk") == ["real"]


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    with pytest.raises(UserError, match=r"volume is a mount point, .* give a directory in it\.$"):
        with files.staged_directory(tmp_path / "volume"):
            raise AssertionError
    assert not os.listdir(tmp_path)


def test_directories_that_cannot_be_made_are_refused_beforehand(tmp_path):
    files.check_can_make(tmp_path / "a" / "b", "choose another")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/b cannot be written: Not a directory; choose another\.$"):
        files.check_can_make(tmp_path / "file" / "b", "choose another")
    assert os.listdir(tmp_path) == ["file"]


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready, release = spawn.Event(), spawn.Event()
    child = spawn.Process(target=hold, args=(tmp_path / "out", ready, release))
    child.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(UserError, match=r"another process is writing .*/out;"),
            files.staged_directory(tmp_path / "out"),
        ):
            pass
        assert names(tmp_path / ".out.tmp") == ["a"]
    finally:
        child.kill()
        child.join()
    with files.staged_directory(tmp_path / "out") as staging:
        assert names(staging) == []
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(30, "Read-only file system", "/x"), "Read-only file system"),
        (OSError(28, "No space left on device"), "the disk is full"),
        (ValueError("RESOURCE_EXHAUSTED: writing [tensorstore_spec='{...}']"), "the disk is full"),
        (ValueError("NOT_FOUND: a.zarr [tensorstore_spec='{\n...}']\nmore"), "NOT_FOUND: a.zarr"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_failures_to_write_are_one_sentence(tmp_path, error, said):
    with pytest.raises(UserError) as caught, files.write_errors(tmp_path / "a", "free some space", orbax=True):
        raise error
    assert str(caught.value) == f"{tmp_path / 'a'} cannot be written: {said}; free some space."
    assert caught.value.__cause__ is error
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):  # defects stay visible
        with files.write_errors(tmp_path / "a", "free some space"):
            raise error


def test_a_sentence_stays_as_it_is(tmp_path):
    with pytest.raises(UserError, match=r"^already said\.$"), files.write_errors(tmp_path / "a", "free some space"):
        raise UserError("already said.")


def test_damage_is_found_by_size(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a").write_text("abc")
    (tmp_path / "b").write_text("b")
    sizes = files.file_sizes(tmp_path)
    assert sizes == {"part/a": 3, "b": 1}
    assert files.resized_file(tmp_path, sizes) is None
    (tmp_path / "part" / "a").write_text("ab")
    assert files.resized_file(tmp_path, sizes) == "part/a"
    (tmp_path / "part" / "a").unlink()
    assert files.resized_file(tmp_path, sizes) == "part/a"


def test_one_process_at_a_time(tmp_path):
    """Of twenty that start together one comes in; the others are told who is there, and go without a trace."""
    program = (
        "import sys, time, pathlib\n"
        "from qlora_jax import files\n"
        "from qlora_jax.errors import UserError\n"
        "try:\n"
        "    with files.exclusive(pathlib.Path(sys.argv[1]), 'it'):\n"
        "        print('in', flush=True); sys.stdin.read()\n"
        "except UserError as error:\n"
        "    print(error, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(20)]
    said = {process: process.stdout.readline().strip() for process in started}
    (owner,) = (process for process, line in said.items() if line == "in")
    name = (
        rf"^it is in use by (process {owner.pid} on \S+ since [\d:+ -]+|another process); wait for it or give another"
    )
    assert all(re.search(name, line) for process, line in said.items() if process is not owner)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [files.LOCK_NAME]
    # Its lock ends with it, however it ends; a directory that was made for nothing is removed.
    owner.kill()
    owner.wait()
    with files.exclusive(tmp_path / "run", "it"):
        (tmp_path / "run" / "written").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["written"]
    for process in started:
        process.communicate()
    with files.exclusive(tmp_path / "other", "it"):
        pass
    assert not (tmp_path / "other").exists()


def test_files_outside_a_directory_are_not_opened_for_its_digests(tmp_path, monkeypatch):
    """Also where a stranger's SHA256SUMS lists them."""
    opened = []
    real = files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda path: opened.append(path) or real(path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_text("x")
    outside = tmp_path / "outside"
    outside.write_text("y")
    line = f"{real(outside)}  {{}}\n"
    for name in ("../outside", str(outside), "/dev/zero"):
        (tmp_path / "a" / "SHA256SUMS").write_text(line.format(name) + f"{real(tmp_path / 'a/weights')}  weights\n")
        assert files.damaged_file(tmp_path / "a") == name
        assert files.damaged_file(tmp_path / "a", ["weights"]) is None
    assert set(opened) == {tmp_path / "a" / "weights"}
    (tmp_path / "a" / "SHA256SUMS").write_text("no digest\n")
    assert files.damaged_file(tmp_path / "a") == "SHA256SUMS"


def test_another_programs_file_behind_a_link_is_not_written(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "run" / files.LOCK_NAME).symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="cannot be written"), files.exclusive(tmp_path / "run", "it"):
        raise AssertionError
    assert (tmp_path / "theirs").read_text() == "theirs"
