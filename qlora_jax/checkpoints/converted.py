"""Reading a converted base (`qlora_jax.checkpoints.conversion` writes it): checked against its manifest, part by part.

Memory: beside what is read the bytes of one chunk of it as they are in the file (`conversion.chunk_bytes`; what earlier
versions converted has one chunk an array). Chunks are read by tensorstore, which orbax writes them with, because orbax
loads whole parts, and takes twice the processor time.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.ahead import results_ahead
from qlora_jax.checkpoints.digests import digest_of_all
from qlora_jax.checkpoints.manifest import CONVERT_AGAIN, MANIFEST_NAME, Manifest, Part, StoredTensor, read_manifest
from qlora_jax.checkpoints.model_files import check_finite, read_json_object
from qlora_jax.checkpoints.streaming import (
    Chunk,
    Places,
    Progress,
    TensorPath,
    abstract_stacks,
    nowhere,
    quantized_leaves,
)
from qlora_jax.errors import UserError
from qlora_jax.files import file_digest, reason, resized_file
from qlora_jax.models import DecoderConfig, TensorSpec, base_tensors, model_config
from qlora_jax.quantization import MixedQuantization, Quantization, QuantizedTensor

# Directory of a part in which orbax keeps the arrays.
_ARRAYS = "state"


class ConvertedBase:
    """A converted directory whose manifest and files have been checked, its tensors not yet read.

    Attributes:
        path: the directory.
        config: read from config.json.
        description: one line for people.

    Raises:
        UserError: another format version or quantisation than expected, or a damaged file; names it.
    """

    def __init__(self, path: Path, quantization: Quantization, dtype: np.dtype):
        self.path = Path(os.path.abspath(path))  # tensorstore takes no .. in another
        self._manifest: Manifest = read_manifest(self.path)
        _check_digests(self.path, self._manifest.files)
        self.config = converted_config(self.path, self._manifest)
        for name, stored in self.config.stored:
            if stored != quantization.of(name):
                raise UserError(
                    f"{path} was converted to {stored}, but {quantization.of(name)} is asked for (of {name}); "
                    "`bits=auto` takes it as it is, or convert the original model again."
                )
        for part in self._manifest.parts:
            if file := resized_file(self.path / part.name, part.files):
                raise UserError(
                    f"{self.path / part.name / file} is missing or does not have its {part.files[file]} bytes; "
                    f"{CONVERT_AGAIN}."
                )
        self.description = f"converted model {path}, made from {self._manifest.source}"
        if jnp.dtype(self._manifest.dtype) != dtype:
            self.description += f"; its unquantised weights are stored as {self._manifest.dtype}, used as {dtype.name}"

    @property
    def digest(self) -> str | None:
        """The base model's digest, see `digest_of_all`; None if the conversion recorded none."""
        digests = {
            (tensor.path, layer): digest
            for part in self._manifest.parts
            for tensor in part.tensors
            # Format 1 had no digests.
            for layer, digest in zip(tensor.indices, tensor.digests, strict=False)
        }
        return digest_of_all(digests) if digests else None

    def chunks(
        self, specs: list[TensorSpec], progress: Progress | None, first_part: int = 0, *, places: Places | None = None
    ) -> Generator[Chunk]:
        """Read the tensors as they are stored, from a part on; each is read when it is its turn.

        While one part is read the files of the next are digested in a thread, which ends with the iterator: close it.

        Args:
            specs: the base tensors of the model.
            progress: see `Progress`.
            first_part: index of the first part to read.
            places: where tensors are read to; by default into memory of their own. With it the part that holds the
                largest array is read first, and the largest tensors of a part: buffers take memory once they are
                written, so that the most is to spare then. Without it all come in the order they are stored in.

        Raises:
            UserError: `specs` are not those stored, or a part cannot be read.
        """
        layers = self._manifest.layers
        expected: dict[TensorPath, set[int | None]] = {}
        for spec in specs:
            expected.setdefault(spec.path, set()).add(spec.layer)
        if layers != expected:
            wrong = sorted(".".join(key) for key in layers.keys() | expected if layers.get(key) != expected.get(key))
            raise UserError(f"{self.path / MANIFEST_NAME} and config.json disagree about {wrong[0]}; {CONVERT_AGAIN}.")
        stored = MixedQuantization(self._manifest.quantization, self.config.stored)
        abstract = abstract_stacks(specs, stored, jnp.dtype(self._manifest.dtype))
        parts = [
            (part, [(tensor, _of_layers(abstract[tensor.path], tensor)) for tensor in part.tensors])
            for part in self._manifest.parts[first_part:]
        ]
        if places is not None:
            parts = [(part, sorted(tensors, key=lambda t: _largest(t[1]), reverse=True)) for part, tensors in parts]
            parts.sort(key=lambda part: max((_largest(declared) for _, declared in part[1]), default=0), reverse=True)
        return self._chunks(parts, len(specs), progress, places or nowhere)

    def _chunks(
        self,
        parts: Sequence[tuple[Part, Sequence[tuple[StoredTensor, Any]]]],
        total: int,
        progress: Progress | None,
        places: Places,
    ) -> Generator[Chunk]:
        checks = (functools.partial(_check_digests, self.path / part.name, part.digests) for part, _ in parts)
        done = 0
        with contextlib.closing(results_ahead(checks, 1)) as checked:
            for (part, tensors), _ in zip(parts, checked, strict=True):
                for tensor, declared in tensors:
                    place = places(tensor.path, tensor.first_layer, tensor.layers)
                    yield tensor.path, tensor.first_layer, _read(self.path / part.name, tensor.path, declared, place)
                    done += tensor.layers
                    if progress is not None:
                        progress(done, total)


