"""Files and directories that are whole or absent, and whose contents are checked when they are read again.

They are written under a temporary name, flushed to disk, then renamed. The temporary name of `name` is `.name.tmp`
beside it. It is locked while it is written, and the lock ends with its process: what a killed process left behind is
cleared by the next one to write there, or kept by one that goes on with it (`qlora_jax.checkpoints.journal`).
"""

import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import reprlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError

CHECKSUMS_NAME = "SHA256SUMS"
"""File with the digests of a directory's other files, as `sha256sum --check` reads it."""

JOURNAL_NAME = ".journal"
"""File in a temporary directory that says how far it is; a finished directory that still has it is as good without."""

LOCK_NAME = ".qlora-jax.lock"
"""File in a directory that says which process is at work there."""

_DIGEST = "sha256"
_CHECKSUM_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^\n]+)")
_MOST_CHECKSUMS_BYTES = 2**24


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the temporary name of a file; what is written there takes the name `path` when the block ends.

    Nothing changes at `path`, and the temporary file is removed, if the block raises. Two processes that write the
    same file take turns.

    Raises:
        OSError: the file cannot be written (see `write_errors`).
    """
    if path.exists() and not path.is_file():  # a device would be replaced by a file
        raise OSError(errno.EINVAL, "it is a directory" if path.is_dir() else "it is no regular file", str(path))
    temporary = _temporary_name(path)
    with _locked(temporary, os.O_CREAT | os.O_RDWR, wait=True):
        try:
            os.truncate(temporary, 0)
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    flush_to_disk(path.parent)


def user_path(given: str | Path) -> Path:
    """Expand `~` in a path that a person gave; nothing need be there.

    Raises:
        UserError: no file can have that path, or it may not be looked at.
    """
    try:
        path = Path(given).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, RuntimeError, ValueError) as error:  # too long or forbidden, no such user, a null character
        raise UserError(f"the path {reprlib.repr(str(given))} cannot be used: {reason(error).rstrip('.')}.") from None
    return path


def write_json(path: Path, value: Any, *, indent: int = 2) -> None:
    """Write a JSON file with `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


@contextmanager
def staged_directory(path: Path, *, replace: bool = False, keep: Callable[[], bool] | None = None) -> Iterator[Path]:
    """Yield a temporary directory; it takes the name `path` when the block ends.

    Nothing changes at `path` if the block raises, or if the temporary directory cannot be given the name.

    Args:
        path: directory to make; it may exist if it is empty. Of a symbolic link, what it points to.
        replace: allow it to exist otherwise too; it is deleted once the new one is complete.
        keep: go on with what an earlier process left in the temporary directory. It is called when the work fails, up
            to the renaming, and tells if what is there shall stay. By default the directory is empty at first, and
            removed if the work fails.

    Raises:
        UserError: another process is writing it, or it is a mount point.
        OSError: it cannot be written (see `write_errors`).
    """
    path = final_directory(path)
    staging, replaced = _temporary_name(path), path.with_name(f".{path.name}.replaced")
    if staging.is_symlink() or staging.is_file():
        staging.unlink()
    staging.mkdir(parents=True, exist_ok=True)
    with _locked(staging, os.O_RDONLY, wait=False):
        try:
            if keep is None:
                empty(staging)
            yield staging
            flush_all_to_disk(staging)
            if replace and path.exists():
                remove(replaced)
                os.rename(path, replaced)
            os.rename(staging, path)
        except BaseException:
            # This process had moved it, or one that was killed.
            if os.path.lexists(replaced) and not os.path.lexists(path):
                with suppress(OSError):
                    os.rename(replaced, path)
            if keep is None or not keep():
                shutil.rmtree(staging, ignore_errors=True)
            with suppress(OSError):  # something is left in it
                staging.rmdir()
            raise
    flush_to_disk(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def final_directory(path: Path) -> Path:
    """Return what `staged_directory` makes for a path: the path itself, or what a symbolic link points to.

    Raises:
        UserError: it is a mount point, whose name no other directory can take.
    """
    final = path.resolve()
    if os.path.ismount(final):
        raise UserError(f"{path} is a mount point, which cannot be replaced; give a directory in it.")
    return final


def check_can_make(path: Path, hint: str) -> None:
    """Refuse a directory or file that could not be made, whose parents may be missing too; nothing is left behind.

    Raises:
        UserError: `path` cannot be written; ends with `hint`.
    """
    parents = final_directory(path).parents
    there = next(parent for parent in parents if parent.exists())
    with write_errors(path, hint), tempfile.TemporaryDirectory(prefix=".", dir=there):
        pass


def empty(directory: Path, *, keep: Collection[str] = ()) -> None:
    """Delete everything in a directory but the entries of these names."""
    for entry in list(directory.iterdir()):
        if entry.name not in keep:
            remove(entry)


def remove(path: Path) -> None:
    """Delete a file, a symbolic link or a directory with all it holds, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all_to_disk(directory: Path) -> None:
    """Wait until a directory and everything below it are on disk."""
    for file in (directory, *directory.rglob("*")):
        flush_to_disk(file)


@contextmanager
def write_errors(path: Path, hint: str, *, orbax: bool = False) -> Iterator[None]:
    """Turn a failure to write `path` into one sentence.

    Args:
        path: named in the sentence.
        hint: its end: what to do.
        orbax: catch ValueError and RuntimeError too, by which orbax and tensorstore report a failing disk.

    Raises:
        UserError: in place of OSError.
    """
    errors = (OSError, ValueError, RuntimeError) if orbax else (OSError,)
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; {hint}.") from error


def reason(error: BaseException) -> str:
    """Say in one phrase why reading or writing failed.

    Of tensorstore's errors that is the first line, without the pages of settings that follow; a full disk, which it
    reports with any type of exception, is named as such.
    """
    text = str(error)
    if "No space left" in text or "RESOURCE_EXHAUSTED" in text:
        return "the disk is full"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0].partition(" [tensorstore_spec")[0]


def file_sizes(directory: Path) -> dict[str, int]:
    """{path within `directory`: bytes} of every file below it but a journal, to be kept for `resized_file`."""
    found = {str(file.relative_to(directory)): file for file in directory.rglob("*") if file.is_file()}
    return {name: file.stat().st_size for name, file in found.items() if name != JOURNAL_NAME}


def resized_file(directory: Path, sizes: Mapping[str, int]) -> str | None:
    """Name the first file that is missing or has another size than `file_sizes` found, or None.

    tensorstore would report such a file with a traceback for each of its arrays.
    """
    for name, size in sizes.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            return name
    return None


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def checksums(files: Mapping[str, Path]) -> str:
    """Make the contents of a SHA256SUMS from {name within its directory: where the file is now}."""
    return "".join(f"{file_digest(file)}  {name}\n" for name, file in files.items())


def write_checksums(directory: Path) -> None:
    """Write SHA256SUMS: the digest of every other file below a directory but a journal."""
    text = checksums({name: directory / name for name in _files_below(directory)})
    (directory / CHECKSUMS_NAME).write_text(text, encoding="utf-8")


def damaged_file(directory: Path, names: Sequence[str] | None = None) -> str | None:
    """Name the first file below a directory that is not as its SHA256SUMS says; None if there is none.

    Args:
        directory: with a SHA256SUMS, of `write_checksums` or of `sha256sum`.
        names: files to compare; by default all, and that no other is there but a journal. No other file is opened.

    Raises:
        OSError: a file is there and cannot be read.
    """
    sums = directory / CHECKSUMS_NAME
    if not sums.is_file() or sums.stat().st_size > _MOST_CHECKSUMS_BYTES:
        return CHECKSUMS_NAME
    lines = sums.read_bytes().decode(errors="replace").removesuffix("\n").split("\n")
    matches = [_CHECKSUM_LINE.fullmatch(line) for line in lines]
    if not all(matches):
        return CHECKSUMS_NAME
    listed = {match["name"]: match["digest"] for match in matches if match}
    wrong = set(listed) ^ set(_files_below(directory)) if names is None else set(names) - set(listed)
    if wrong:
        return min(wrong)
    for name in sorted(listed if names is None else names):
        if not (directory / name).is_file() or file_digest(directory / name) != listed[name]:
            return name
    return None


def _files_below(directory: Path) -> list[str]:
    names = (str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
    return sorted(name for name in names if name not in (CHECKSUMS_NAME, JOURNAL_NAME))


def write_checked_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a digest of its contents, which `read_checked_json` compares."""
    write_json(path, {**value, _DIGEST: _json_digest(value)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """Read what `write_checked_json` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object, or not with the contents that were written; says so of "it", the file.
    """
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:  # brackets in place of its contents
        value = None
    return checked_contents(value)


def checked_contents(value: Any) -> dict[str, Any]:
    """Return what was given to `write_checked_json`, from what was parsed of the file; ValueError as there."""
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    if _DIGEST not in value:
        raise ValueError(f"it has no {_DIGEST}: an earlier version of qlora-jax, or another program, wrote it")
    contents = {name: field for name, field in value.items() if name != _DIGEST}
    if value[_DIGEST] != _json_digest(contents):
        raise ValueError(f"its contents do not match its {_DIGEST}")
    return contents


def _json_digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_room(directory: Path, needed: int, disk: str, what: str) -> None:
    """Refuse a directory on whose disk something has no room.

    Args:
        directory: there already.
        needed: bytes.
        disk: the disk, in messages.
        what: takes them, in messages.

    Raises:
        UserError: says what is needed and what is there.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{what} takes {needed / 1e6:,.1f} MB or more and {disk} has {free / 1e6:,.1f} MB left; free some space or "
            "give another directory."
        )


@contextmanager
def exclusive(directory: Path, name: str) -> Iterator[None]:
    """Let no other process into a directory during the block; its lock ends with this process, however that ends.

    The directory is made if there is none, and removed again if nothing was written.

    Args:
        directory: may be any but a file.
        name: of the directory, in messages.

    Raises:
        UserError: another process is in it (names it), or it cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{name} is a file; give a directory.")
    lock, created = directory / LOCK_NAME, not directory.exists()
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    owner = f"process {os.getpid()} on {socket.gethostname()} since {since}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, wait=False)
        os.truncate(descriptor, 0)
        os.write(descriptor, owner.encode())
    except BlockingIOError:
        raise UserError(f"{name} is in use by {_owner(lock)}; wait for it or give another directory.") from None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UserError(f"{name} is on a file system without locks; give a directory on another.") from error
        raise UserError(f"{name} cannot be written: {reason(error)}.") from error
    try:
        yield
    finally:
        try:
            with suppress(OSError):  # the directory may be gone, and another process may be about to come in
                lock.unlink(missing_ok=True)
                if created:
                    directory.rmdir()
        finally:
            os.close(descriptor)


def _owner(lock: Path) -> str:
    """Name the process that holds a lock as it names itself, if it has come to that."""
    try:
        return lock.read_text(encoding="utf-8", errors="replace") or "another process"
    except OSError:
        return "another process"


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def _locked(temporary: Path, flags: int, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a temporary file or directory; without `wait`, UserError if another process holds it."""
    try:
        descriptor = _open_locked(temporary, flags, wait)
    except BlockingIOError:
        path = temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp"))
        raise UserError(f"another process is writing {path}; wait for it or choose another directory.") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _open_locked(path: Path, flags: int, wait: bool) -> int:
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have renamed what was opened: the name then stands for another file, or for none.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not wait:
            raise BlockingIOError
