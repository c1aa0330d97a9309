"""Hugging Face safetensors directories, read by byte range.

Each tensor is read with plain file reads into memory of its own: pages of a memory-mapped shard would count as resident
memory of this process, and a conversion's memory would then grow with the model.
"""

import math
import reprlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qlora_jax.checkpoints.host_memory import aligned_empty, pieces_of
from qlora_jax.checkpoints.model_files import (
    DOWNLOAD_AGAIN,
    find_pickles,
    is_inside,
    pickle_refusal,
    read_exactly,
    read_json_object,
    read_model_config,
)
from qlora_jax.checkpoints.packed_safetensors import packed_weights
from qlora_jax.errors import UserError
from qlora_jax.json_text import MAX_BYTES, parse_json
from qlora_jax.models import family_of, model_config
from qlora_jax.models.quantization_config import FIELD, unused_settings
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor, dequantize_on_host

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Element types of tensors that make a quantised weight; floats of 8 bits as their bytes.
_PACKED_DTYPES = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E8M0": np.dtype(np.uint8),
}
# Those that no base weight may have by itself; sizes are needed to validate the header all the same.
_OTHER_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "I32": 32,
    "U32": 32,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file, bytes
    nbytes: int


class SafetensorsSource:
    """`TensorSource` of a directory with config.json and one safetensors file, or an index and its shards.

    Raises:
        UserError: names the file and tensor for unreadable JSON, truncated or overlong files, offsets outside the
            file, an index that names a missing shard or a tensor its shard lacks, and pickled weights.
    """

    def __init__(self, directory: str | Path):
        self.path = Path(directory)
        contents = read_model_config(self.path / "config.json", "a Hugging Face model directory has one")
        self.config = model_config(contents)
        self._entries = self._under_the_familys_names(self._read_headers())
        quantization = contents.get(FIELD) or {}
        try:
            self._packed, self._parts = packed_weights(self._entries, quantization, self._read_part, self.config)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        dtypes = sorted({entry.dtype for name, entry in self._entries.items() if name not in self._parts})
        self.description = f"Hugging Face safetensors directory {self.path} ({', '.join(dtypes)})"
        if unused := unused_settings(quantization):
            self.description += f"; {unused}"

    def names(self) -> tuple[str, ...]:
        """Names of all tensors of all shards; of one that is stored in parts its own."""
        return (*(name for name in self._entries if name not in self._parts), *self._packed)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored; of a quantised weight its own."""
        return self._packed[name].shape if name in self._packed else self._entries[name].shape

    def dtype(self, name: str) -> str:
        """NumPy's name of the stored type, float32 of a quantised one; the format's own name for types not read."""
        if name in self._packed:
            return "float32"
        stored = self._entries[name].dtype
        return _DTYPES[stored].name if stored in _DTYPES else stored

    def location(self, name: str) -> Path:
        """The shard, of a quantised weight that of its codes."""
        return self._entry(name).file

    def check_readable(self, name: str) -> None:
        """Only float64, float32, float16 and bfloat16 are read, and weights that are quantised in a known way."""
        entry = self._entry(name)
        if name not in self._packed and entry.dtype not in _DTYPES:
            raise UserError(
                f"tensor {name} in {entry.file} has element type {entry.dtype}, which is not supported; "
                f"use a float32, bfloat16 or float16 version of the model."
            )

    def read(self, name: str) -> np.ndarray:
        """Read one tensor's byte range; dequantise it if it is stored in parts."""
        if name in self._packed:
            return dequantize_on_host(self.read_stored(name))
        self.check_readable(name)
        entry = self._entries[name]
        array = aligned_empty(entry.shape, _DTYPES[entry.dtype])
        read_exactly(entry.file, entry.offset, array, name)
        return array

    def quantized_type(self, name: str) -> str | None:
        """Storage of a quantised weight, for people."""
        return str(self._packed[name].storage) if name in self._packed else None

    def stored(self, name: str) -> QuantizationConfig | None:
        """Storage of a quantised weight."""
        return self._packed[name].storage if name in self._packed else None

    def read_stored(self, name: str, into: QuantizedTensor | None = None) -> QuantizedTensor:
        """Read the parts of a quantised weight."""
        try:
            return self._packed[name].unpack(self._read_part, None if into is None else into.codes)
        except UserError as error:
            raise UserError(f"tensor {name} in {self.location(name)}: {error}") from None

    def _entry(self, name: str) -> _Entry:
        return self._entries[self._packed[name].parts[0] if name in self._packed else name]

    def _read_part(self, name: str, into: np.ndarray | None = None) -> np.ndarray:
        entry = self._entries[name]
        dtype = _DTYPES.get(entry.dtype) or _PACKED_DTYPES.get(entry.dtype)
        if dtype is None:
            raise UserError(f"tensor {name} has element type {entry.dtype}, which is not supported.")
        fits = into is not None and (into.dtype, into.nbytes) == (dtype, entry.nbytes)
        array = into.reshape(entry.shape) if into is not None and fits else np.empty(entry.shape, dtype)
        read_exactly(entry.file, entry.offset, array, name)
        return array

    def pieces(self, name: str, size: int, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Read piece by piece; all at once a weight that is stored in parts."""
        if name in self._packed:
            whole = self.read(name).reshape(-1)
            yield from (whole[start : start + size] for start in range(0, whole.size, size))
            return
        self.check_readable(name)
        entry, dtype = self._entries[name], _DTYPES[self._entries[name].dtype]
        for start, piece in pieces_of(math.prod(entry.shape), dtype, size, into):
            read_exactly(entry.file, entry.offset + start * dtype.itemsize, piece, name)
            yield piece

    def _under_the_familys_names(self, entries: dict[str, _Entry]) -> dict[str, _Entry]:
        """Rename tensors whose names begin as in other versions of the family's files."""
        aliases = family_of(self.config).aliases(self.config)
        renamed: dict[str, _Entry] = {}
        for name, entry in entries.items():
            old = next((start for start in aliases if name.startswith(start)), "")
            new = aliases.get(old, "") + name[len(old) :]
            if new in renamed:
                raise UserError(f"{entry.file} holds tensor {new} under two names; {DOWNLOAD_AGAIN}.")
            renamed[new] = entry
        return renamed

    def _read_headers(self) -> dict[str, _Entry]:
        index_file = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if index_file.is_file():
            return self._read_index(index_file)
        if single.is_file():
            return _read_header(single)
        if pickles := find_pickles(self.path):
            raise pickle_refusal(f"{pickles[0]} is a pickle file")
        others = sorted(self.path.glob("*.safetensors"))
        found = f" (found {others[0].name}, which no index lists)" if others else ""
        raise UserError(
            f"{self.path} holds neither model.safetensors nor model.safetensors.index.json{found}; "
            f"download the complete model."
        )

    def _read_index(self, index_file: Path) -> dict[str, _Entry]:
        index = read_json_object(index_file, DOWNLOAD_AGAIN)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index_file} has no weight_map from tensor names to shard files; {DOWNLOAD_AGAIN}.")
        entries: dict[str, _Entry] = {}
        for shard in dict.fromkeys(weight_map.values()):
            # A name with a path would let an index make us read files outside the model.
            if "/" in shard or not is_inside(shard):
                raise UserError(f"{index_file} names the shard {reprlib.repr(shard)}, which is not a plain file name.")
            file = self.path / shard
            if not file.is_file():
                raise UserError(f"{file} is missing, but {index_file.name} lists it; download the complete model.")
            header = _read_header(file)
            for name in header:
                if weight_map.get(name) != shard:
                    raise UserError(
                        f"tensor {name} is in {file}, but {index_file.name} does not list it there; "
                        f"download the model again so that the shards and their index belong together."
                    )
            entries.update(header)
        for name, shard in weight_map.items():
            if name not in entries:
                raise UserError(
                    f"tensor {name} is missing from {self.path / shard}, where {index_file.name} lists it; "
                    f"{DOWNLOAD_AGAIN}."
                )
        return {name: entries[name] for name in weight_map}


