"""GGUF files: header, metadata and tensors, whatever model they hold.

Headers, element types and dequantisation come from the `gguf` package. Weights are read with plain file reads: pages of
the mapping that `gguf.GGUFReader` offers would count as resident memory of this process.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize

from qlora_jax.checkpoints.host_memory import aligned_empty, pieces_of
from qlora_jax.checkpoints.model_files import DOWNLOAD_AGAIN, read_exactly
from qlora_jax.errors import UserError

_PLAIN_DTYPES = {
    GGMLQuantizationType.F64: np.dtype(np.float64),
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_INTEGERS = {
    GGMLQuantizationType.I8,
    GGMLQuantizationType.I16,
    GGMLQuantizationType.I32,
    GGMLQuantizationType.I64,
}
# Elements that are read at a time, and dequantised: temporaries of `gguf.quants` stay in a core's cache.
_CHUNK_ELEMENTS, _DEQUANTIZED = 1 << 20, 1 << 15
# What a header may hold; parsed, it takes less than 1 GiB. The largest vocabularies have 650,000 tokens and merges.
_MOST_PARTS = 3 << 20
_MOST_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor's entry in the header of a GGUF file.

    Attributes:
        gguf_name: llama.cpp's name.
        kind: element type.
        shape: in row-major order; a linear weight is [out, in].
        offset: of its first byte from the start of the file.
        nbytes: stored bytes.
    """

    gguf_name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> str:
        """Name of the element type that `read_tensor` returns: float32 for all quantised types."""
        return _PLAIN_DTYPES[self.kind].name if self.kind in _PLAIN_DTYPES else "float32"

    @property
    def quantized(self) -> bool:
        """Quantised in the file, to be dequantised when it is read."""
        return self.kind not in _PLAIN_DTYPES


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_KINDS: Mapping[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "an integer": (
        _is_integer,
        (
            "attention.key_length", "attention.sliding_window", "attention.value_length", "block_count",
            "context_length", "embedding_length", "feed_forward_length", "rope.dimension_count",
            "rope.scaling.original_context_length", "split.count", "tokenizer.ggml.bos_token_id",
            "tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id", "tokenizer.ggml.unknown_token_id",
            "vocab_size",
        ),
    ),
    "an integer, or one for each layer": (
        lambda value: _is_integer(value) or _list_of(lambda each: isinstance(each, int))(value),
        ("attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern"),
    ),
    "a finite number": (
        _is_number,
        (
            "attention.layer_norm_rms_epsilon", "final_logit_softcapping", "rope.freq_base", "rope.freq_base_swa",
            "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor", "rope.scaling.yarn_beta_fast",
            "rope.scaling.yarn_beta_slow",
        ),
    ),
    "a string": (
        _is_text,
        (
            "general.architecture", "rope.scaling.type", "tokenizer.chat_template", "tokenizer.ggml.model",
            "tokenizer.ggml.pre",
        ),
    ),
    "true or false": (
        lambda value: isinstance(value, bool),
        ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix"),
    ),
    "a list of strings": (_list_of(_is_text), ("tokenizer.ggml.merges", "tokenizer.ggml.tokens")),
    "a list of integers": (_list_of(_is_integer), ("tokenizer.ggml.token_type",)),
    "a list of numbers": (_list_of(lambda each: isinstance(each, int | float)), ("tokenizer.ggml.scores",)),
}  # fmt: skip
"""Kind of value -> its check, and the keys that have it; keys of an architecture without its name in front."""
_KIND_OF = {key: (kind, check) for kind, (check, keys) in _KINDS.items() for key in keys}


