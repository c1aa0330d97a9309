"""Directories that a killed process leaves unfinished and the same command goes on with.

They are written under the temporary name of `qlora_jax.files.staged_directory`. A journal in there says which work it
is and has a record of every piece that is whole, written after the piece. Whoever goes on compares each piece with its
record: after a loss of power the disk may have kept the record and not the piece. The journal is deleted once the
directory has its final name, so that until then whatever happens leaves what can be gone on with.
"""

import importlib.metadata
import json
import logging
import os
import stat
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_jax import files, json_text
from qlora_jax.checkpoints.manifest import MANIFEST_NAME, is_converted
from qlora_jax.checkpoints.model_files import COMPANION_FILES
from qlora_jax.errors import UserError
from qlora_jax.files import JOURNAL_NAME
from qlora_jax.models.quantization_config import MODELOPT_FILE

logger = logging.getLogger(__name__)

# A record has some hundred bytes, a model some thousand tensors.
_MOST_BYTES = 2**26
_AGAIN = "run the same command again to go on"
_MENDED = "run the same command again once the cause is mended"
_NOTHING_KEPT = "free some space or choose another output directory"
_DISTRIBUTIONS = ("qlora-jax", "jax", "jaxlib", "numpy", "gguf", "transformers", "orbax-checkpoint")


class Journal:
    """The record of what is whole in a temporary directory.

    Opening it goes on with the work that is there, or empties the directory if that is another work or its journal
    cannot be read, and logs why.

    A line is the checksum of its text and of all lines before it, and the text: JSON. The first says which work it is.
    What follows a line that is not as it was written does not count.

    Attributes:
        directory: the temporary directory.
        records: JSON values, of an earlier process first.

    Args:
        directory: held by this process.
        identity: JSON values that decide the bytes of the result.

    Raises:
        UserError: it cannot be read; nothing is deleted.
        OSError: it cannot be written.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]):
        self.directory = directory
        self.records: list[Any] = []
        self._file = directory / JOURNAL_NAME
        # Before each record: the checksum so far, and the length of the file.
        self._places = [(0, 0)]
        begun = json.loads(json.dumps(identity))
        try:
            found = self._read()
        except OSError as error:
            raise UserError(
                f"{self._file} cannot be used: {files.reason(error)}; {_MENDED}, or delete {directory} to start anew."
            ) from error
        same = bool(found) and found[0] == begun
        if same and len(found) > 1:
            self.records = found[1:]
            return
        if not same and any(directory.iterdir()):
            logger.warning("starting anew: what is in %s %s; it is deleted", directory, _why_not(found, begun))
        try:
            files.empty(directory)
            self._places = [(0, 0)]
            self._append(begun)
        except BaseException:
            with suppress(OSError):
                files.empty(directory)
            raise

    @property
    def hint(self) -> str:
        """End of a message about a full disk: what to do."""
        return f"free some space and {_AGAIN}" if self.records else _NOTHING_KEPT

    def add(self, record: Any) -> None:
        """Note a piece that has been written."""
        self._append(record)
        self.records.append(record)

    def keep(self, count: int, names: Collection[str]) -> None:
        """Forget all records but the first `count`, and delete everything in the directory but those names."""
        if count < len(self.records):
            os.truncate(self._file, self._places[count + 1][1])
            del self._places[count + 2 :], self.records[count:]
        files.empty(self.directory, keep=(JOURNAL_NAME, *names))

    def _read(self) -> list[Any]:
        """Return the values of all lines that are as they were written; none if there is no journal."""
        try:
            status = self._file.lstat()
        except FileNotFoundError:
            return []
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            return []
        values = []
        for line in self._file.read_bytes().splitlines(keepends=True):
            checksum, length = self._places[-1]
            text = line[9:-1]
            checksum = zlib.crc32(text, checksum)
            if line != b"%08x %b\n" % (checksum, text):
                break
            try:
                values.append(json_text.parse_json(text))
            except ValueError:
                break
            self._places.append((checksum, length + len(line)))
        if values:
            os.truncate(self._file, self._places[-1][1])
        return values

    def _append(self, value: Any) -> None:
        text = json.dumps(value).encode()
        checksum, length = self._places[-1]
        checksum = zlib.crc32(text, checksum)
        line = b"%08x %b\n" % (checksum, text)
        with open(self._file, "ab") as stream:
            stream.write(line)
        self._places.append((checksum, length + len(line)))


def _why_not(found: list[Any], begun: Mapping[str, Any]) -> str:
    """Say in one phrase why work is not gone on with."""
    if not found or not isinstance(found[0], dict):
        return "has no journal that can be read"
    before, said = found[0], []
    for name in _different(before, begun):
        old, new = before.get(name), begun.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            name += f" ({', '.join(_different(old, new))})"
        said.append(name)
    return f"differs in {', '.join(said)}"


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or a[name] != b[name])


@contextmanager
def resumable_directory(path: Path, identity: Mapping[str, Any], *, replace: bool = False) -> Iterator[Journal]:
    """Yield the journal of a temporary directory, which takes the name `path` when the block ends.

    If the block raises, or the directory cannot be given its name, it is kept as soon as anything is recorded, and
    removed otherwise.

    Args:
        path: directory to make; it may exist if it is empty.
        replace: see `staged_directory`.
        identity: JSON values that decide the bytes of the result: with any other the work starts anew.

    Raises:
        UserError: another process is writing it, or it cannot be written.
    """
    journal: Journal | None = None

    def keep() -> bool:
        # Without a journal nothing is known of what is there, which may be an earlier process's work.
        return journal is None or bool(journal.records)

    with files.write_errors(path, _NOTHING_KEPT):
        try:
            with files.staged_directory(path, replace=replace, keep=keep) as staging:
                journal = Journal(staging, identity)
                yield journal
        except BaseException as error:
            if journal is None or not journal.records or not journal.directory.is_dir():
                raise
            again = isinstance(error, OSError) or not isinstance(error, Exception)
            advice = _AGAIN if again else _MENDED
            logger.warning("what was written is kept in %s: %s, or delete it", journal.directory, advice)
            if isinstance(error, OSError):
                raise UserError(f"{path} cannot be written: {files.reason(error)}; {journal.hint}.") from error
            raise
    with suppress(OSError):  # whoever reads the directory leaves it alone
        (path / JOURNAL_NAME).unlink()


def say_continuing(done: int, total: int) -> None:
    """Log how many tensors an earlier process wrote, if any."""
    if done:
        logger.info("continuing: %s of %s tensors were written before", f"{done:,}", f"{total:,}")


def versions() -> dict[str, str]:
    """Versions of the programs that decide the bytes of a result."""
    return {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}


def fingerprint(path: Path, weights: Collection[Path] = ()) -> dict[str, Any]:
    """Tell a model from others, and from itself after a change, by the sizes and times of the files that are read.

    Args:
        path: Hugging Face directory, GGUF file or converted directory; of the latter, its manifest with all digests.
        weights: the files of a directory's tensors, if they are read.

    Raises:
        OSError: a file cannot be looked at.
    """
    resolved = str(path.resolve())
    if is_converted(path):
        return {"path": resolved, "manifest": files.file_digest(path / MANIFEST_NAME)}
    beside = (path / name for name in (*COMPANION_FILES, MODELOPT_FILE))
    found = {file.parent.resolve() / file.name for file in (*weights, path, *beside) if file.is_file()}
    stats = {str(file): file.stat() for file in sorted(found)}
    return {"path": resolved, "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}
