"""A converted base: quantised once, kept as orbax parts beside config.json and tokenizer files, and read back.

Memory: `convert` holds one tensor of the source, its quantisation and the part being filled; reading holds one part.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.files import COMPANION_FILES, MANIFEST_NAME, file_sizes, is_converted, read_json_object
from qlora_jax.checkpoints.gguf_source import GGUFSource
from qlora_jax.checkpoints.sources import TensorSource, open_source
from qlora_jax.checkpoints.streaming import (
    Chunk,
    Progress,
    TensorPath,
    abstract_stacks,
    abstract_tensor,
    check_source,
    inventory,
    quantized_leaves,
    stream_tensors,
)
from qlora_jax.checkpoints.tokenizer import tokenizer_from_gguf
from qlora_jax.errors import UserError
from qlora_jax.models import TensorSpec, base_tensors
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor

FORMAT = "qlora-jax base model"
FORMAT_VERSION = 1

# A part is one orbax checkpoint. Large enough that orbax's fixed cost (about 50 ms a save) does not count, small enough
# that buffering one, and orbax's copy of it, stays far below the memory ceiling of a conversion.
_PART_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` wrote.

    Attributes:
        directory: the converted model.
        bytes_by_class: as `inventory` counts them.
        tensors: base tensors written, one per layer.
        parameters: numbers in all of them.
        quantized_parameters: numbers in those stored in 4 or 8 bits.
        seconds: wall time.
    """

    directory: Path
    bytes_by_class: dict[str, int]
    tensors: int
    parameters: int
    quantized_parameters: int
    seconds: float

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
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Quantise a checkpoint once and keep the result: orbax parts, config.json, tokenizer files, qlora_jax.json.

    Everything is written to a hidden sibling of `output_dir` and renamed at the end, so that what carries the name is
    complete; the sibling of a run that was killed is replaced by the next.

    Args:
        source_path: Hugging Face safetensors directory or GGUF file.
        output_dir: directory to make; it must not exist, or be empty.
        quantization: how to store linear weights.
        dtype: element type of all other weights but norms.
        overwrite: replace an earlier conversion at `output_dir` once the new one is complete.
        progress: see `Progress`.

    Raises:
        UserError: anything `open_source` or `stream_base` refuses, an `output_dir` in use, no space on the disk.
    """
    started = time.perf_counter()
    dtype = jnp.dtype(dtype)
    output = Path(os.path.abspath(output_dir))
    source = open_source(source_path)
    specs = check_source(source, quantization)
    _check_output(output, overwrite)
    tensors = [abstract_tensor(spec, quantization, dtype, ()) for spec in specs]
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tensors))
    with _staging_directory(output, needed) as staging:
        _write_companions(source, staging)
        parts = _PartWriter(staging)
        sizes = {"base_packed": 0, "scales": 0, "unquantised": 0}
        for done, (spec, value) in enumerate(stream_tensors(source, specs, quantization, dtype), 1):
            for name, size in inventory([value]).items():
                sizes[name] += size
            parts.add(spec, value)
            if progress is not None:
                progress(done, len(specs))
        parts.flush()
        quantized = [spec for spec in specs if spec.quantized and quantization.quant_type != "none"]
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "source": source.description,
            "quantization": dataclasses.asdict(quantization),
            "dtype": dtype.name,
            "tensors": len(specs),
            "parameters": sum(_size(spec) for spec in specs),
            "quantized_parameters": sum(_size(spec) for spec in quantized),
            "bytes": sizes,
            "parts": parts.written,
        }
        _write_text(staging / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")
        _publish(staging, output)
    return Conversion(
        directory=output,
        bytes_by_class=sizes,
        tensors=manifest["tensors"],
        parameters=manifest["parameters"],
        quantized_parameters=manifest["quantized_parameters"],
        seconds=time.perf_counter() - started,
    )


def open_converted(
    path: Path, quantization: QuantizationConfig, dtype: np.dtype, progress: Progress | None
) -> tuple[dict[str, Any], str, Iterator[Chunk]]:
    """Open a directory that `convert` made; its tensors are read when the iterator is advanced.

    Args:
        path: the directory.
        quantization: how linear weights are expected to be stored.
        dtype: element type to cast all other weights but norms to.
        progress: see `Progress`.

    Returns:
        (contents of config.json, one line for people, stacks of layers in the order they are stored).

    Raises:
        UserError: another format version or quantisation than expected, or a damaged file; names it.
    """
    again = "convert the model again"
    manifest = read_json_object(path / MANIFEST_NAME, again)
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path / MANIFEST_NAME} has format {manifest.get('format')!r} version {manifest.get('format_version')!r}, "
            f"not {FORMAT!r} version {FORMAT_VERSION}; {again}."
        )
    config = read_json_object(path / "config.json", again)
    try:
        stored = QuantizationConfig(**manifest["quantization"])
        stored_dtype, source, parts = jnp.dtype(manifest["dtype"]), manifest["source"], manifest["parts"]
        covered: dict[TensorPath, int] = {}
        for part in parts:
            for tensor in part["tensors"]:
                key = tuple(tensor["path"])
                covered[key] = covered.get(key, 0) + tensor["layers"]
        files = {Path(part["name"]) / file: size for part in parts for file, size in part["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path / MANIFEST_NAME} is malformed; {again}.") from None
    if _describe(stored) != _describe(quantization):
        raise UserError(
            f"{path} was converted to {_describe(stored)}, but {_describe(quantization)} is asked for; pass the flags "
            f"it was converted with, or convert the original model again."
        )
    # Found here, a damaged file is one sentence; found by tensorstore, it is one traceback for each of its arrays.
    for file, size in files.items():
        if not (path / file).is_file() or (path / file).stat().st_size != size:
            raise UserError(f"{path / file} is missing or does not have its {size} bytes; {again}.")
    abstract = abstract_stacks(config, stored, stored_dtype)
    expected = {key: 1 if value_stack is None else value_stack for key, value_stack in _layer_counts(config).items()}
    if covered != expected:
        wrong = sorted(".".join(key) for key in covered.keys() ^ expected.keys()) or ["layers"]
        raise UserError(f"{path / MANIFEST_NAME} and config.json disagree about {wrong[0]}; {again}.")
    description = f"converted model {path}, made from {source}"
    if stored_dtype != dtype:
        description += f"; its unquantised weights are stored as {stored_dtype.name}, used as {dtype.name}"
    return config, description, _converted_chunks(path, parts, abstract, dtype, progress)


# --- writing


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_converted(output):
        raise UserError(f"{output} exists and is not a converted model; choose another output directory.")
    if not overwrite:
        raise UserError(f"{output} already holds a converted model; pass --overwrite to replace it.")


@contextmanager
def _staging_directory(output: Path, needed: int) -> Iterator[Path]:
    staging = output.parent / f".{output.name}.incomplete"
    with _disk_errors(staging):
        staging.mkdir(parents=True, exist_ok=True)
    # The lock dies with its process: a directory left by a killed run is free, that of a running one is not.
    lock = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another conversion is writing {output}; wait for it or choose another directory."
            ) from None
        for leftover in staging.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            free = shutil.disk_usage(staging).free
            if needed > free:
                raise UserError(
                    f"the converted model needs {needed / 1e9:.2f} GB, but the disk of {output} has only "
                    f"{free / 1e9:.2f} GB left; free some space or choose another output directory."
                )
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write {path}: {reason}; free some space or choose another output directory."
        ) from error


def _write_text(path: Path, text: str) -> None:
    with _disk_errors(path), open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _publish(staging: Path, output: Path) -> None:
    """Rename the finished directory into place; an earlier conversion there is moved away first, then deleted."""
    replaced = output.parent / f".{output.name}.replaced"
    with _disk_errors(output):
        shutil.rmtree(replaced, ignore_errors=True)
        if is_converted(output):
            os.rename(output, replaced)
        os.rename(staging, output)
        shutil.rmtree(replaced, ignore_errors=True)


def _write_companions(source: TensorSource, directory: Path) -> None:
    """config.json and whatever the tokenizer consists of; for GGUF both are made from its metadata."""
    if isinstance(source, GGUFSource):
        _write_text(directory / "config.json", json.dumps(source.config, indent=2) + "\n")
        tokenizer = tokenizer_from_gguf(source.metadata, source.path)
        with _disk_errors(directory):
            tokenizer.save_pretrained(directory)
        return
    for name in COMPANION_FILES:
        if (source.path / name).is_file():
            with _disk_errors(directory / name):
                shutil.copyfile(source.path / name, directory / name)


class _PartWriter:
    """Collects tensors and writes them as orbax checkpoints of about `_PART_BYTES`, layers of one path stacked."""

    def __init__(self, directory: Path):
        self.written: list[dict[str, Any]] = []
        self._directory = directory
        self._pending: dict[TensorPath, list[tuple[int | None, QuantizedTensor | np.ndarray]]] = {}
        self._bytes = 0

    def add(self, spec: TensorSpec, value: QuantizedTensor | np.ndarray) -> None:
        if self._bytes and self._bytes + value.nbytes > _PART_BYTES:
            self.flush()
        self._pending.setdefault(spec.path, []).append((spec.layer, value))
        self._bytes += value.nbytes

    def flush(self) -> None:
        if not self._pending:
            return
        tree: dict[str, Any] = {}
        contents = []
        for path in list(self._pending):
            layers = self._pending.pop(path)
            leaf = layers[0][1] if layers[0][0] is None else _stack([value for _, value in layers])
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = quantized_leaves(leaf) if isinstance(leaf, QuantizedTensor) else leaf
            contents.append({"path": list(path), "first_layer": layers[0][0], "layers": len(layers)})
        name = f"part-{len(self.written):05d}"
        _save_tree(self._directory / name, jax.tree.map(np.asarray, tree))
        self.written.append({"name": name, "files": file_sizes(self._directory / name), "tensors": contents})
        self._bytes = 0


def _stack(values: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *values)


def _save_tree(path: Path, tree: dict[str, Any]) -> None:
    from orbax.checkpoint import v1 as ocp

    # Packed 4-bit codes do not compress; without zstd a save makes one copy less and a load takes a fifth of the time.
    context = ocp.Context()
    context.array.saving.use_compression = False
    try:
        with context:
            ocp.save(path, tree)
    except Exception as error:  # tensorstore reports a full disk as ValueError or RuntimeError, with errno in its text
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot write {path}: {reason}; free some space or choose another output directory."
        ) from error


def _size(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64))


# --- reading


def _layer_counts(config: dict[str, Any]) -> dict[TensorPath, int | None]:
    counts: dict[TensorPath, int | None] = {}
    for spec in base_tensors(config):
        counts[spec.path] = None if spec.layer is None else (counts.get(spec.path) or 0) + 1
    return counts


def _describe(quantization: QuantizationConfig) -> str:
    if quantization.quant_type == "none":
        return "16-bit weights"
    if quantization.quant_type == "int8":
        return "int8"
    double = "with" if quantization.double_quant else "without"
    return f"{quantization.quant_type} in blocks of {quantization.block_size} {double} double quantisation"


def _converted_chunks(
    path: Path, parts: list[dict[str, Any]], abstract: dict[TensorPath, Any], dtype: np.dtype, progress: Progress | None
) -> Iterator[Chunk]:
    from orbax.checkpoint import v1 as ocp

    total = sum(tensor["layers"] for part in parts for tensor in part["tensors"])
    done = 0
    for part in parts:
        file = path / part["name"]
        try:
            tree = ocp.load(file)
        except Exception as error:  # orbax and tensorstore raise many types for a part that is missing or damaged
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{file} is damaged or missing ({reason}); convert the model again.") from error
        for tensor in part["tensors"]:
            key, first, layers = tuple(tensor["path"]), tensor["first_layer"], tensor["layers"]
            value = _checked(file, tree, key, abstract[key], None if first is None else layers)
            if not isinstance(value, QuantizedTensor) and abstract[key].dtype != np.float32:
                value = value.astype(dtype)
            yield key, first, value
            done += layers
            if progress is not None:
                progress(done, total)


def _checked(file: Path, tree: dict[str, Any], key: TensorPath, abstract: Any, layers: int | None) -> Any:
    """The value stored under `key`, with the structure of `abstract`; shapes and types must be the declared ones."""
    try:
        node: Any = tree
        for part in key:
            node = node[part]
        if isinstance(abstract, QuantizedTensor):
            node = dataclasses.replace(abstract, **{name: node[name] for name in quantized_leaves(abstract)})
    except (KeyError, TypeError):
        raise UserError(f"{file} lacks tensor {'.'.join(key)}; convert the model again.") from None
    for want, got in zip(jax.tree.leaves(abstract), jax.tree.leaves(node), strict=True):
        shape = want.shape if layers is None else (layers, *want.shape[1:])
        if got.shape != shape or got.dtype != want.dtype:
            raise UserError(
                f"tensor {'.'.join(key)} in {file} is {got.dtype}{list(got.shape)} instead of "
                f"{want.dtype}{list(shape)}; convert the model again."
            )
    return node
