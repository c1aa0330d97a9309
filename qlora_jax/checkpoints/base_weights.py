"""Weights of a base as float arrays, one tensor at a time: as its checkpoint has them, or as training computed.

Memory: one tensor as it is stored, and a float32 array of its size; of a converted directory, two copies of one array,
which is all layers of a linear in a part, or an embedding, and a float32 array of one layer.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from qlora_jax.checkpoints.converted import ConvertedBase, converted_config
from qlora_jax.checkpoints.manifest import is_converted, read_manifest
from qlora_jax.checkpoints.model_files import check_finite
from qlora_jax.checkpoints.sources import TensorSource, open_source
from qlora_jax.checkpoints.streaming import check_source, check_tied_head, describe, stream_tensors
from qlora_jax.choices import BaseKind
from qlora_jax.errors import UserError
from qlora_jax.models import DecoderConfig, TensorSpec, base_tensors, family_of
from qlora_jax.quantization import MixedQuantization, QuantizationConfig, QuantizedTensor, dequantize_on_host


@dataclasses.dataclass(frozen=True)
class BaseStorage:
    """Storage of a base's linear weights in training.

    Attributes:
        default: of linears that its checkpoint does not hold quantised.
        adopt: linears that it does are kept as they are.
    """

    default: QuantizationConfig = dataclasses.field(default_factory=QuantizationConfig)
    adopt: bool = True

    def of(self, config: DecoderConfig) -> MixedQuantization:
        """Return the storage of each linear of a model."""
        return MixedQuantization(self.default, config.stored if self.adopt else ())

    def describe(self, config: DecoderConfig) -> str:
        """Name the storages of a model's linears, for people."""
        linears = dict.fromkeys(spec.linear for spec in base_tensors(config) if spec.quantized)
        storage = self.of(config)
        return ", ".join(dict.fromkeys(str(storage.of(name)) for name in linears))


