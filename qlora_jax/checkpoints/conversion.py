"""Writing a converted base: quantised once, kept as orbax parts beside config.json and tokenizer files.

Memory: the quantisations of three tensors, and a part three times: as it is filled, as orbax copies it, and in
tensorstore's buffers.
"""

import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import TypeAdapter, ValidationError

from qlora_jax.checkpoints.companions import write_companions
from qlora_jax.checkpoints.digests import layer_digests
from qlora_jax.checkpoints.journal import (
    Journal,
    fingerprint,
    resumable_directory,
    say_continuing,
    versions,
)
from qlora_jax.checkpoints.manifest import MANIFEST_NAME, Manifest, Part, StoredTensor, is_converted
from qlora_jax.checkpoints.sources import TensorSource, open_source
from qlora_jax.checkpoints.streaming import (
    Progress,
    TensorPath,
    abstract_tensor,
    check_source,
    describe,
    inventory,
    quantized_leaves,
    stream_tensors,
)
from qlora_jax.errors import UserError
from qlora_jax.files import JOURNAL_NAME, check_room, file_digest, file_sizes, write_checked_json, write_errors
from qlora_jax.models import TensorSpec, base_tensors
from qlora_jax.quantization import MixedQuantization, QuantizationConfig, QuantizedTensor

