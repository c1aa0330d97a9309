"""Hugging Face safetensors files written tensor by tensor, in shards of a bounded size, with their index.

The headers are written last, into room that was left for them: tensors need not be known before they come. Memory:
none but the caller's tensor.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qlora_jax.checkpoints.journal import Journal
from qlora_jax.checkpoints.tensor_files import TensorFiles

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int8": "I8"}
# Of an entry in a header, beside the tensor's name: type, shape and offsets of up to twenty digits.
_ENTRY_BYTES = 160
_INDEX = "model.safetensors.index.json"


class SafetensorsWriter:
    """Writes model.safetensors, or its shards and their index, into a directory.

    Args:
        directory: to write to.
        names: of all tensors that will come, an upper bound on any shard's.
        max_shard_bytes: most data of a shard; a larger tensor has one of its own.
        journal: see `TensorFiles`.

    Attributes:
        files: what has been written.
    """

    def __init__(self, directory: Path, names: list[str], max_shard_bytes: int, journal: Journal | None = None):
        self._directory, self._limit = directory, max_shard_bytes
        header = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        # The format lets spaces follow the header.
        self._header_bytes = -(-header // 8) * 8
        self.files = TensorFiles(directory, _file_names, journal, start=8 + self._header_bytes)
        last = self.files.pieces[-1:]
        self._shard = last[0].file if last else 0
        self._filled = last[0].offset + last[0].nbytes - 8 - self._header_bytes if last else 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor."""
        if self._filled and self._filled + array.nbytes > self._limit:
            self._shard, self._filled = self._shard + 1, 0
        self.files.append(self._shard, name, array)
        self._filled += array.nbytes

    def commit(self, shares: Mapping[str, float] | None = None) -> None:
        """Record what was added since the last time, see `TensorFiles.commit`."""
        self.files.commit(shares)

    def finish(self) -> None:
        """Complete the files; write the index if there is more than one."""
        self.files.close()
        shards: list[dict[str, dict]] = [{} for _ in range(self._shard + 1)]
        for piece in self.files.pieces:
            begin = piece.offset - 8 - self._header_bytes
            entry = {"dtype": _TYPES[piece.dtype], "shape": list(piece.shape)}
            shards[piece.file][piece.name] = {**entry, "data_offsets": [begin, begin + piece.nbytes]}
        for i, shard in enumerate(shards):
            header = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
            with self.files.path(i).open("r+b") as stream:
                stream.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self.files.publish()
        if len(shards) > 1:
            names = _file_names(len(shards))
            weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            total = sum(piece.nbytes for piece in self.files.pieces)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the file that is being written, if any."""
        self.files.close()


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
