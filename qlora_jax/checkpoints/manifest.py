"""The manifest of a converted directory, `qlora_jax.json`: how its weights are stored and which file holds which.

It is written last, so that a directory that has one is complete. A part is one orbax checkpoint, `part-00000` and so
on, with layers that follow each other in one path of the model stacked on axis 0.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter

from qlora_jax.checkpoints.model_files import is_inside, json_object, read_limited
from qlora_jax.errors import UserError
from qlora_jax.files import checked_contents
from qlora_jax.json_text import parse_typed
from qlora_jax.quantization import QuantizationConfig

MANIFEST_NAME = "qlora_jax.json"
FORMAT = "qlora-jax base model"
FORMAT_VERSION = 3
CONVERT_AGAIN = "convert the model again"
"""Advice in messages about a converted directory that cannot be used."""

_MAX_LAYERS = 1 << 12


def _inside(name: str) -> str:
    """Refuse a path that leaves where it starts: a manifest must not make us read files outside its directory."""
    if not is_inside(name):
        raise ValueError("should be a path below the directory")
    return name


def _plain(name: str) -> str:
    if "/" in _inside(name):
        raise ValueError("should be a plain name")
    return name


def _floating(dtype: str) -> str:
    # NumPy reads other names as programs of a kind, with errors of many types.
    if dtype not in ("bfloat16", "float16", "float32", "float64"):
        raise ValueError("should be the name of a floating type")
    return dtype


def _complete(fields: Any) -> Any:
    """Refuse storage that leaves a field to its default."""
    names = {field.name for field in dataclasses.fields(QuantizationConfig)}
    if not isinstance(fields, dict) or set(fields) != names:
        raise ValueError(f"should have {', '.join(sorted(names))}")
    return fields


# A field that is not known here would be left out of what is read.
_NOTHING_ELSE = ConfigDict(extra="forbid")
_Count = Annotated[int, Field(ge=0, lt=2**63)]


def layer_indices(first_layer: int | None, layers: int) -> Sequence[int | None]:
    """List the indices of layers that follow each other; [None] for a tensor that is not stacked."""
    return [None] if first_layer is None else range(first_layer, first_layer + layers)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Layers of one path of the model in one part.

    Attributes:
        path: path in the model, e.g. ("layers", "self_attn", "q_proj", "weight").
        first_layer: index of the first on the path's stacked axis, None for a path that is not stacked.
        layers: how many layers are stored; 1 for a path that is not stacked.
        digests: of each layer, see `qlora_jax.checkpoints.digests`; format 1 had none.
    """

    __pydantic_config__ = _NOTHING_ELSE

    path: Annotated[tuple[str, ...], Field(min_length=1)]
    first_layer: Annotated[int, Field(ge=0, le=_MAX_LAYERS)] | None
    layers: Annotated[int, Field(ge=1, le=_MAX_LAYERS)]
    digests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse several layers of a path that is not stacked, and another number of digests than of layers."""
        if self.first_layer is None and self.layers != 1:
            raise ValueError("should have one layer without first_layer")
        if len(self.digests) not in (0, self.layers):
            raise ValueError("should have a digest for each layer")

    @property
    def indices(self) -> Sequence[int | None]:
        """Indices of its layers, see `layer_indices`."""
        return layer_indices(self.first_layer, self.layers)


@dataclasses.dataclass(frozen=True)
class Part:
    """One orbax checkpoint of a converted directory.

    Attributes:
        name: of its directory, a plain name.
        files: {path within it: bytes}.
        tensors: its contents.
        digests: {path within it: SHA-256}; format 1 had none.
    """

    __pydantic_config__ = _NOTHING_ELSE

    name: Annotated[str, AfterValidator(_plain)]
    files: dict[Annotated[str, AfterValidator(_inside)], _Count]
    tensors: tuple[StoredTensor, ...]
    digests: dict[Annotated[str, AfterValidator(_inside)], str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a file without a digest beside others that have one, which would be read unchecked."""
        if self.digests and self.digests.keys() != self.files.keys():
            raise ValueError("should have a digest for each of its files")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of `qlora_jax.json`.

    Attributes:
        source: one line for people: the checkpoint that was converted.
        quantization: storage of linear weights.
        linears: of those that are stored otherwise, by the name of the linear.
        dtype: element type of all other weights but norms, which are float32.
        tensors: base tensors stored, one per layer.
        parameters: numbers in all of them.
        quantized_parameters: numbers in those stored in 4 or 8 bits.
        bytes: of buffers by class, as `qlora_jax.checkpoints.streaming.inventory` counts them.
        parts: orbax checkpoints, in the order they were written.
        files: {name: SHA-256} of config.json and the tokenizer's files; format 1 had none.
    """

    source: str
    quantization: Annotated[QuantizationConfig, BeforeValidator(_complete)]
    dtype: Annotated[str, AfterValidator(_floating)]
    tensors: _Count
    parameters: _Count
    quantized_parameters: _Count
    bytes: dict[str, _Count]
    parts: tuple[Part, ...]
    files: dict[Annotated[str, AfterValidator(_plain)], str] = dataclasses.field(default_factory=dict)
    linears: dict[str, Annotated[QuantizationConfig, BeforeValidator(_complete)]] = dataclasses.field(
        default_factory=dict
    )

    def storage(self, linear: str) -> QuantizationConfig:
        """Return the storage of a linear by its name."""
        return self.linears.get(linear, self.quantization)

    def to_json(self) -> dict[str, Any]:
        """Make the JSON object of the file."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @functools.cached_property
    def layers(self) -> Mapping[tuple[str, ...], set[int | None]]:
        """The stored layers of every path, {None} for a path that is not stacked; ValueError if one is stored twice."""
        found: dict[tuple[str, ...], set[int | None]] = {}
        for tensor in (tensor for part in self.parts for tensor in part.tensors):
            layers = found.setdefault(tensor.path, set())
            if not layers.isdisjoint(tensor.indices):
                raise ValueError(f"{'.'.join(tensor.path)} is stored twice")
            layers.update(tensor.indices)
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
    raw = read_limited(file, CONVERT_AGAIN)
    content = json_object(raw, file)
    version = content.get("format_version")
    if content.get("format") != FORMAT or version not in range(1, FORMAT_VERSION + 1):
        raise UserError(
            f"{file} has format {content.get('format')!r} version {version!r}, not {FORMAT!r} version 1 to "
            f"{FORMAT_VERSION}; {CONVERT_AGAIN}."
        )
    if version != 1:
        try:
            checked_contents(content)
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); {CONVERT_AGAIN}.") from None
    manifest: Manifest = parse_typed(raw, _MANIFEST, f"{file}: ")
    try:
        _ = manifest.layers
    except ValueError as error:
        raise UserError(f"{file}: {error}; {CONVERT_AGAIN}.") from None
    return manifest


_MANIFEST = TypeAdapter(Manifest)