# A part is one orbax checkpoint. Large enough that orbax's fixed cost (about 50 ms a save) does not count, small enough
# that buffering one, and orbax's copy of it, stays far below the memory ceiling of a conversion.
_PART_BYTES = 128 << 20
# A load takes the memory of a chunk beside the model; tensorstore takes a fixed time for each.
_CHUNK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of `convert`.

    Attributes:
        directory: the converted model.
        bytes_by_class: as `inventory` counts them.
        tensors: base tensors written, one per layer.
        parameters: numbers in all of them.
        quantized_parameters: numbers in those stored in 4 or 8 bits.
        seconds: wall time.
        description: what was read, and what was made of it, in one line.
    """

    directory: Path
    bytes_by_class: dict[str, int]
    tensors: int
    parameters: int
    quantized_parameters: int
    seconds: float
    description: str

    @property
    def bits_per_parameter(self) -> float | None:
        """Bits per quantised parameter, scales included, counted from buffers (QLoRA section 3: 4.127 with DQ)."""
        if not self.quantized_parameters:
            return None
        stored = self.bytes_by_class["base_packed"] + self.bytes_by_class["scales"]
        return 8 * stored / self.quantized_parameters


def convert(
    source_path: str | Path,
    output_dir: str | Path,
    quantization: QuantizationConfig,
    dtype: Any,
    *,
    adopt: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Quantise a checkpoint once and keep the result: orbax parts, config.json, tokenizer files, qlora_jax.json.

    Everything is written to a hidden sibling of `output_dir` and renamed at the end, so that what carries the name is
    complete. The same conversion goes on after the last whole part of one that was killed or found the disk full.

    Args:
        source_path: Hugging Face safetensors directory or GGUF file.
        output_dir: directory to make; it must not exist, or be empty.
        quantization: how to store linear weights.
        dtype: element type of all other weights but norms.
        adopt: store linears that the checkpoint holds quantised as they are, whatever `quantization` says.
        overwrite: replace an earlier conversion at `output_dir` once the new one is complete.
        progress: see `Progress`.

    Raises:
        UserError: anything `open_source`, `check_source` or `stream_tensors` refuses, an `output_dir` in use, no space
            on the disk.
    """
    started = time.perf_counter()
    dtype = jnp.dtype(dtype)
    output = Path(os.path.abspath(output_dir))
    source = open_source(source_path)
    specs = base_tensors(source.config)
    kept = source.config.stored if adopt else ()
    storage = MixedQuantization(quantization, kept)
    check_source(source, specs, storage)
    _check_output(output, overwrite)
    tensors = [abstract_tensor(spec, storage, dtype, ()) for spec in specs]
    identity = {
        "command": "convert",
        "versions": versions(),
        "source": fingerprint(source.path, {source.location(name) for name in source.names()}),
        "quantization": dataclasses.asdict(quantization),
        "dtype": dtype.name,
        "adopt": adopt,
        "part_bytes": _PART_BYTES,
    }
    with resumable_directory(output, identity, replace=overwrite) as journal:
        parts = _PartWriter(journal)
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tensors)) - sum(parts.bytes.values())
        what = "the rest of the converted model" if parts.written else "the converted model"
        check_room(journal.directory, needed, f"the disk of {output.parent}", what)
        write_companions(source.path, source.config, journal.directory)
        manifest = _write_parts(source, specs, storage, dtype, parts, progress)
        write_checked_json(journal.directory / MANIFEST_NAME, manifest.to_json())
    return Conversion(
        directory=output,
        bytes_by_class=manifest.bytes,
        tensors=manifest.tensors,
        parameters=manifest.parameters,
        quantized_parameters=manifest.quantized_parameters,
        seconds=time.perf_counter() - started,
        description=manifest.source,
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_converted(output):
        raise UserError(f"{output} exists and is not a converted model; choose another output directory.")
    if not overwrite:
        raise UserError(f"{output} already holds a converted model; set `overwrite` to replace it.")


def _write_parts(
    source: TensorSource,
    specs: list[TensorSpec],
    quantization: MixedQuantization,
    dtype: np.dtype,
    parts: "_PartWriter",
    progress: Progress | None,
) -> Manifest:
    """Quantise tensor by tensor and write the parts that are not there yet; return what is."""
    start = sum(tensor.layers for part in parts.written for tensor in part.tensors)
    say_continuing(start, len(specs))
    for done, (spec, value) in enumerate(stream_tensors(source, specs, quantization, dtype, start), start + 1):
        parts.add(spec, value)
        if progress is not None:
            progress(done, len(specs))
    parts.flush()
    quantized = [spec for spec in specs if spec.quantized and quantization.of(spec.linear).quant_type != "none"]
    return Manifest(
        source=describe(source, specs, quantization),
        quantization=quantization.default,
        linears=dict(quantization.linears),
        dtype=dtype.name,
        tensors=len(specs),
        parameters=sum(_size(spec) for spec in specs),
        quantized_parameters=sum(_size(spec) for spec in quantized),
        bytes=parts.bytes,
        parts=tuple(parts.written),
        files={
            file.name: file_digest(file)
            for file in sorted(parts.directory.iterdir())
            if file.is_file() and file.name != JOURNAL_NAME
        },
    )


class _PartWriter:
    """Collects tensors and writes them as orbax checkpoints of about `_PART_BYTES`, layers of one path stacked.

    Parts of an earlier process are kept up to the first that is not as it was written.

    Attributes:
        written: all parts so far.
        bytes: in them by class, see `inventory`.
        directory: of the parts.
    """

    def __init__(self, journal: Journal):
        self.written: list[Part] = []
        self.bytes = {"base_packed": 0, "scales": 0, "unquantised": 0}
        self.directory = journal.directory
        self._journal = journal
        self._pending: dict[TensorPath, list[tuple[int | None, QuantizedTensor | np.ndarray]]] = {}
        self._bytes = 0
        for record in journal.records:
            try:
                recorded = _RECORD.validate_python(record)
            except ValidationError:
                break
            if not _is_whole(self.directory, recorded.part):
                break
            self._count(recorded)
        journal.keep(len(self.written), [part.name for part in self.written])

    def add(self, spec: TensorSpec, value: QuantizedTensor | np.ndarray) -> None:
        if self._bytes and self._bytes + value.nbytes > _PART_BYTES:
            self.flush()
        self._pending.setdefault(spec.path, []).append((spec.layer, value))
        self._bytes += value.nbytes

    def flush(self) -> None:
        if not self._pending:
            return
        tree: dict[str, Any] = {}
        contents, values = [], []
        for path in list(self._pending):
            layers = self._pending.pop(path)
            leaf = layers[0][1] if layers[0][0] is None else _stack([value for _, value in layers])
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = quantized_leaves(leaf) if isinstance(leaf, QuantizedTensor) else leaf
            values.append(leaf)
            digests = layer_digests(layers[0][0], jax.tree.leaves(leaf))
            contents.append(StoredTensor(path, layers[0][0], len(layers), digests))
        name = f"part-{len(self.written):05d}"
        with write_errors(self.directory / name, self._journal.hint, orbax=True):
            _save_tree(self.directory / name, jax.tree.map(np.asarray, tree))
        sizes = file_sizes(self.directory / name)
        files = {file: file_digest(self.directory / name / file) for file in sizes}
        recorded = _Recorded(Part(name, sizes, tuple(contents), files), inventory(values))
        self._journal.add(dataclasses.asdict(recorded))
        self._count(recorded)
        self._bytes = 0

    def _count(self, recorded: "_Recorded") -> None:
        self.written.append(recorded.part)
        for name, size in recorded.bytes.items():
            self.bytes[name] += size


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """A part in the journal, and its bytes by class."""

    part: Part
    bytes: dict[str, int]


_RECORD = TypeAdapter(_Recorded)


def _is_whole(directory: Path, part: Part) -> bool:
    """Compare a part with the digests of its files."""
    path = directory / part.name
    if path.is_symlink() or not path.is_dir() or file_sizes(path) != part.files:
        return False
    return all(file_digest(path / name) == digest for name, digest in part.digests.items())


def _stack(values: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *values)


def chunk_bytes(array: Any) -> int:
    """Return the bytes that an array's chunks may have at most.

    orbax only makes chunks that divide the axes, so that it would cut one of a prime length into single rows: chunks
    are the least fraction of the longest axis that has `_CHUNK_BYTES`.
    """
    longest = max(array.shape, default=1)
    row = array.size * array.dtype.itemsize // longest
    divisors = [n for n in range(1, math.isqrt(longest) + 1) if longest % n == 0]
    sizes = (row * n for divisor in divisors for n in (divisor, longest // divisor))
    return min((size for size in sizes if size >= _CHUNK_BYTES), default=_CHUNK_BYTES)


def _save_tree(path: Path, tree: dict[str, Any]) -> None:
    from orbax.checkpoint import v1 as ocp

    # Packed 4-bit codes do not compress; without zstd a save makes one copy less and a load takes a fifth of the time.
    context = ocp.Context()
    context.array.saving.use_compression = False
    options = type(context.array.saving.storage_options)
    context.array.saving.scoped_storage_options_creator = lambda key, leaf: options(chunk_byte_size=chunk_bytes(leaf))
    with context:
        ocp.save(path, tree)


def _size(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64))
