"""Directories that a killed process leaves unfinished and the same command goes on with.

They are written under the temporary name of `qlora_jax.files.staged_directory`. A journal in there says which work it
is and has a record of every piece that is whole, written after the piece. Whoever goes on compares each piece with its
record: after a loss of power the disk may have kept the record and not the piece.
"""

import importlib.metadata
import json
import logging
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_jax import files, json_text
from qlora_jax.checkpoints.manifest import MANIFEST_NAME, is_converted
from qlora_jax.errors import UserError

logger = logging.getLogger(__name__)

JOURNAL_NAME = ".journal"
"""The journal's name in the temporary directory; what takes the final name has none."""

# A record has some hundred bytes, a model some thousand tensors.
_MOST_BYTES = 2**26
_AGAIN = "run the same command again to go on"
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
        OSError: it cannot be written.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]):
        self.directory = directory
        self.records: list[Any] = []
        self._file = directory / JOURNAL_NAME
        # Before each record: the checksum so far, and the length of the file.
        self._places = [(0, 0)]
        begun = json.loads(json.dumps(identity))
        found = self._read()
        same = bool(found) and found[0] == begun
        if same and len(found) > 1:
            self.records = found[1:]
            return
        if not same and any(directory.iterdir()):
            logger.info("starting anew: what is in %s %s", directory, _reason_to_start_anew(found, begun))
        files.empty(directory)
        self._places = [(0, 0)]
        self._append(begun)

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
        if self._file.is_symlink() or not self._file.is_file() or self._file.stat().st_size > _MOST_BYTES:
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


def _reason_to_start_anew(found: list[Any], begun: Mapping[str, Any]) -> str:
    if not found or not isinstance(found[0], dict):
        return "has no journal that can be read"
    before, fields = found[0], begun.keys() | found[0].keys()
    other = [name for name in fields if name not in begun or name not in before or begun[name] != before[name]]
    return f"differs in {', '.join(sorted(other))}"


@contextmanager
def resumable_directory(path: Path, identity: Mapping[str, Any], *, replace: bool = False) -> Iterator[Journal]:
    """Yield the journal of a temporary directory; that takes the name `path`, without its journal, when the block ends.

    If the block raises, it is kept as soon as anything is recorded, and removed otherwise.

    Args:
        path: directory to make; it may exist if it is empty.
        replace: see `staged_directory`.
        identity: JSON values that decide the bytes of the result: with any other the work starts anew.

    Raises:
        UserError: another process is writing it, or it cannot be written.
    """
    with files.write_errors(path, _NOTHING_KEPT), files.staged_directory(path, replace=replace, keep=True) as staging:
        journal = None
        try:
            journal = Journal(staging, identity)
            yield journal
            # Before the journal goes: a disk that is full may say so only now.
            files.flush_all_to_disk(staging)
        except BaseException as error:
            if journal is None or not journal.records:
                files.empty(staging)
                raise
            logger.warning("what was written is kept in %s: %s, or delete it", staging, _AGAIN)
            if isinstance(error, OSError):
                raise UserError(f"{path} cannot be written: {files.reason(error)}; {journal.hint}.") from error
            raise
        (staging / JOURNAL_NAME).unlink()


def say_continuing(done: int, total: int) -> None:
    """Log how many tensors an earlier process wrote, if any."""
    if done:
        logger.info("continuing: %s of %s tensors were written before", f"{done:,}", f"{total:,}")


def versions() -> dict[str, str]:
    """Versions of the programs that decide the bytes of a result."""
    return {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}


def fingerprint(path: Path, others: Collection[Path] = ()) -> dict[str, Any]:
    """Tell a model from others, and from itself after a change, by the sizes and times of its files.

    Args:
        path: Hugging Face directory, GGUF file or converted directory; of the latter, its manifest with all digests.
        others: its files that may lie elsewhere than directly in the directory.

    Raises:
        OSError: a file cannot be looked at.
    """
    if is_converted(path):
        return {"path": str(path), "manifest": files.file_digest(path / MANIFEST_NAME)}
    found = {path} if path.is_file() else {file for file in path.iterdir() if file.is_file()}
    stats = {str(file): file.stat() for file in sorted(found | set(others))}
    return {"path": str(path), "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}
