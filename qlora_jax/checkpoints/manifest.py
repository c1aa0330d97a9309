"""The manifest of a converted directory, `qlora_jax.json`: how its weights are stored and which file holds which.

It is written last, so that a directory that has one is complete. A part is one orbax checkpoint, `part-00000` and so
on, with layers that follow each other in one path of the model stacked on axis 0.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp

from qlora_jax.checkpoints.model_files import read_json_object
from qlora_jax.errors import UserError
from qlora_jax.quantization import QuantizationConfig

MANIFEST_NAME = "qlora_jax.json"
FORMAT = "qlora-jax base model"
FORMAT_VERSION = 1
CONVERT_AGAIN = "convert the model again"
"""Advice in messages about a converted directory that cannot be used."""

_MAX_LAYERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Layers of one path of the model in one part.

    Attributes:
        path: path in the model, e.g. ("layers", "self_attn", "q_proj", "weight").
        first_layer: index of the first on the path's stacked axis, None for a path that is not stacked.
        layers: how many layers are stored; 1 for a path that is not stacked.
    """

    path: tuple[str, ...]
    first_layer: int | None
    layers: int


@dataclasses.dataclass(frozen=True)
class Part:
    """One orbax checkpoint of a converted directory.

    Attributes:
        name: of its directory, a plain name.
        files: {path within it: bytes}.
        tensors: its contents.
    """

    name: str
    files: dict[str, int]
    tensors: tuple[StoredTensor, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of `qlora_jax.json`.

    Attributes:
        source: one line for people: the checkpoint that was converted.
        quantization: storage of linear weights.
        dtype: element type of all other weights but norms, which are float32.
        tensors: base tensors stored, one per layer.
        parameters: numbers in all of them.
        quantized_parameters: numbers in those stored in 4 or 8 bits.
        bytes: of buffers by class, as `qlora_jax.checkpoints.streaming.inventory` counts them.
        parts: orbax checkpoints, in the order they were written.
    """

    source: str
    quantization: QuantizationConfig
    dtype: str
    tensors: int
    parameters: int
    quantized_parameters: int
    bytes: dict[str, int]
    parts: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        """Make the JSON object of the file."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Manifest":
        """Read the JSON object of the file.

        Raises:
            ValueError, TypeError, KeyError or AttributeError: it is not what `to_json` makes.
        """
        _require(isinstance(content["source"], str))
        jnp.dtype(content["dtype"])
        fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
        fields["quantization"] = QuantizationConfig(**content["quantization"])
        fields["parts"] = tuple(_part(part) for part in content["parts"])
        return cls(**fields)

    def layers(self) -> dict[tuple[str, ...], set[int | None]]:
        """Collect the stored layers of every path, {None} for a path that is not stacked.

        Raises:
            ValueError: a layer is stored twice.
        """
        found: dict[tuple[str, ...], set[int | None]] = {}
        for tensor in (tensor for part in self.parts for tensor in part.tensors):
            layers = found.setdefault(tensor.path, set())
            first = tensor.first_layer
            new: set[int | None] = {None} if first is None else set(range(first, first + tensor.layers))
            _require(not layers & new)
            layers |= new
        return found


def is_converted(path: str | Path) -> bool:
    """Tell if `path` is a finished directory of `qlora_jax.checkpoints.conversion.convert`."""
    return (Path(path) / MANIFEST_NAME).is_file()


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a converted directory.

    Raises:
        UserError: the file is missing, malformed, or of another format version.
    """
    file = directory / MANIFEST_NAME
    content = read_json_object(file, CONVERT_AGAIN)
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format {content.get('format')!r} version {content.get('format_version')!r}, "
            f"not {FORMAT!r} version {FORMAT_VERSION}; {CONVERT_AGAIN}."
        )
    try:
        manifest = Manifest.from_json(content)
        manifest.layers()
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file} is malformed; {CONVERT_AGAIN}.") from None
    return manifest


def _part(content: Mapping[str, Any]) -> Part:
    name, files = content["name"], dict(content["files"])
    # A manifest must not make us read files outside its directory.
    _require(_is_inside(name) and "/" not in name)
    _require(all(_is_inside(file) and _is_count(size) for file, size in files.items()))
    return Part(name, files, tuple(_stored_tensor(tensor) for tensor in content["tensors"]))


def _stored_tensor(content: Mapping[str, Any]) -> StoredTensor:
    path, first, layers = tuple(content["path"]), content["first_layer"], content["layers"]
    _require(bool(path) and all(isinstance(name, str) for name in path))
    _require(_is_count(layers) and 0 < layers <= _MAX_LAYERS)
    _require(layers == 1 if first is None else _is_count(first))
    return StoredTensor(path, first, layers)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_inside(name: Any) -> bool:
    """Tell if `name` is a relative path that stays below where it starts."""
    return (
        isinstance(name, str) and not PurePosixPath(name).is_absolute() and not {"", ".", ".."} & set(name.split("/"))
    )