def converted_config(path: Path, manifest: Manifest | None = None) -> DecoderConfig:
    """Read the config.json of a converted directory, with the storage of its linears by the manifest."""
    manifest = manifest or read_manifest(path)
    config = model_config(read_json_object(path / "config.json", CONVERT_AGAIN))
    linears = {spec.linear for spec in base_tensors(config) if spec.quantized}
    return dataclasses.replace(config, stored=tuple((name, manifest.storage(name)) for name in sorted(linears)))


def _check_digests(directory: Path, digests: Mapping[str, str]) -> None:
    for name, digest in digests.items():
        file = directory / name
        if not file.is_file() or file_digest(file) != digest:
            raise UserError(f"{file} is missing or not as it was written; {CONVERT_AGAIN}.")


def _of_layers(abstract: Any, tensor: StoredTensor) -> Any:
    """Declare some layers of a path of which `abstract` declares all."""
    if tensor.first_layer is None:
        return abstract
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((tensor.layers, *leaf.shape[1:]), leaf.dtype), abstract)


def _largest(declared: Any) -> int:
    """Bytes of the largest array of a value."""
    return max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(declared))


def _read(part: Path, path: TensorPath, declared: Any, place: Any) -> Any:
    """Read a value of a part: `declared` with arrays, whose floats are finite; see `Places`."""
    if not isinstance(declared, QuantizedTensor):
        return _read_array(part, path, declared, ".".join(path), place)
    read: dict[str, Any] = {
        name: _read_array(part, (*path, name), leaf, ".".join(path), getattr(place, name, None))
        for name, leaf in quantized_leaves(declared).items()
    }
    return dataclasses.replace(declared, **read)


def _chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the places in an array of what is stored as one."""
    for starts in itertools.product(*(range(0, end, size) for end, size in zip(shape, chunk, strict=True))):
        yield (*(slice(start, start + size) for start, size in zip(starts, chunk, strict=True)), ...)


def _read_array(
    part: Path, key: TensorPath, declared: jax.ShapeDtypeStruct, tensor: str, place: np.ndarray | None
) -> np.ndarray:
    """Read an array as orbax stores it; shape and type must be the declared ones, which is seen to before it is read.

    Args:
        part: directory.
        key: of the array in the tree that was saved.
        declared: its shape and type.
        tensor: what it belongs to, for messages.
        place: where to read it to, unless it has another type; by default into memory of its own.
    """
    import tensorstore

    files = {"driver": "file", "path": f"{part / _ARRAYS}/"}
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": files, "path": f"{'.'.join(key)}/"}}
    try:
        stored = tensorstore.open(spec, open=True, read=True).result()
        dtype = stored.dtype.numpy_dtype
        if stored.shape != declared.shape or dtype != declared.dtype:
            raise UserError(
                f"tensor {tensor} in {part} is {dtype}{list(stored.shape)} instead of "
                f"{declared.dtype}{list(declared.shape)}; {CONVERT_AGAIN}."
            )
        array = np.empty(stored.shape, dtype) if place is None or place.dtype != dtype else place
        for chunk in _chunks(stored.shape, stored.chunk_layout.read_chunk_template.shape):
            tensorstore.array(array[chunk]).write(stored[chunk]).result()
    except UserError:
        raise
    except Exception as error:  # tensorstore raises many types for what is missing or damaged
        raise UserError(f"{part} is damaged or missing ({reason(error)}); {CONVERT_AGAIN}.") from error
    if jnp.issubdtype(dtype, jnp.floating):
        check_finite(array, tensor, part)
    return array
