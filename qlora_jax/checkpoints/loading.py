"""The frozen base model in memory, loaded from a checkpoint or a converted directory into stacked arrays.

Memory: `load_base` holds the model it returns, whose buffers are allocated once, filled and never copied. Beside it
there are, where the model is in host memory,

- of a checkpoint of 16 or 32 bits pieces of two tensors, and their scales in float32; of one in 4 bits that is taken
  over, two linears as they are stored;
- of a converted directory one chunk as it is in the file.

Where it is on an accelerator, host memory has five tensors of a checkpoint as the model stores them (two in work, one
being written, two being digested), or two arrays of a converted directory: embedding or head, or a linear's codes, all
layers in a part of 128 MiB, or one layer where that is more.

`tests/reference/plan_load.py` makes bytes of these rules, for any model.
"""

import contextlib
import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.converted import ConvertedBase
from qlora_jax.checkpoints.digests import Digests, digest_of_all
from qlora_jax.checkpoints.host_memory import aligned_empty, is_aligned
from qlora_jax.checkpoints.manifest import is_converted
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.checkpoints.streaming import (
    Chunk,
    Progress,
    TensorPath,
    abstract_stacks,
    check_source,
    describe,
    stream_tensors,
)
from qlora_jax.models import DecoderConfig, TensorSpec, base_tensors
from qlora_jax.quantization import Quantization


@dataclasses.dataclass(frozen=True)
class LoadedBase:
    """A frozen base model in memory.

    Attributes:
        config: read from its config.json, whose contents are `config.source`.
        tensors: {path: QuantizedTensor or jax.Array}, the layers of one path stacked on axis 0.
        quantization: how the linear weights are stored.
        description: one line for people: where the weights come from and how precise they are.
        digest: of every byte of every tensor, SHA-256, of a converted directory as they are stored there; the same from
            a checkpoint and from its conversion to the same storage and dtype.
    """

    config: DecoderConfig
    tensors: dict[TensorPath, Any]
    quantization: Quantization
    description: str
    digest: str


def load_base(
    path: str | Path,
    *,
    quantization: Quantization,
    dtype: Any,
    shardings: Mapping[TensorPath, Any] | None = None,
    progress: Progress | None = None,
) -> LoadedBase:
    """Load a base model into stacked device arrays.

    Args:
        path: converted directory, Hugging Face safetensors directory or GGUF file; the last two are quantised on the
            fly where they are not stored as wanted.
        quantization: how linear weights are to be stored.
        dtype: element type of all other weights but norms, and of dequantised linear weights.
        shardings: path -> a sharding in place of every array of its value, see `qlora_jax.sharding.shardings`: each
            device is filled with its part only. By default all lies on JAX's default device.
        progress: see `Progress`.

    Raises:
        UserError: a converted directory that is damaged or quantised otherwise than asked, and whatever `open_source`,
            `check_source` and `stream_tensors` refuse.
    """
    dtype = jnp.dtype(dtype)
    path, digest = Path(path), None
    stacks: dict[TensorPath, _Stack] = {}

    def places(key: TensorPath, first_layer: int | None, layers: int | None) -> Any:
        return stacks[key].place(first_layer, layers)

    if is_converted(path):
        converted = ConvertedBase(path, quantization, dtype)
        config, description = converted.config, converted.description
        specs, digest = base_tensors(config), converted.digest
        chunks = converted.chunks(specs, progress, places=places)
    else:
        source = open_source(path)
        config, specs = source.config, base_tensors(source.config)
        check_source(source, specs, quantization)
        description = describe(source, specs, quantization)
        # Both threads have work to the end, and copies of large tensors exist while there is little else.
        largest_first = sorted(specs, key=lambda spec: math.prod(spec.shape), reverse=True)
        tensors = stream_tensors(source, largest_first, quantization, dtype, places=places)
        chunks = _source_chunks(tensors, len(specs), progress)
    for key, abstract in abstract_stacks(specs, quantization, dtype).items():
        stacks[key] = _Stack(abstract, None if shardings is None else shardings[key])
    with Digests() as digests, contextlib.closing(chunks):
        for key, layer, value in chunks:
            leaves = stacks[key].leaves(layer, value)
            if digest is None:
                digests.add(key, layer, leaves)
            stacks[key].write(layer, leaves)
            del value, leaves  # before the next are read
    finished = {key: stack.finish() for key, stack in stacks.items()}
    return LoadedBase(config, finished, quantization, description, digest or digest_of_all(digests.of_layer))


