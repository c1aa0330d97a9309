"""Hugging Face safetensors files written tensor by tensor, in shards of a bounded size, with their index.

A shard's header is written last, into room that was left for it: tensors need not be known before they come. Memory:
none but the caller's tensor.
"""

import json
from pathlib import Path
from typing import BinaryIO

import numpy as np

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
    """

    def __init__(self, directory: Path, names: list[str], max_shard_bytes: int):
        self._directory, self._limit = directory, max_shard_bytes
        header = 64 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._header_bytes = -(-header // 8) * 8
        self._shards: list[dict[str, dict]] = []
        self._stream: BinaryIO | None = None
        self._offset = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor."""
        if self._stream is None or (self._offset and self._offset + array.nbytes > self._limit):
            self._finish_shard()
            self._shards.append({})
            self._stream = open(self._part(len(self._shards) - 1), "wb")
            self._stream.seek(8 + self._header_bytes)
            self._offset = 0
        end = self._offset + array.nbytes
        self._shards[-1][name] = {
            "dtype": _TYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [self._offset, end],
        }
        self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._offset = end

    def finish(self) -> None:
        """Complete the files; write the index if there is more than one."""
        self._finish_shard()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(self._shards):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self._directory / file)
            weight_map |= dict.fromkeys(shard, file)
        if count > 1:
            total = sum(max(entry["data_offsets"][1] for entry in shard.values()) for shard in self._shards)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _part(self, shard: int) -> Path:
        return self._directory / f".shard-{shard:05d}"

    def _finish_shard(self) -> None:
        if self._stream is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._shards[-1]}).encode()
        self._stream.seek(0)
        # The format lets spaces follow the header.
        self._stream.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self.close()
