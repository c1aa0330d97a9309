"""Reading a converted base (`qlora_jax.checkpoints.conversion` writes it): checked against its manifest, part by part.

Memory: one part.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.digests import digest_of_all
from qlora_jax.checkpoints.manifest import CONVERT_AGAIN, MANIFEST_NAME, Manifest, read_manifest
from qlora_jax.checkpoints.model_files import check_finite, read_json_object
from qlora_jax.checkpoints.quiet import quiet_orbax
from qlora_jax.checkpoints.streaming import Chunk, Progress, TensorPath, abstract_stacks, quantized_leaves
from qlora_jax.errors import UserError
from qlora_jax.files import file_digest, reason, resized_file
from qlora_jax.models import DecoderConfig, TensorSpec, base_tensors, model_config
from qlora_jax.quantization import MixedQuantization, Quantization, QuantizedTensor


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
        self.path = Path(os.path.abspath(path))  # orbax takes no other
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

    def chunks(self, specs: list[TensorSpec], progress: Progress | None, first_part: int = 0) -> Iterator[Chunk]:
        """Read the tensors as they are stored, in that order; each part, from one on, is read when it is its turn.

        Raises:
            UserError: `specs`, the base tensors of the model, are not those stored, or a part cannot be read.
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
        return self._chunks(abstract, len(specs), progress, first_part)

    def _chunks(
        self, abstract: Mapping[TensorPath, Any], total: int, progress: Progress | None, first_part: int
    ) -> Iterator[Chunk]:
        from orbax.checkpoint import v1 as ocp

        done = 0
        for part in self._manifest.parts[first_part:]:
            file = self.path / part.name
            _check_digests(file, part.digests)
            try:
                with quiet_orbax():
                    tree = ocp.load(file)
            except Exception as error:  # orbax and tensorstore raise many types for a part that is missing or damaged
                raise UserError(f"{file} is damaged or missing ({reason(error)}); {CONVERT_AGAIN}.") from error
            for tensor in part.tensors:
                layers = None if tensor.first_layer is None else tensor.layers
                value = _checked(file, tree, tensor.path, abstract[tensor.path], layers)
                for leaf in jax.tree.leaves(value):
                    if jnp.issubdtype(leaf.dtype, jnp.floating):
                        check_finite(np.asarray(leaf), ".".join(tensor.path), file)
                yield tensor.path, tensor.first_layer, value
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


def _checked(file: Path, tree: dict[str, Any], key: TensorPath, abstract: Any, layers: int | None) -> Any:
    """Take the value of `key`, with the structure of `abstract`; shapes and types must be the declared ones."""
    try:
        node: Any = tree
        for part in key:
            node = node[part]
        if isinstance(abstract, QuantizedTensor):
            node = dataclasses.replace(abstract, **{name: node[name] for name in quantized_leaves(abstract)})
    except (KeyError, TypeError):
        raise UserError(f"{file} lacks tensor {'.'.join(key)}; {CONVERT_AGAIN}.") from None
    for want, got in zip(jax.tree.leaves(abstract), jax.tree.leaves(node), strict=True):
        shape = want.shape if layers is None else (layers, *want.shape[1:])
        if got.shape != shape or got.dtype != want.dtype:
            raise UserError(
                f"tensor {'.'.join(key)} in {file} is {got.dtype}{list(got.shape)} instead of "
                f"{want.dtype}{list(shape)}; {CONVERT_AGAIN}."
            )
    return node
