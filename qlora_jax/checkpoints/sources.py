"""Sources of base weights: one tensor at a time, under Hugging Face names, whatever the file format."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qlora_jax.checkpoints.gguf_source import GGUFSource
from qlora_jax.checkpoints.manifest import is_converted
from qlora_jax.checkpoints.model_files import PICKLE_SUFFIXES, pickle_refusal
from qlora_jax.checkpoints.safetensors_source import SafetensorsSource
from qlora_jax.errors import UserError
from qlora_jax.models import DecoderConfig, base_tensors
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint whose tensors are read singly, so that a model may be larger than memory.

    Attributes:
        path: the directory or file.
        config: read from config.json (for GGUF: from one that is made of its metadata).
        description: one line for people: format, path and anything to know about the precision of the weights.
    """

    path: Path
    config: DecoderConfig
    description: str

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors in the checkpoint."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; a linear weight is [out, in]."""
        ...

    def dtype(self, name: str) -> str:
        """Name of the element type that `read` returns, or of the stored one if that cannot be read."""
        ...

    def location(self, name: str) -> Path:
        """File that holds the tensor."""
        ...

    def check_readable(self, name: str) -> None:
        """Raise `UserError` if the tensor is stored in a type that cannot be read as a float array."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor in memory of its own: nothing of the file stays mapped."""
        ...

    def quantized_type(self, name: str) -> str | None:
        """Type of a quantised tensor for people, whether `read_stored` can read it as it is or not."""
        ...

    def stored(self, name: str) -> QuantizationConfig | None:
        """Storage of the tensor, if it is quantised and `read_stored` can read it as it is."""
        ...

    def read_stored(self, name: str, into: QuantizedTensor | None = None) -> QuantizedTensor:
        """The tensor as it is stored, for one that `stored` knows, in arrays of `into` or of its own."""
        ...

    def pieces(self, name: str, size: int, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Values that `read` returns, flat, in pieces of `size` elements, a multiple of 256; the last may be shorter.

        A piece may be overwritten when the next is asked for. `into` is flat memory that may be used: of the type that
        is read, for all of the tensor, whose slices are the pieces; or bytes, the first of which are each piece.
        """
        ...


def open_source(path: str | Path) -> TensorSource:
    """Open a Hugging Face safetensors directory or a GGUF file, reading headers only.

    The source's config says how the checkpoint stores its linears (`DecoderConfig.stored`), by the tensors themselves.

    Raises:
        UserError: a path that does not exist, pickled weights, a directory without weights, and everything the format's
            own reader refuses.
    """
    path = Path(path)
    if path.is_dir():
        if is_converted(path):
            raise UserError(f"{path} is already converted; give the original checkpoint to convert it again.")
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not any(path.glob("*.safetensors")) and not any(path.glob("*.safetensors.index.json")):
            raise UserError(f"{path} is a directory of GGUF files; name one of them, for example {ggufs[0]}.")
        return _with_storage(SafetensorsSource(path))
    if not path.exists():
        raise UserError(f"{path} does not exist; give a Hugging Face model directory, a .gguf file or a hub id.")
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise pickle_refusal(f"{path} is a pickle file")
    if path.suffix.lower() == ".gguf":
        return _with_storage(GGUFSource(path))
    if path.suffix.lower() == ".safetensors":
        raise UserError(f"{path} is a single safetensors file; give the directory that also holds its config.json.")
    raise UserError(f"{path} is neither a model directory nor a .gguf file.")


def _with_storage(source: Any) -> TensorSource:
    """Record in a source's config the storage of the linears that it stores alike in all layers.

    Layers of a linear lie in one array, so that one that is stored in several ways has to be quantised again.
    """
    found: dict[str, set[QuantizationConfig | None]] = {}
    present = set(source.names())
    for spec in base_tensors(source.config):
        if spec.quantized:
            stored = source.stored(spec.name) if spec.name in present else None
            found.setdefault(spec.linear, set()).add(stored)
    alike = {name: next(iter(each)) for name, each in found.items() if len(each) == 1}
    stored = tuple((name, storage) for name, storage in sorted(alike.items()) if storage is not None)
    source.config = dataclasses.replace(source.config, stored=stored)
    return source
