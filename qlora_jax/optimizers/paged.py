"""The paged optimizer: state in chunks of layers, each in device or host memory (QLoRA section 3, "Paged Optimizers").

The paper leaves the choice of the pages on the GPU to CUDA's unified memory. XLA plans its memory ahead, so here the
choice is planned: before a step, the bytes that its program needs and the device's limit determine how many chunks may
stay; the others wait in pinned host memory and pass through the device one by one while they are updated.

The state mirrors what is trained: any optax transformation is applied to each matrix by itself, so that the state of a
leaf [L, rows, columns] has the leading axis L too and can be cut between any two layers. A leaf without a layer axis,
such as a head [rows, columns], counts as one layer.
"""

import bisect
import collections
import dataclasses
import functools
import itertools
import operator
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

CHUNK_BYTES = 16 * 2**20
"""Largest chunk: enough for the full rate of a PCIe link, little for any GPU."""

# A state has at least about this many chunks, so that those in flight, and the temporaries of an update (those of the
# 8-bit optimizers come to two chunks), are under 5 % of it.
_CHUNKS = 128
# Chunks on the device at a time while host chunks are updated: one arriving, one in work, one leaving.
_IN_FLIGHT = 3

Placement = Literal["device", "host", "auto"]


class Chunk(NamedTuple):
    """Consecutive layers of a trained leaf; their state moves as a unit.

    Attributes:
        leaf: index of the leaf in `jax.tree.leaves(lora)`.
        start: first layer.
        layers: number of layers.
        nbytes: size of the state: optimizer state, and the float32 master if there is one.
    """

    leaf: int
    start: int
    layers: int
    nbytes: int


class ChunkState(NamedTuple):
    """State of a chunk; every array has a leading axis of layers.

    Attributes:
        master: the trained values in float32; None where the working copy itself is float32.
        optimizer: state of the optax transformation of each layer.
    """

    master: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class TransferStats:
    """Bytes that paging moved over the link between device and host, and the time it took.

    Attributes:
        evicted_bytes: device to host, of chunks that move to the host.
        returned_bytes: host to device, of chunks that move to the device.
        paged_bytes: both directions, of chunks that visit the device for their update.
        seconds: time of waiting for evictions, and of updates that page, counted from the end of the gradient program.
        peak_bytes: most bytes of visiting chunks that were on the device at once.
    """

    evicted_bytes: int = 0
    returned_bytes: int = 0
    paged_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: "TransferStats") -> "TransferStats":
        """Return the statistics of two transfers, one after the other."""
        return TransferStats(
            self.evicted_bytes + other.evicted_bytes,
            self.returned_bytes + other.returned_bytes,
            self.paged_bytes + other.paged_bytes,
            self.seconds + other.seconds,
            max(self.peak_bytes, other.peak_bytes),
        )