def _source_chunks(
    tensors: Generator[tuple[TensorSpec, Any]], total: int, progress: Progress | None
) -> Generator[Chunk]:
    with contextlib.closing(tensors):
        for done, (spec, value) in enumerate(tensors, 1):
            yield spec.path, spec.layer, value
            del value  # before the next is read
            if progress is not None:
                progress(done, total)


class _Stack:
    """One path's destination: every buffer is allocated once and filled layer by layer.

    On CPU the buffers are host memory that jax then uses where it lies, an array that is not stacked is used as it
    comes; on an accelerator they are device memory updated in place, so that the host never holds more than the layers
    being written.
    """

    def __init__(self, abstract: Any, shardings: Any = None):
        leaves, self._structure = jax.tree.flatten(abstract)
        self._shardings = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
        self._on_host = jax.default_backend() == "cpu"
        self._buffers = [
            aligned_empty(leaf.shape, leaf.dtype)
            if self._on_host
            else jnp.empty(leaf.shape, leaf.dtype, device=sharding)
            for leaf, sharding in zip(leaves, self._shardings, strict=True)
        ]

    def place(self, first_layer: int | None, layers: int | None) -> Any:
        """Return host memory to read a value into, which `write` leaves where it is; None on an accelerator.

        See `qlora_jax.checkpoints.streaming.Places`.
        """
        if not self._on_host:
            return None
        views = self._buffers
        if first_layer is not None:
            at = first_layer if layers is None else slice(first_layer, first_layer + layers)
            views = [buffer[at, ...] for buffer in views]
        return jax.tree.unflatten(self._structure, views)

    def leaves(self, first_layer: int | None, value: Any) -> list[Any]:
        """Return the arrays of one layer or of several, each with an axis of layers if the path is stacked."""
        leaves = jax.tree.leaves(value)
        if first_layer is None:
            return leaves
        return [
            leaf if leaf.ndim == buffer.ndim else leaf[None] for leaf, buffer in zip(leaves, self._buffers, strict=True)
        ]

    def write(self, first_layer: int | None, leaves: Sequence[Any]) -> None:
        for i, leaf in enumerate(leaves):
            buffer = self._buffers[i]
            # A converted directory may hold another dtype of what is not quantised.
            rows = leaf if leaf.dtype == buffer.dtype else leaf.astype(buffer.dtype)
            if self._on_host and np.may_share_memory(rows, buffer):  # see `place`
                continue
            if first_layer is not None:
                if self._on_host:
                    buffer[first_layer : first_layer + len(rows)] = rows
                else:
                    self._buffers[i] = _write_rows(buffer, rows, first_layer)
            elif self._on_host:
                self._buffers[i] = rows if is_aligned(rows) else _aligned(rows)
            else:
                self._buffers[i] = jax.device_put(rows, self._shardings[i])

    def finish(self) -> Any:
        buffers, self._buffers = self._buffers, []
        if self._on_host:
            # The alignment makes this free of copies; nothing else keeps a reference to the memory.
            buffers = [
                jax.device_put(buffer, sharding, may_alias=True)
                for buffer, sharding in zip(buffers, self._shardings, strict=True)
            ]
        return jax.tree.unflatten(self._structure, buffers)


def _aligned(array: np.ndarray) -> np.ndarray:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


_write_rows = jax.jit(
    lambda buffer, rows, start: jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, axis=0), donate_argnums=0
)
