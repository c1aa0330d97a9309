"""The paged optimizer: state in chunks of layers, each in device or host memory (QLoRA section 3, "Paged Optimizers").

The paper leaves it to CUDA's unified memory which pages of the optimizer state lie on the GPU. XLA plans its memory
ahead, so here it is planned: before a step, the bytes its program needs against the device's limit say how many chunks
may stay; the others wait in pinned host memory and pass through the device one after the other while they are updated.

The state mirrors the adapters: any optax transformation is applied to each matrix by itself, so that the state of a
leaf [L, rows, columns] has the leading axis L too and can be cut between any two layers.
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

# A chunk's size: large enough for a PCIe link's full rate, small beside any GPU.
CHUNK_BYTES = 16 * 2**20
# A state has at least about this many chunks, so that those in flight, and the temporaries of an update (those of the
# 8-bit optimizers come to two chunks), are under 5 % of it.
_CHUNKS = 128
# Chunks on the device at a time while host chunks are updated: one arriving, one in work, one leaving.
_IN_FLIGHT = 3

Placement = Literal["device", "host", "auto"]


class Chunk(NamedTuple):
    """Consecutive layers of one adapter leaf, whose state moves as one.

    Attributes:
        leaf: index of the leaf in `jax.tree.leaves(lora)`.
        start: its first layer.
        layers: how many.
        nbytes: of its state: optimizer state, and the float32 master if there is one.
    """

    leaf: int
    start: int
    layers: int
    nbytes: int


class ChunkState(NamedTuple):
    """What is kept of a chunk, all with a leading axis of its layers.

    Attributes:
        master: the adapter in float32; None where the working copy itself is float32.
        optimizer: state of the optax transformation, one for each layer.
    """

    master: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class TransferStats:
    """What paging moved. Bytes cross the link once each.

    Attributes:
        evicted_bytes: device to host, of chunks that give up their place.
        returned_bytes: host to device, of chunks that stay there.
        paged_bytes: both ways, of chunks that came for their update only.
        seconds: time spent waiting for evictions, and on updates that page, from when the gradients are there.
        peak_bytes: most bytes of passing chunks that were on the device at once.
    """

    evicted_bytes: int = 0
    returned_bytes: int = 0
    paged_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __add__(self, other: "TransferStats") -> "TransferStats":
        """Both, one after the other."""
        return TransferStats(
            self.evicted_bytes + other.evicted_bytes,
            self.returned_bytes + other.returned_bytes,
            self.paged_bytes + other.paged_bytes,
            self.seconds + other.seconds,
            max(self.peak_bytes, other.peak_bytes),
        )


class PagedOptimizer:
    """An optax transformation of adapters whose state may lie on the host, wholly or in part.

    It holds no arrays, only how they are laid out; the state is a list with a `ChunkState` for each of `chunks`.

    Args:
        transformation: of one matrix [rows, columns]; applied to each layer of each leaf by itself.
        lora: shapes of the adapters: any pytree of arrays or `ShapeDtypeStruct`s [L, rows, columns].
        dtype: of the working copy that the model reads. If not float32, float32 masters are part of the state.
        placement: `device`; `host`: every chunk, always; `auto`: chunks stay on the device while there is room.
        limit: bytes of device memory; None for no limit (then `auto` is `device`).
        chunk_bytes: no chunk is larger, unless one layer is. Nor is it larger than a 128th of the state, so that what
            passes through the device in an update is below 5 % of it.
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
        self.state_bytes = sum(nbytes * leaf.shape[0] for nbytes, leaf in zip(layer_bytes, self._leaves, strict=True))
        bound = min(chunk_bytes, self.state_bytes // _CHUNKS)
        chunks: list[Chunk] = []
        for index, (nbytes, leaf) in enumerate(zip(layer_bytes, self._leaves, strict=True)):
            # Of one length, so that a leaf's update is one program.
            depth = leaf.shape[0]
            layers = max(n for n in range(1, depth + 1) if depth % n == 0 and (n == 1 or n * nbytes <= bound))
            chunks += [Chunk(index, start, layers, layers * nbytes) for start in range(0, depth, layers)]
        self.chunks: tuple[Chunk, ...] = tuple(chunks)
        self._totals = list(itertools.accumulate(chunk.nbytes for chunk in chunks))
        self._init_chunk = jax.jit(self._initial, static_argnames="layers")
        self.update_program = jax.jit(self._update_chunk, donate_argnums=(0, 2), static_argnames="layers")

    @property
    def paging_bytes(self) -> int:
        """Device bytes that passing chunks take during an update, where any pass."""
        return _IN_FLIGHT * max(chunk.nbytes for chunk in self.chunks)

    def resident_chunks(self, needed_bytes: int | float) -> int:
        """How many chunks, from the first, may lie on the device beside a program that needs `needed_bytes` there.

        `needed_bytes` may be infinite, for a program whose needs are not known. All if the whole state fits; else as
        many as fit together with the buffers that the rest passes through. `evict` makes room before the program runs.
        A chunk comes back in the update of the first step that has room for it, which brings it to the device anyway:
        however batches alternate, training with eviction and return moves no more bytes than leaving the chunk on the
        host would.
        """
        if self.placement == "host":
            return 0
        if self.placement == "device" or self.limit is None or needed_bytes + self.state_bytes <= self.limit:
            return len(self.chunks)
        return bisect.bisect_right(self._totals, self.limit - needed_bytes - self.paging_bytes)

    def resident_bytes(self, resident: int) -> int:
        """Device bytes of the state while its first `resident` chunks lie there and no other passes."""
        return self._totals[resident - 1] if resident else 0

    def init(self, lora: Any) -> tuple[Any, list[ChunkState]]:
        """The working copy and the state of float32 adapters before the first step.

        With another working dtype `lora` is deleted leaf by leaf; else it is the working copy. Where there is a limit
        `auto` begins on the host: the first step that has room brings the state to the device.
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
        """Move all but the first `resident` chunks to the host, and wait for it; `state` is donated."""
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
        """One update of the adapters, chunk by chunk, with the same program wherever a chunk lies.

        While a chunk is updated the next one arrives and the one before leaves; never are more than three on the device
        that have no place there.

        Args:
            lora: working copy; donated.
            gradients: float32, same structure; a leaf is deleted after its last chunk.
            state: donated.
            scale: what gradients are multiplied by.
            finite: if False, adapters and state keep their bits.
            resident: the first so many chunks stay on the device afterwards; by default what `resident_chunks` says
                where nothing else needs memory.

        Returns:
            Working copy, state, and what was moved. Nothing is waited for unless chunks page.
        """
        resident = self.resident_chunks(0) if resident is None else resident
        leaves, gradient_leaves = jax.tree.leaves(lora), jax.tree.leaves(gradients)
        chunk_states: list[Any] = list(state)
        arriving = collections.deque(i for i, one in enumerate(chunk_states) if _on_host(one))
        leaving: collections.deque[tuple[int, ChunkState]] = collections.deque()
        counts: collections.Counter[str] = collections.Counter()
        here = peak = 0  # bytes of passing chunks

        def fetch_next() -> None:
            nonlocal here, peak
            while len(leaving) > _IN_FLIGHT - 2:
                nbytes, gone = leaving.popleft()
                jax.block_until_ready(gone)
                here -= nbytes
            if arriving:
                i = arriving.popleft()
                chunk_states[i] = _moved(chunk_states[i], "device")
                here += self.chunks[i].nbytes
                peak = max(peak, here)

        on_host = set(arriving)
        begin = time.perf_counter()
        if arriving or resident < len(self.chunks):
            fetch_next()
            jax.block_until_ready(scale)
            begin = time.perf_counter()
        for i, chunk in enumerate(self.chunks):
            if i in on_host:
                fetch_next()
            leaves[chunk.leaf], one = self.update_program(
                leaves[chunk.leaf],
                gradient_leaves[chunk.leaf],
                chunk_states[i],
                np.int32(chunk.start),
                scale,
                finite,
                layers=chunk.layers,
            )
            if i >= resident:
                one = _moved(one, "pinned_host")
                leaving.append((chunk.nbytes if i in on_host else 0, one))
                counts["paged" if i in on_host else "evicted"] += chunk.nbytes * (2 if i in on_host else 1)
            elif i in on_host:
                here -= chunk.nbytes
                counts["returned"] += chunk.nbytes
            chunk_states[i] = one
            if chunk.start + chunk.layers == self._leaves[chunk.leaf].shape[0]:
                gradient_leaves[chunk.leaf].delete()
        seconds = time.perf_counter() - begin if counts else 0.0
        traffic = TransferStats(counts["evicted"], counts["returned"], counts["paged"], seconds, peak)
        return jax.tree.unflatten(self._structure, leaves), chunk_states, traffic

    def host_bytes(self, state: Sequence[ChunkState]) -> int:
        """Bytes of the state that lie on the host."""
        return sum(chunk.nbytes for chunk, one in zip(self.chunks, state, strict=True) if _on_host(one))

    def masters(self, lora: Any, state: Sequence[ChunkState]) -> Any:
        """The adapters in float32, whole: the working copy itself, or the masters gathered in NumPy arrays."""
        if self.dtype == jnp.float32:
            return lora
        return jax.tree.unflatten(
            self._structure, [_concatenated(*(one.master for one in of_leaf)) for of_leaf in self._by_leaf(state)]
        )

    def gather(self, state: Sequence[ChunkState]) -> list[Any]:
        """The transformation's state, whole: for each adapter leaf, NumPy arrays with leading axis L.

        It depends neither on where chunks lie nor on how large they are.
        """
        return [jax.tree.map(_concatenated, *(one.optimizer for one in of_leaf)) for of_leaf in self._by_leaf(state)]

    def abstract(self) -> tuple[Any, list[Any]]:
        """Shapes and dtypes of what `masters` and `gather` return."""
        whole = [self._abstract_state(leaf, leaf.shape[0]).optimizer for leaf in self._leaves]
        return jax.tree.unflatten(self._structure, self._leaves), whole

    def scatter(self, masters: Any, whole: Sequence[Any], sharding: jax.sharding.Sharding) -> tuple[Any, Any]:
        """Working copy and state from what `masters` and `gather` returned; both are copied.

        Args:
            masters: float32 NumPy arrays.
            whole: for each adapter leaf, the transformation's state in NumPy arrays.
            sharding: of adapters and state over the devices; its memory kind does not matter.
        """
        leaves = jax.tree.leaves(masters)
        place, state = self._first_place(sharding), []
        for chunk in self.chunks:
            layers = slice(chunk.start, chunk.start + chunk.layers)
            master = None if self.dtype == jnp.float32 else leaves[chunk.leaf]
            one = jax.tree.map(operator.itemgetter(layers), ChunkState(master, whole[chunk.leaf]))
            state.append(jax.device_put(one, place, may_alias=False))
        device = sharding.with_memory_kind("device")
        working = [jax.device_put(np.asarray(leaf).astype(self.dtype), device, may_alias=False) for leaf in leaves]
        return jax.tree.unflatten(self._structure, working), state

    def abstract_update(self, chunk: Chunk) -> tuple[Any, ...]:
        """Abstract arguments of `update_program` for one chunk; its static argument is `layers=chunk.layers`."""
        leaf = self._leaves[chunk.leaf]
        working = jax.ShapeDtypeStruct(leaf.shape, self.dtype)
        scalars = [jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.int32, jnp.float32, bool)]
        return working, leaf, self._abstract_state(leaf, chunk.layers), *scalars

    def abstract_lora(self) -> Any:
        """Shapes and dtype of the working copy."""
        return jax.tree.unflatten(
            self._structure, [jax.ShapeDtypeStruct(leaf.shape, self.dtype) for leaf in self._leaves]
        )

    def _by_leaf(self, state: Sequence[ChunkState]) -> list[list[ChunkState]]:
        of_leaf: list[list[ChunkState]] = [[] for _ in self._leaves]
        for chunk, one in zip(self.chunks, state, strict=True):
            of_leaf[chunk.leaf].append(one)
        return of_leaf

    def _first_place(self, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
        on_device = self.placement == "device" or (self.placement == "auto" and self.limit is None)
        return sharding.with_memory_kind("device" if on_device else "pinned_host")

    def _abstract_state(self, leaf: jax.ShapeDtypeStruct, layers: int) -> ChunkState:
        return jax.eval_shape(functools.partial(self._initial, start=0, layers=layers), leaf)

    def _initial(self, leaf: Array, start: Int[Array, ""] | int, layers: int) -> ChunkState:
        masters = jax.lax.dynamic_slice_in_dim(leaf, start, layers)
        optimizer = jax.vmap(self.transformation.init)(masters)
        return ChunkState(None if self.dtype == jnp.float32 else masters, optimizer)

    def _update_chunk(
        self, leaf: Array, gradient: Array, state: ChunkState, start: Array, scale: Array, finite: Array, layers: int
    ) -> tuple[Array, ChunkState]:
        """(leaf, state) after the update of `layers` layers from `start` on."""
        old = jax.lax.dynamic_slice_in_dim(leaf, start, layers) if state.master is None else state.master
        mean = jax.lax.dynamic_slice_in_dim(gradient, start, layers) * scale
        updates, optimizer = jax.vmap(self.transformation.update)(mean, state.optimizer, old)
        new, optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(old, updates), optimizer),
            (old, state.optimizer),
        )
        leaf = jax.lax.dynamic_update_slice_in_dim(leaf, new.astype(leaf.dtype), start, 0)
        return leaf, ChunkState(None if state.master is None else new, optimizer)


def _concatenated(*parts: Array) -> np.ndarray:
    # What NumPy copies stays with the array it was asked of; asked of the state it would be a second one on the host.
    copies = (jax.device_put(part, part.sharding.with_memory_kind("device"), may_alias=False) for part in parts)
    return np.concatenate([np.asarray(copy) for copy in copies])


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _on_host(state: ChunkState) -> bool:
    # A transformation without state has nothing to move.
    return any(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(state))


def _moved(state: ChunkState, memory_kind: str) -> ChunkState:
    """The chunk in another memory; where it was is freed as soon as the copy is made."""

    def move(array: Array) -> Array:
        moved = jax.device_put(array, array.sharding.with_memory_kind(memory_kind))
        array.delete()
        return moved

    return jax.tree.map(move, state)