class PagedOptimizer:
    """An optax transformation of adapters and heads whose state may lie on the host, wholly or in part.

    It holds the layout and no arrays; the state is a list with a `ChunkState` for each of `chunks`.

    Args:
        transformation: of one matrix [rows, columns]; applied to each layer of each leaf by itself.
        lora: shapes of what is trained: any pytree of arrays or `ShapeDtypeStruct`s, [L, rows, columns] or without L.
        dtype: of the working copy that the model reads. If not float32, float32 masters are part of the state.
        placement: `device`; `host`: every chunk, always; `auto`: chunks stay on the device while there is room.
        limit: bytes of device memory; None for no limit (then `auto` is `device`).
        chunk_bytes: largest chunk, unless one layer is larger. No chunk is larger than a 128th of the state either, so
            that the chunks in flight during an update are below 5 % of it.
    """

    def __init__(
        self,
        transformation: optax.GradientTransformation,
        lora: Any,
        *,
        dtype: Any = jnp.float32,
        placement: Placement = "device",
        limit: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ):
        self.transformation = transformation
        self.dtype = jnp.dtype(dtype)
        self.placement = placement
        self.limit = limit
        self._leaves, self._structure = jax.tree.flatten(
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), lora)
        )
        layer_bytes = [_nbytes(self._abstract_state(leaf, 1)) for leaf in self._leaves]
        self.state_bytes = sum(nbytes * _depth(leaf) for nbytes, leaf in zip(layer_bytes, self._leaves, strict=True))
        bound = min(chunk_bytes, self.state_bytes // _CHUNKS)
        chunks: list[Chunk] = []
        for index, (nbytes, leaf) in enumerate(zip(layer_bytes, self._leaves, strict=True)):
            # Of one length, so that a leaf's update is one program.
            depth = _depth(leaf)
            layers = max(n for n in range(1, depth + 1) if depth % n == 0 and (n == 1 or n * nbytes <= bound))
            chunks += [Chunk(index, start, layers, layers * nbytes) for start in range(0, depth, layers)]
        self.chunks: tuple[Chunk, ...] = tuple(chunks)
        self._totals = list(itertools.accumulate(chunk.nbytes for chunk in chunks))
        self._init_chunk = jax.jit(self._initial, static_argnames="layers")
        self.update_program = jax.jit(self._update_chunk, donate_argnums=(0, 2), static_argnames="layers")

    @property
    def paging_bytes(self) -> int:
        """Device bytes of the chunks in flight during an update in which chunks visit the device."""
        return _IN_FLIGHT * max(chunk.nbytes for chunk in self.chunks)

    def resident_chunks(self, needed_bytes: int | float) -> int:
        """Count the chunks, from the first, that fit on the device besides a program of `needed_bytes`.

        All if the whole state fits; else as many as fit together with the chunks in flight. `needed_bytes` is infinite
        for a program with unknown needs. `evict` makes room before the program runs; evicted chunks return during the
        next update that has room, so that total traffic never exceeds that of leaving them on the host.
        """
        if self.placement == "host":
            return 0
        if self.placement == "device" or self.limit is None or needed_bytes + self.state_bytes <= self.limit:
            return len(self.chunks)
        return bisect.bisect_right(self._totals, self.limit - needed_bytes - self.paging_bytes)

    def resident_bytes(self, resident: int) -> int:
        """Count the device bytes of the state's first `resident` chunks."""
        return self._totals[resident - 1] if resident else 0

    def init(self, lora: Any) -> tuple[Any, list[ChunkState]]:
        """Make the working copy and the state before the first step from float32 values.

        With another working dtype `lora` is deleted leaf by leaf; else it is the working copy. If there is a limit,
        `auto` begins on the host: the first update that has room brings the state to the device.
        """
        working, state = [], []
        for index, leaf in enumerate(jax.tree.leaves(lora)):
            for chunk in (chunk for chunk in self.chunks if chunk.leaf == index):
                made = self._init_chunk(leaf, chunk.start, layers=chunk.layers)
                # Waited for: what is made must not pile up on the device.
                state.append(jax.block_until_ready(jax.device_put(made, self._first_place(leaf.sharding))))
            # Placed as every update leaves it: another placement would be another program.
            working.append(jax.device_put(leaf.astype(self.dtype), leaf.sharding))
            if self.dtype != jnp.float32:
                leaf.delete()
        return jax.tree.unflatten(self._structure, working), state

    def evict(self, state: Sequence[ChunkState], resident: int) -> tuple[list[ChunkState], TransferStats]:
        """Move all but the first `resident` chunks to the host and wait for them; `state` is donated."""
        leaving = [i for i in range(resident, len(state)) if not _on_host(state[i])]
        state = list(state)
        if not leaving:
            return state, TransferStats()
        begin = time.perf_counter()
        for i in leaving:
            state[i] = _moved(state[i], "pinned_host")
        jax.block_until_ready([state[i] for i in leaving])
        evicted = sum(self.chunks[i].nbytes for i in leaving)
        return state, TransferStats(evicted_bytes=evicted, seconds=time.perf_counter() - begin)

    def update(
        self,
        lora: Any,
        gradients: Any,
        state: Sequence[ChunkState],
        scale: Float[Array, ""],
        finite: Bool[Array, ""],
        resident: int | None = None,
    ) -> tuple[Any, list[ChunkState], TransferStats]:
        """Update what is trained chunk by chunk, with the same program whatever the placement of a chunk.

        While a chunk is updated the next one arrives and the previous one leaves; at most three chunks that belong on
        the host are on the device at once.

        Args:
            lora: working copy; donated.
            gradients: float32, same structure; a leaf is deleted after its last chunk.
            state: donated.
            scale: factor of the gradients.
            finite: if False, trained values and state keep their bits.
            resident: number of chunks, from the first, that stay on the device afterwards; by default the
                `resident_chunks` of no other program.

        Returns:
            Working copy, state, and statistics of the transfers. Nothing is waited for unless chunks page.
        """
        resident = self.resident_chunks(0) if resident is None else resident
        leaves, gradient_leaves = jax.tree.leaves(lora), jax.tree.leaves(gradients)
        pipeline = _Pipeline(self.chunks, state, resident)
        pipeline.start(scale)
        for i, chunk in enumerate(self.chunks):
            leaves[chunk.leaf], updated = self.update_program(
                leaves[chunk.leaf],
                gradient_leaves[chunk.leaf],
                pipeline.take(i),
                np.int32(chunk.start),
                scale,
                finite,
                layers=chunk.layers,
            )
            pipeline.put(i, updated)
            if chunk.start + chunk.layers == _depth(self._leaves[chunk.leaf]):
                gradient_leaves[chunk.leaf].delete()
        return jax.tree.unflatten(self._structure, leaves), pipeline.states, pipeline.stats()

    def host_bytes(self, state: Sequence[ChunkState]) -> int:
        """Count the bytes of the state on the host."""
        return sum(chunk.nbytes for chunk, held in zip(self.chunks, state, strict=True) if _on_host(held))

    def masters(self, lora: Any, state: Sequence[ChunkState]) -> Any:
        """Return the trained values in float32: the working copy itself, or the masters gathered in NumPy arrays."""
        if self.dtype == jnp.float32:
            return lora
        masters = [_concatenated(*(chunk.master for chunk in chunks)) for chunks in self._by_leaf(state)]
        shaped = [master.reshape(leaf.shape) for master, leaf in zip(masters, self._leaves, strict=True)]
        return jax.tree.unflatten(self._structure, shaped)

    def gather(self, state: Sequence[ChunkState]) -> list[Any]:
        """Return the transformation's state in one piece: for each leaf, NumPy arrays with leading axis L.

        It depends on neither placement nor size of the chunks.
        """
        return [jax.tree.map(_concatenated, *(chunk.optimizer for chunk in chunks)) for chunks in self._by_leaf(state)]

    def abstract(self) -> tuple[Any, list[Any]]:
        """Return shapes and dtypes of the results of `masters` and `gather`."""
        whole = [self._abstract_state(leaf, _depth(leaf)).optimizer for leaf in self._leaves]
        return jax.tree.unflatten(self._structure, self._leaves), whole

    def scatter(self, masters: Any, whole: Sequence[Any], shardings: Any) -> tuple[Any, Any]:
        """Make working copy and state from copies of the results of `masters` and `gather`.

        Args:
            masters: float32 NumPy arrays.
            whole: for each leaf, the transformation's state in NumPy arrays.
            shardings: of each leaf and its state over the devices; their memory kind does not matter.
        """
        leaves, shardings = jax.tree.leaves(masters), jax.tree.leaves(shardings)
        state = []
        for chunk in self.chunks:
            layers = slice(chunk.start, chunk.start + chunk.layers)
            master = None if self.dtype == jnp.float32 else _stacked(leaves[chunk.leaf])
            cut = jax.tree.map(operator.itemgetter(layers), ChunkState(master, whole[chunk.leaf]))
            state.append(jax.device_put(cut, self._first_place(shardings[chunk.leaf]), may_alias=False))
        working = [
            jax.device_put(np.asarray(leaf).astype(self.dtype), sharding.with_memory_kind("device"), may_alias=False)
            for leaf, sharding in zip(leaves, shardings, strict=True)
        ]
        return jax.tree.unflatten(self._structure, working), state

    def abstract_update(self, chunk: Chunk) -> tuple[Any, ...]:
        """Return abstract arguments of `update_program` for a chunk; its static argument is `layers=chunk.layers`."""
        leaf = self._leaves[chunk.leaf]
        working = jax.ShapeDtypeStruct(leaf.shape, self.dtype)
        scalars = [jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32, bool)]
        return working, leaf, self._abstract_state(leaf, chunk.layers), *scalars

    def abstract_lora(self) -> Any:
        """Return shapes and dtype of the working copy."""
        return jax.tree.unflatten(
            self._structure, [jax.ShapeDtypeStruct(leaf.shape, self.dtype) for leaf in self._leaves]
        )

    def _by_leaf(self, state: Sequence[ChunkState]) -> list[list[ChunkState]]:
        chunks: list[list[ChunkState]] = [[] for _ in self._leaves]
        for chunk, held in zip(self.chunks, state, strict=True):
            chunks[chunk.leaf].append(held)
        return chunks

    def _first_place(self, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
        on_device = self.placement == "device" or (self.placement == "auto" and self.limit is None)
        return sharding.with_memory_kind("device" if on_device else "pinned_host")

    def _abstract_state(self, leaf: jax.ShapeDtypeStruct, layers: int) -> ChunkState:
        return jax.eval_shape(functools.partial(self._initial, start=0, layers=layers), leaf)

    def _initial(self, leaf: Array, start: Int[Array, ""] | int, layers: int) -> ChunkState:
        masters = jax.lax.dynamic_slice_in_dim(_stacked(leaf), start, layers)
        optimizer = jax.vmap(self.transformation.init)(masters)
        return ChunkState(None if self.dtype == jnp.float32 else masters, optimizer)

    @jax.named_scope("optimizer_update")
    def _update_chunk(
        self, leaf: Array, gradient: Array, state: ChunkState, start: Array, scale: Array, finite: Array, layers: int
    ) -> tuple[Array, ChunkState]:
        """Update `layers` layers of a leaf from `start` on; returns (leaf, state)."""
        stack = _stacked(leaf)
        old = jax.lax.dynamic_slice_in_dim(stack, start, layers) if state.master is None else state.master
        mean = jax.lax.dynamic_slice_in_dim(_stacked(gradient), start, layers) * scale
        updates, optimizer = jax.vmap(self.transformation.update)(mean, state.optimizer, old)
        new, optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(old, updates), optimizer),
            (old, state.optimizer),
        )
        stack = jax.lax.dynamic_update_slice_in_dim(stack, new.astype(leaf.dtype), start, 0)
        return stack.reshape(leaf.shape), ChunkState(None if state.master is None else new, optimizer)


