"""Files to which tensors are appended, so that a killed process's successor goes on after the last whole one.

Until all is written they are called `.tensors-00000` and so on, which nothing takes for a checkpoint. Memory: none but
the caller's tensor; 16 MiB where an earlier process's tensors are compared with their checksums.
"""

import dataclasses
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from qlora_jax import files
from qlora_jax.checkpoints.journal import Journal

_COMPARED = 2**24
_Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclasses.dataclass(frozen=True)
class Piece:
    """An array in a file, and the zeros that align it, which are damaged as easily.

    Attributes:
        file: its number.
        offset: of the first byte, zeros included.
        nbytes: how many there are.
        crc32: of them.
        name: of the array.
        dtype: of its elements.
        shape: of the array.
    """

    file: _Count
    offset: _Count
    nbytes: _Count
    crc32: _Count
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Written:
    """A tensor of the source and all that was written of it.

    Attributes:
        pieces: in order.
        shares: see `qlora_jax.checkpoints.merging.stored`.
    """

    pieces: tuple[Piece, ...]
    shares: dict[str, float]


_WRITTEN = TypeAdapter(Written)


class TensorFiles:
    """Append-only files of a directory, numbered from 0.

    Args:
        directory: to write to.
        final_names: (number of files) -> what they are called in the end.
        journal: of the directory; None to begin at the beginning, and not to be gone on with.
        start: offset of the first array of each file.
        align: offsets, and the length of each file, are multiples of it; zeros lie between.

    Attributes:
        written: tensors of the source that are whole, those of an earlier process first.
    """

    def __init__(
        self,
        directory: Path,
        final_names: Callable[[int], Sequence[str]],
        journal: Journal | None = None,
        *,
        start: int = 0,
        align: int = 1,
    ):
        self.written: list[Written] = []
        self._directory, self._final_names, self._journal = directory, final_names, journal
        self._start, self._align = start, align
        self._ends: dict[int, int] = {}
        self._pending: list[Piece] = []
        self._open: tuple[int, BinaryIO] | None = None
        if journal is not None:
            self._restore(journal)

    @property
    def shares(self) -> dict[str, float]:
        """Module -> share, of all that is written."""
        return {name: share for tensor in self.written for name, share in tensor.shares.items()}

    @property
    def pieces(self) -> list[Piece]:
        """All arrays in the order they were written."""
        return [*(piece for tensor in self.written for piece in tensor.pieces), *self._pending]

    def path(self, file: int) -> Path:
        """Return the present path of a file."""
        return self._directory / f".tensors-{file:05d}"

    def check_room(self, nbytes: int) -> None:
        """Refuse a disk without room for the rest of so many bytes."""
        what = "the rest of the export" if self.written else "the export"
        held = sum(self._ends.values())
        files.check_room(self._directory, nbytes - held, f"the disk of {self._directory.parent}", what)

    def append(self, file: int, name: str, array: np.ndarray) -> None:
        """Write an array; it counts when `commit` has been called."""
        payload = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        stream, offset = self._stream(file), self._ends.get(file, self._start)
        zeros = bytes(self._aligned(offset) - offset)
        stream.seek(offset)
        stream.write(zeros)
        stream.write(payload)
        nbytes, crc = len(zeros) + len(payload), zlib.crc32(payload, zlib.crc32(zeros))
        self._ends[file] = offset + nbytes
        self._pending.append(Piece(file, offset, nbytes, crc, name, array.dtype.name, array.shape))

    def commit(self, shares: Mapping[str, float] | None = None) -> None:
        """Record what was appended since the last time as one tensor of the source."""
        if self._open is not None:
            self._open[1].flush()
        tensor = Written(tuple(self._pending), dict(shares or {}))
        if self._journal is not None:
            self._journal.add(dataclasses.asdict(tensor))
        self.written.append(tensor)
        self._pending = []

    def publish(self) -> None:
        """Give the files their final names."""
        self.close()
        for file, end in self._ends.items():
            os.truncate(self.path(file), self._aligned(end))
        for file, name in enumerate(self._final_names(len(self._ends))):
            self.path(file).rename(self._directory / name)

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _restore(self, journal: Journal) -> None:
        """Keep the tensors of an earlier process up to the first that is not whole, and delete the rest."""
        found = _parsed(journal.records)
        last = max((piece.file for tensor in found for piece in tensor.pieces), default=-1)
        # It may have come as far as to give them their names.
        for file, name in enumerate(self._final_names(last + 1)):
            if (self._directory / name).is_file():
                (self._directory / name).rename(self.path(file))
        for tensor in found:
            if not all(map(self._is_whole, tensor.pieces)):
                break
            self.written.append(tensor)
            self._ends |= {piece.file: piece.offset + piece.nbytes for piece in tensor.pieces}
        journal.keep(len(self.written), [self.path(file).name for file in self._ends])
        for file, end in self._ends.items():
            os.truncate(self.path(file), end)

    def _is_whole(self, piece: Piece) -> bool:
        path = self.path(piece.file)
        if path.is_symlink() or not path.is_file() or path.stat().st_size < piece.offset + piece.nbytes:
            return False
        crc, left = 0, piece.nbytes
        with path.open("rb") as stream:
            stream.seek(piece.offset)
            while left and (read := stream.read(min(left, _COMPARED))):
                crc, left = zlib.crc32(read, crc), left - len(read)
        return not left and crc == piece.crc32

    def _stream(self, file: int) -> BinaryIO:
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = file, open(self.path(file), "r+b" if file in self._ends else "wb")
        return self._open[1]

    def _aligned(self, offset: int) -> int:
        return -(-offset // self._align) * self._align


def _parsed(records: list[Any]) -> list[Written]:
    """Return the records up to the first that is none of a tensor."""
    found: list[Written] = []
    with suppress(ValidationError):
        found.extend(_WRITTEN.validate_python(record) for record in records)
    return found