def _check_kinds(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse a value of another type than every reader of its key takes it for."""
    prefix = f"{metadata.get('general.architecture')}."
    for key, value in metadata.items():
        kind, check = _KIND_OF.get(key.removeprefix(prefix), ("", None))
        if check is not None and not check(value):
            raise UserError(
                f"{path} has {key} = {reprlib.repr(value)}, which is not {kind}; use another GGUF version of the model."
            )


def read_metadata(path: str | Path) -> Mapping[str, Any]:
    """Read the key-value metadata of a GGUF file; arrays become lists. Shared between callers: not to be changed.

    Raises:
        UserError: a file that is not GGUF, is truncated, big-endian or of an unknown version, or a value that is read
            and has another type than its key; names the file, and the key.
    """
    return read_header(Path(path))[0]


def read_header(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Entry]]:
    """Read metadata and {llama.cpp's name: entry}; raises as `read_metadata`."""
    status = path.stat()
    return _parse(path, status.st_mtime_ns, status.st_size)


def check_readable(path: Path, entry: Entry) -> None:
    """Refuse integer tensors and types that the installed `gguf` cannot dequantise."""
    if not entry.quantized:
        return
    _, block_bytes = GGML_QUANT_SIZES[entry.kind]
    try:
        if entry.kind in _INTEGERS:
            raise NotImplementedError
        dequantize(np.zeros((1, block_bytes), np.uint8), entry.kind)
    except NotImplementedError:
        raise UserError(
            f"tensor {entry.gguf_name} in {path} has element type {entry.kind.name}, which cannot be "
            f"dequantised; use another GGUF version of the model."
        ) from None


def read_tensor(path: Path, entry: Entry) -> np.ndarray:
    """Read and dequantise one tensor."""
    array = aligned_empty(entry.shape, entry.dtype)
    for _ in tensor_pieces(path, entry, _CHUNK_ELEMENTS, array.reshape(-1)):
        pass
    return array


def tensor_pieces(path: Path, entry: Entry, size: int, into: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield a tensor, flat and dequantised, in pieces of `size` elements; see `TensorSource.pieces`."""
    elements, nbytes = GGML_QUANT_SIZES[entry.kind]
    for start, piece in pieces_of(math.prod(entry.shape), np.dtype(entry.dtype), size, into):
        offset = entry.offset + start // elements * nbytes
        if entry.quantized:
            blocks = np.empty((piece.size // elements, nbytes), np.uint8)
            read_exactly(path, offset, blocks, entry.gguf_name)
            step = _DEQUANTIZED // elements
            for first in range(0, len(blocks), step):
                some = blocks[first : first + step].reshape(1, -1)
                piece[first * elements : (first + step) * elements] = dequantize(some, entry.kind)[0]
        else:
            read_exactly(path, offset, piece, entry.gguf_name)
        yield piece


def read_blocks(path: Path, entry: Entry) -> np.ndarray:
    """Read the blocks of a quantised matrix as they are, uint8 [rows, bytes of a row]."""
    packed = np.empty((entry.shape[0], entry.nbytes // entry.shape[0]), np.uint8)
    read_exactly(path, entry.offset, packed, entry.gguf_name)
    return packed


class _Bytes:
    """The file as plain arrays: slices of a memmap are made in Python, which is most of `GGUFReader`'s time.

    A slice past the end is an error, for the reader would take what there is, and count on through absent elements.
    Slices are counted: the reader keeps an array of each, a string or a number of a few bytes.
    """

    def __init__(self, mapped: np.ndarray):
        self._array = np.asarray(mapped)
        self._parts = 0

    def __getitem__(self, part: slice) -> np.ndarray:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise EOFError(f"its header has more than {_MOST_PARTS} parts")
        if part.stop > len(self._array):
            raise EOFError(f"its {len(self._array)} bytes end before its header or tensors do")
        return self._array[part]


class _Reader(GGUFReader):
    @property  # type: ignore[override]  # the reader only takes slices of it
    def data(self) -> _Bytes:
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._bytes = _Bytes(mapped)

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> tuple[int, list[Any], list[int], list[Any]]:
        """Take an array of numbers as one part, of strings as one each: the package makes more, and takes longer."""
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        item, count, start = GGUFValueType(kind[0]), int(length[0]), orig_offs + 12
        if count > _MOST_ELEMENTS:
            raise ValueError(f"its header has an array of {count} elements, more than {_MOST_ELEMENTS}")
        types = [GGUFValueType.ARRAY, item]
        if item in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[item], count)
            return 12 + values.nbytes, [kind, length, values], [2], types
        if item != GGUFValueType.STRING or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        parts, offset = [kind, length], start
        for _ in range(count):
            end = offset + 8 + int.from_bytes(self.data[offset : offset + 8].tobytes(), "little")
            parts.append(self.data[offset + 8 : end])
            offset = end
        return offset - orig_offs, parts, list(range(2, 2 + count)), types


@functools.lru_cache(maxsize=2)
def _parse(path: Path, mtime_ns: int, size: int) -> tuple[Mapping[str, Any], Mapping[str, Entry]]:
    """Parse the file as it was at that time; kept since weights and tokenizer both ask."""
    try:
        with np.errstate(all="raise"):  # offsets that overflow
            reader = _Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (ArithmeticError, EOFError, LookupError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not a GGUF file that can be read ({error}); {DOWNLOAD_AGAIN}.") from error
    if reader.byte_order == "S":
        raise UserError(f"{path} is a big-endian GGUF file; only little-endian ones are supported.")
    _check_kinds(path, metadata)
    entries: dict[str, Entry] = {}
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        if not shape or not tensor.n_elements:
            raise UserError(f"tensor {tensor.name} has a malformed entry in the header of {path}; {DOWNLOAD_AGAIN}.")
        entries[tensor.name] = Entry(tensor.name, tensor.tensor_type, shape, tensor.data_offset, tensor.n_bytes)
    return MappingProxyType(metadata), MappingProxyType(entries)