@runtime_checkable
class BaseWeights(Protocol):
    """A base whose weights are streamed.

    Attributes:
        path: of the checkpoint or converted directory.
        config: of the model.
        description: one line for people.
        specs: the base tensors in the order of `weights`.
        other_parts: name -> shape of tensors of parts that fine-tuning leaves out, which `other_weights` gives.
        source_files: files that it is read from, where they are not simply those of the directory.
        left_out: names of tensors that carry nothing, and are in no export.
        kept_parts: False if the directory no longer has the parts that fine-tuning leaves out.
    """

    path: Path
    config: DecoderConfig
    description: str
    specs: tuple[TensorSpec, ...]
    other_parts: Mapping[str, tuple[int, ...]]
    source_files: frozenset[Path]
    left_out: tuple[str, ...]
    kept_parts: bool

    def weights(self, start: int = 0) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """Every base tensor from `specs[start]` on: float32 if it was quantised, else as it is stored."""
        ...

    def other_weights(self, start: int = 0) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor of `other_parts` but the first `start`, as it is stored."""
        ...


def open_base(path: str | Path, kind: BaseKind, storage: BaseStorage) -> BaseWeights:
    """Open a base, reading headers only.

    Args:
        path: Hugging Face safetensors directory, GGUF file, or converted directory.
        kind: "dequantized": linear weights are stored as in training and dequantised, all in float32; "original": as
            the checkpoint has them.
        storage: of training, for "dequantized".

    Raises:
        UserError: whatever `open_source` and `check_source` refuse, a converted directory that is asked for its
            original weights or is quantised otherwise.
    """
    path = Path(path)
    if is_converted(path):
        if kind == "original":
            raise UserError(
                f"{path} holds weights that were quantised when it was converted, not the original ones; use "
                f"`base=dequantized`, or give the checkpoint it was made from as `model`."
            )
        return _Converted(path, storage)
    return _Checkpoint(path, storage if kind == "dequantized" else BaseStorage(QuantizationConfig("none"), adopt=False))


class _Checkpoint:
    """`BaseWeights` of a checkpoint."""

    kept_parts = True

    def __init__(self, path: Path, storage: BaseStorage):
        self.source: TensorSource = open_source(path)
        self.path, self.config = self.source.path, self.source.config
        self.specs = tuple(base_tensors(self.config))
        self._storage = storage.of(self.config)
        check_source(self.source, list(self.specs), self._storage)
        self.description = describe(self.source, list(self.specs), self._storage)
        used = {spec.name for spec in self.specs}
        skipped = re.compile("|".join(f"(?:{pattern})" for pattern in family_of(self.config).skipped) or r"(?!)")
        extra = [name for name in self.source.names() if name not in used]
        self.other_parts: Mapping[str, tuple[int, ...]] = {
            name: self.source.shape(name) for name in extra if skipped.fullmatch(name)
        }
        self.source_files = frozenset(self.source.location(name) for name in self.source.names())
        self.left_out = tuple(name for name in extra if not skipped.fullmatch(name))

    def weights(self, start: int = 0) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """Read, and quantise where that is asked for."""
        if not self._storage.linears and self._storage.default.quant_type == "none":
            for spec in self.specs[start:]:
                if spec.kind == "embedding":
                    check_tied_head(self.source, list(self.specs), spec)
                yield spec, self._read(spec.name)
            return
        values = stream_tensors(self.source, list(self.specs), self._storage, np.dtype(np.float32), start)
        with contextlib.closing(values):
            for spec, value in values:
                yield spec, _as_float(value)
                del value  # or it would be in memory beside the next

    def other_weights(self, start: int = 0) -> Iterator[tuple[str, np.ndarray]]:
        """Read."""
        yield from ((name, self._read(name)) for name in list(self.other_parts)[start:])

    def _read(self, name: str) -> np.ndarray:
        weight = self.source.read(name)
        check_finite(weight, name, self.source.location(name))
        return weight


class _Converted:
    """`BaseWeights` of a converted directory."""

    other_parts: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    source_files: frozenset[Path] = frozenset()
    left_out: tuple[str, ...] = ()

    def __init__(self, path: Path, storage: BaseStorage):
        manifest = read_manifest(path)
        self._stored = ConvertedBase(path, storage.of(converted_config(path)), np.dtype(manifest.dtype))
        self.path, self.config, self.description = path, self._stored.config, self._stored.description
        self._base_tensors = base_tensors(self.config)
        self._by_place = {(spec.path, spec.layer): spec for spec in self._base_tensors}
        self._parts = [
            [self._by_place[tensor.path, layer] for tensor in part.tensors for layer in tensor.indices]
            for part in manifest.parts
        ]
        self.specs = tuple(spec for part in self._parts for spec in part)
        self.kept_parts = not family_of(self.config).other_parts(self.config)

    def weights(self, start: int = 0) -> Iterator[tuple[TensorSpec, np.ndarray]]:
        """Read part by part."""
        first_part = 0
        while first_part < len(self._parts) and start >= len(self._parts[first_part]):
            start -= len(self._parts[first_part])
            first_part += 1
        with contextlib.closing(self._stored.chunks(self._base_tensors, None, first_part)) as chunks:
            for path, first, value in chunks:
                count = 1 if first is None else jax.tree.leaves(value)[0].shape[0]
                skipped = min(start, count)
                start -= skipped
                for i in range(skipped, count):
                    if first is None:
                        yield self._by_place[path, None], _as_float(value)
                    else:
                        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], value)
                        yield self._by_place[path, first + i], _as_float(layer)
                        del layer
                del value  # or it would be in memory beside the next

    def other_weights(self, start: int = 0) -> Iterator[tuple[str, np.ndarray]]:
        """Nothing: a conversion leaves them out."""
        return iter(())


def _as_float(value: QuantizedTensor | np.ndarray) -> np.ndarray:
    return dequantize_on_host(value) if isinstance(value, QuantizedTensor) else np.asarray(value)
