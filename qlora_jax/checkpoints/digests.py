"""Digests of a base model's tensors, computed from the bytes that are loaded or written: no tensor is read for them."""

import collections
import concurrent.futures
import hashlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from qlora_jax.checkpoints.manifest import layer_indices
from qlora_jax.checkpoints.streaming import TensorPath

# Hashing runs beside quantising, which takes longer; chunks in work are kept in memory.
_WORKERS, _IN_WORK = 2, 2


class Digests:
    """SHA-256 of each layer of each tensor; add chunks within a `with` block.

    It is of dtype, shape and bytes of the tensor's arrays, packed codes and scales, however layers are grouped.

    Attributes:
        of_layer: (path, layer) -> digest; complete once the block has ended.
    """

    def __init__(self) -> None:
        self.of_layer: dict[tuple[TensorPath, int | None], str] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(_WORKERS)
        self._in_work: collections.deque[concurrent.futures.Future[None]] = collections.deque()

    def __enter__(self) -> "Digests":
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for all that was added."""
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self._in_work:
                future.result()

    def add(self, path: TensorPath, first_layer: int | None, leaves: Sequence[Any]) -> None:
        """Take in layers of a tensor.

        Args:
            path: in the model.
            first_layer: index of the first; None for a tensor that is not stacked.
            leaves: arrays of the value, each with a leading axis of layers if it is stacked; not changed before the
                block ends.
        """
        while len(self._in_work) >= _IN_WORK:
            self._in_work.popleft().result()
        self._in_work.append(self._pool.submit(self._digest, path, first_layer, leaves))

    def _digest(self, path: TensorPath, first_layer: int | None, leaves: Sequence[Any]) -> None:
        digests = layer_digests(first_layer, leaves)
        for layer, digest in zip(layer_indices(first_layer, len(digests)), digests, strict=True):
            self.of_layer[path, layer] = digest


def digest_of_all(digests: Mapping[tuple[TensorPath, int | None], str]) -> str:
    """Return one digest of those of all layers of all tensors, in whatever order."""
    lines = (f"{'.'.join(path)} {layer} {digest}\n" for (path, layer), digest in digests.items())
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def layer_digests(first_layer: int | None, leaves: Sequence[Any]) -> tuple[str, ...]:
    """Return the digest of each layer of a tensor, or of one that is not stacked; see `Digests.add`."""
    arrays = [np.ascontiguousarray(leaf) for leaf in leaves]
    if first_layer is None:
        return (_digest_of(arrays),)
    return tuple(_digest_of([array[i : i + 1] for array in arrays]) for i in range(len(arrays[0])))


def _digest_of(arrays: Sequence[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.name}{list(array.shape)}".encode())
        found.update(np.atleast_1d(array).view(np.uint8).data)
    return found.hexdigest()