@dataclasses.dataclass(frozen=True)
class _Leaving:
    """A chunk on its way to the host, and the bytes it takes until then of the room for visitors."""

    state: ChunkState
    nbytes: int


class _Pipeline:
    """The chunks during one update: those on the host arrive ahead of their turn, and leave after it unless they stay.

    Attributes:
        states: the chunks' states; after the update, where they stay.
    """

    def __init__(self, chunks: Sequence[Chunk], states: Sequence[ChunkState], resident: int):
        self.states = list(states)
        self._chunks, self._resident = chunks, resident
        self._visitors = {i for i, state in enumerate(states) if _on_host(state)}
        self._arriving = collections.deque(sorted(self._visitors))
        self._leaving: collections.deque[_Leaving] = collections.deque()
        self._visiting_bytes = self._peak = 0
        self._evicted = self._returned = self._paged = 0
        self._begin = 0.0

    def start(self, scale: Array) -> None:
        """Send for the first chunk; if any moves, wait for the gradients, so that only paging is timed."""
        if self._visitors or self._resident < len(self._chunks):
            self._fetch()
            jax.block_until_ready(scale)
        self._begin = time.perf_counter()

    def take(self, i: int) -> ChunkState:
        """Return a chunk on the device, and send for the next one."""
        if i in self._visitors:
            self._fetch()
        return self.states[i]

    def put(self, i: int, state: ChunkState) -> None:
        """Take an updated chunk: it stays, or leaves for the host."""
        visitor, nbytes = i in self._visitors, self._chunks[i].nbytes
        if i >= self._resident:
            state = _moved(state, "pinned_host")
            self._leaving.append(_Leaving(state, nbytes if visitor else 0))
            self._paged += 2 * nbytes if visitor else 0
            self._evicted += 0 if visitor else nbytes
        elif visitor:
            self._visiting_bytes -= nbytes
            self._returned += nbytes
        self.states[i] = state

    def stats(self) -> TransferStats:
        """Return what was moved since `start`."""
        moved = self._evicted or self._returned or self._paged
        seconds = time.perf_counter() - self._begin if moved else 0.0
        return TransferStats(self._evicted, self._returned, self._paged, seconds, self._peak)

    def _fetch(self) -> None:
        """Send for the next chunk from the host, once there is room for it."""
        while len(self._leaving) > _IN_FLIGHT - 2:
            gone = self._leaving.popleft()
            jax.block_until_ready(gone.state)
            self._visiting_bytes -= gone.nbytes
        if self._arriving:
            i = self._arriving.popleft()
            self.states[i] = _moved(self.states[i], "device")
            self._visiting_bytes += self._chunks[i].nbytes
            self._peak = max(self._peak, self._visiting_bytes)


def _depth(leaf: Any) -> int:
    """Return L of a leaf [L, rows, columns]; 1 without such an axis."""
    return leaf.shape[0] if len(leaf.shape) > 2 else 1


def _stacked(leaf: Any) -> Any:
    """Return a leaf as [L, ...]."""
    return leaf if len(leaf.shape) > 2 else leaf[None]


def _concatenated(*parts: Array) -> np.ndarray:
    # JAX keeps NumPy's copy with the array that was converted: with the state's own, it would stay on the host twice.
    copies = (jax.device_put(part, part.sharding.with_memory_kind("device"), may_alias=False) for part in parts)
    return np.concatenate([np.asarray(copy) for copy in copies])


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _on_host(state: ChunkState) -> bool:
    # A transformation without state has nothing to move.
    return any(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(state))


def _moved(state: ChunkState, memory_kind: str) -> ChunkState:
    """Move a chunk to another memory; its old memory is freed as soon as the copy is made."""

    def move(array: Array) -> Array:
        moved = jax.device_put(array, array.sharding.with_memory_kind(memory_kind))
        array.delete()
        return moved

    return jax.tree.map(move, state)