def _read_header(file: Path) -> dict[str, _Entry]:
    file_size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= header_size <= min(MAX_BYTES, file_size - 8):
            raise UserError(f"{file} is not a complete safetensors file (its header does not fit); {DOWNLOAD_AGAIN}.")
        raw = stream.read(header_size)
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise UserError(f"{file} has a safetensors header that is not JSON ({error}); {DOWNLOAD_AGAIN}.") from None
    if not isinstance(header, dict):
        raise UserError(f"{file} has a safetensors header that is not a JSON object; {DOWNLOAD_AGAIN}.")
    data_start = 8 + header_size
    entries = {
        name: _parse_entry(file, name, fields, data_start, file_size)
        for name, fields in header.items()
        if name != "__metadata__"
    }
    expected_end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != expected_end:
            raise UserError(f"tensor {name} in {file} overlaps another or leaves a gap; {DOWNLOAD_AGAIN}.")
        expected_end = entry.offset + entry.nbytes
    if expected_end != file_size:
        raise UserError(f"{file} has {file_size} bytes where its header describes {expected_end}; {DOWNLOAD_AGAIN}.")
    return entries


def _parse_entry(file: Path, name: str, fields: Any, data_start: int, file_size: int) -> _Entry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sizes = (*shape, begin, end)
        valid = isinstance(dtype, str) and all(type(size) is int and size >= 0 for size in sizes)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise UserError(f"tensor {name} has a malformed entry in the header of {file}; {DOWNLOAD_AGAIN}.")
    if dtype in _DTYPES:
        bits = _DTYPES[dtype].itemsize * 8
    elif dtype in _OTHER_BITS:
        bits = _OTHER_BITS[dtype]
    else:
        raise UserError(f"tensor {name} in {file} has the unknown element type {dtype!r}.")
    elements = 1
    for size in shape:
        elements *= size
    if (end - begin) * 8 != elements * bits:
        raise UserError(
            f"tensor {name} in {file} spans {end - begin} bytes, not the {elements * bits // 8} of {dtype} "
            f"{list(shape)}; {DOWNLOAD_AGAIN}."
        )
    if data_start + end > file_size:
        raise UserError(
            f"tensor {name} ends at byte {data_start + end} of {file}, which has only {file_size}; {DOWNLOAD_AGAIN}."
        )
    return _Entry(file, dtype, shape, data_start + begin, end - begin)
