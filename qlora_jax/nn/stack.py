"""Stacks of layers: the only code that scans, rematerialises, tiles, caches, and takes a layer's weights.

A model declares its layers once, every leaf with a leading axis of all layers; `Stack` says which attentions each layer
has. Layers that repeat in a pattern (Gemma 3: five local, one global) are scanned period by period, so that compile
time does not grow with depth; what does not repeat is written out. Long sequences go through
`qlora_jax.nn.long_sequence`, the second executor of the same layers.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qlora_jax import kernels
from qlora_jax.choices import Remat
from qlora_jax.nn import long_sequence
from qlora_jax.nn.attention import Attention, attend, segment_mask
from qlora_jax.nn.kv_cache import Cache, attend_cached, empty_heads
from qlora_jax.nn.long_sequence import layer_slice
from qlora_jax.nn.remat import LAYER_INPUT, rematerialised
from qlora_jax.nn.variables import GradientSlot, Trainable
from qlora_jax.quantization import QuantizedTensor
from qlora_jax.sharding import REPLICATED, ShardingRules, gathered

Rope = tuple[Array, Array]
"""Cosines and sines of a rotary table, each [B, S, half]."""


@dataclasses.dataclass(frozen=True)
class DropoutKeys:
    """Dropout keys of one layer: `keys("q_proj")`; None for no dropout.

    Each is folded from its name: adding one linear to a layer changes the masks of no other.
    """

    key: Array | None = None

    def __call__(self, name: str) -> Array | None:
        """Key of the linear called `name`."""
        return None if self.key is None else jax.random.fold_in(self.key, zlib.crc32(name.encode()))


class Layer(Protocol):
    """The part that a family writes: functions of single tokens around its attentions.

    The arrays have leading axes [B, S], which may be a tile of a longer sequence: nothing here may look from one token
    to another, which is what the attentions are for.
    """

    def pre_attention(self, i: int, h: Array, rope: Rope | None, keys: DropoutKeys) -> tuple[Array, ...]:
        """Queries [B, S, H, E], keys and values [B, S, K, E] of attention i; of a cross-attention, queries alone."""
        ...

    def post_attention(self, i: int, h: Array, attended: Array, keys: DropoutKeys) -> Array:
        """The residual stream [B, S, D] after attention i; after the last one the MLP too."""
        ...


class CrossLayer(Layer, Protocol):
    """A layer with cross-attention."""

    def encoder_keys_values(self, i: int, encoder: Array, keys: DropoutKeys) -> tuple[Array, Array]:
        """Keys and values [B, T, K, E] of cross-attention i from an encoder's output [B, T, D]."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Inputs of all layers beside the residual stream.

    Attributes:
        rope: rotary tables by name, see `Attention.rope`.
        segment_ids: int32 [B, S], document of each token in a packed row (0: padding); None where every row is one
            document, padded on the right if at all, and causality alone hides the padding.
        encoder: an encoder's output [B, T, D], for cross-attention.
        encoder_segment_ids: int32 [B, T], its documents.
    """

    rope: dict[str, Rope]
    segment_ids: Any = None
    encoder: Any = None
    encoder_segment_ids: Any = None

    def rope_of(self, facts: Attention) -> Rope | None:
        """Rotary table of an attention."""
        return None if facts.rope is None else self.rope[facts.rope]

    def mask(self, facts: Attention) -> Bool[Array, "B 1 S T"] | None:
        """Mask of an attention; None where `facts` alone say what is seen."""
        if not facts.cross:
            return None if self.segment_ids is None else segment_mask(facts, self.segment_ids)
        if (self.segment_ids is None) != (self.encoder_segment_ids is None):
            raise ValueError("Cross-attention needs the documents of both sides, or of neither.")
        return None if self.segment_ids is None else segment_mask(facts, self.segment_ids, self.encoder_segment_ids)


class Segment(NamedTuple):
    """Layers start, start + 1, ...: `pattern` of attentions, repeated."""

    start: int
    pattern: tuple[tuple[Attention, ...], ...]
    repeats: int


@functools.lru_cache
def segments_of(layers: tuple[tuple[Attention, ...], ...]) -> tuple[Segment, ...]:
    """Cut layers into repeated patterns, so that as few as possible are written out, in as few segments."""
    n = len(layers)
    # best[i]: (layers written out, segments, the segments) of layers[i:].
    best: list[tuple[int, int, tuple[Segment, ...]]] = [(0, 0, ())] * (n + 1)
    for start in range(n - 1, -1, -1):
        options = []
        for period in range(1, n - start + 1):
            pattern, repeats = layers[start : start + period], 1
            while layers[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            for times in {repeats, 1}:
                written, segments, rest = best[start + times * period]
                options.append((written + period, segments + 1, (Segment(start, pattern, times), *rest)))
        best[start] = min(options, key=lambda option: (*option[:2], -len(option[2][0].pattern) * option[2][0].repeats))
    return best[0][2]


def split_stacks(layers: nnx.State) -> tuple[nnx.State, nnx.State]:
    """(quantised weights, all the rest) of a state with leading layer axes.

    A scan over layers slices the rest but only indexes the weights (`layer_of`): they are too large to be copied.
    """

    def quantized(path: Any, variable: nnx.Variable) -> bool:
        return isinstance(variable.get_value(), QuantizedTensor)

    stacks, rest = nnx.split_state(layers, quantized, ...)
    return stacks, rest


def layer_of(stacks: nnx.State, layer: Array | int, rules: ShardingRules = REPLICATED) -> nnx.State:
    """Return the quantised weights of one layer: still inside their stacks or, where those are cut, gathered."""

    def weight(stack: QuantizedTensor) -> Any:
        one = kernels.StackedWeight(stack, layer)
        return one if rules.rows is None else gathered(one.take(), rules.rows)

    return nnx.from_flat_state(
        [(path, variable.replace(weight(variable.get_value()))) for path, variable in nnx.to_flat_state(stacks)]
    )


@dataclasses.dataclass(frozen=True)
class Stack:
    """Executes layers one after the other.

    Attributes:
        layers: attentions of each layer, in order: (self,) or (self, cross).
        rules: how the layers' weights are cut over a mesh of devices.
    """

    layers: tuple[tuple[Attention, ...], ...]
    rules: ShardingRules = REPLICATED

    def __post_init__(self) -> None:
        """Check the layers."""
        if not all(self.layers):
            raise ValueError("Every layer needs an attention.")

    @classmethod
    def of(cls, attentions: Sequence[Attention], rules: ShardingRules = REPLICATED) -> "Stack":
        """Layers with one attention each."""
        return cls(tuple((facts,) for facts in attentions), rules)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The repeated patterns that the layers fall into."""
        return segments_of(self.layers)

    @property
    def kinds(self) -> tuple[Attention, ...]:
        """Every different attention, in order of first use."""
        return tuple(dict.fromkeys(itertools.chain(*self.layers)))

    @jax.named_scope("layers")
    def __call__(
        self,
        layers: nnx.Module,
        h: Float[Array, "B S D"],
        ctx: Context,
        *,
        remat: Remat = "none",
        dropout_key: Array | None = None,
    ) -> Float[Array, "B S D"]:
        """Apply all layers.

        Args:
            layers: the layers' module, every leaf with a leading axis of layers; see `Layer`.
            h: residual stream.
            ctx: what all layers see.
            remat: what of a layer is kept for the backward pass, see `qlora_jax.nn.remat`. With any policy but `none`,
                long sequences pass through all but attention by tiles (`qlora_jax.nn.long_sequence`).
            dropout_key: key for adapter dropout, or None for none.
        """
        n_layers = len(self.layers)
        layer_keys = None if dropout_key is None else jax.random.split(dropout_key, n_layers)
        masks = {facts: ctx.mask(facts) for facts in self.kinds}
        tokens = h.shape[0] * h.shape[1]
        if remat != "none" and long_sequence.tile_size(tokens) < tokens:
            return self._by_tiles(layers, h, ctx, masks, layer_keys, remat)

        graphdef, *states = nnx.split(layers, Trainable, ...)
        trained, frozen = states
        stacks, rest = split_stacks(frozen)
        slots, matrices = _split_slots(trained)

        def apply(attentions: tuple[Attention, ...], h: Array, index: Array, slots: Any) -> Array:
            # Taken in here, where it is not kept for the backward pass: whole stacks are there anyway.
            own, read, key = layer_slice((rest, matrices, layer_keys), index)
            trained = _join_slots(slots, read)
            layer = nnx.merge(graphdef, trained, own, layer_of(stacks, index, self.rules))
            return _apply(layer, attentions, checkpoint_name(h, LAYER_INPUT), ctx, masks, DropoutKeys(key))

        for start, pattern, repeats in self.segments:
            # XLA may see a layer's forward pass beside its recomputation where a loop has one turn or many layers.
            shared = repeats == 1 or len(pattern) > 1
            bodies = [rematerialised(functools.partial(apply, attentions), remat, shared) for attentions in pattern]

            def period(h: Array, first: Array, bodies: Any = bodies) -> tuple[Array, None]:
                for j, body in enumerate(bodies):
                    # Taken out here, where its gradient is added to the stack's in place.
                    h = body(h, first + j, layer_slice(slots, first + j))
                return h, None

            h, _ = jax.lax.scan(period, h, start + len(pattern) * jnp.arange(repeats))
        return h

    def _by_tiles(
        self,
        layers: nnx.Module,
        h: Float[Array, "B S D"],
        ctx: Context,
        masks: dict[Attention, Array | None],
        layer_keys: Array | None,
        remat: Remat,
    ) -> Float[Array, "B S D"]:
        graphdef, *states = nnx.split(layers, Trainable, ...)
        trained, frozen = states
        stacks, scanned = split_stacks(frozen)

        def layer_at(index: Array, tile: Array | int, trained: Any, scanned: Any, stacks: Any) -> tuple[Any, Any]:
            own, key = scanned
            keys = DropoutKeys(None if key is None else jax.random.fold_in(key, tile))
            return nnx.merge(graphdef, trained, own, layer_of(stacks, index, self.rules)), keys

        return long_sequence.run(
            long_sequence.Program(layer_at, self.segments, remat),
            trained,
            (scanned, layer_keys),
            stacks,
            ctx,
            masks,
            h,
        )

    def empty_cache(self, batch: int, capacity: int, heads: tuple[int, int], dtype: Any, *, margin: int = 0) -> Cache:
        """Return a cache without tokens.

        Args:
            batch: rows.
            capacity: tokens of a row that there is room for.
            heads: (kv heads, head width).
            dtype: that keys and values are kept in.
            margin: tokens that may be taken back.
        """

        def arrays() -> tuple[Any, ...]:
            windows = self._windows(capacity, margin)
            return tuple(empty_heads((len(places), batch, slots, *heads), dtype) for slots, places in windows.items())

        return Cache(arrays(), arrays(), jnp.zeros(batch, jnp.int32), capacity, margin)

    def _windows(self, capacity: int, margin: int) -> dict[int, list[tuple[int, int]]]:
        """Slots -> the (layer, attention) pairs whose keys and values have so many, in order."""
        windows: dict[int, list[tuple[int, int]]] = {}
        for layer, attentions in enumerate(self.layers):
            for i, facts in enumerate(attentions):
                if not facts.cross:
                    slots = capacity if facts.window is None else min(facts.window + margin, capacity)
                    windows.setdefault(slots, []).append((layer, i))
        return windows

    @jax.named_scope("layers")
    def decode(
        self,
        layers: nnx.Module,
        h: Float[Array, "B S D"],
        ctx: Context,
        cache: Cache,
        counts: Int[Array, " B"],
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Apply all layers to new tokens after those in the cache, which is returned with them.

        Args:
            layers: as for `__call__`.
            h: residual stream of the new tokens.
            ctx: rotary tables of the new tokens, and the encoder's output.
            cache: the tokens before them; there must be room.
            counts: new tokens of each row, from 0 to S; what follows them is padding, whose results mean nothing.
        """
        windows = self._windows(cache.capacity, cache.margin)
        places = {pair: (group, n) for group, pairs in enumerate(windows.values()) for n, pair in enumerate(pairs)}
        graphdef, state = nnx.split(layers)
        stacks, rest = split_stacks(state)

        def period(carry: Any, repeat: Array, segment: Segment) -> tuple[Any, None]:
            h, arrays = carry
            first, pattern, _ = segment
            for j, attentions in enumerate(pattern):
                index = first + repeat * len(pattern) + j
                layer: Any = nnx.merge(graphdef, layer_slice(rest, index), layer_of(stacks, index, self.rules))
                for i, facts in enumerate(attentions):
                    qkv = layer.pre_attention(i, h, ctx.rope_of(facts), DropoutKeys())
                    if facts.cross:
                        k, v = layer.encoder_keys_values(i, ctx.encoder, DropoutKeys())
                        attended = attend(qkv[0], k, v, facts, ctx.mask(facts))
                    else:
                        group, here = places[first + j, i]
                        # From one period to the next, a place moves by the attentions of its window in a period.
                        _, further = places.get((first + len(pattern) + j, i), (group, here))
                        place = here + repeat * (further - here), cache.row
                        arrays[group], attended = attend_cached(
                            qkv, facts, arrays[group], place, (cache.lengths, counts)
                        )
                    h = layer.post_attention(i, h, attended, DropoutKeys())
            return (h, arrays), None

        carry = (h, list(zip(cache.keys, cache.values, strict=True)))
        for segment in self.segments:
            carry, _ = jax.lax.scan(functools.partial(period, segment=segment), carry, jnp.arange(segment.repeats))
        h, arrays = carry
        keys, values = zip(*arrays, strict=True) if arrays else ((), ())
        return h, dataclasses.replace(cache, keys=keys, values=values, lengths=cache.lengths + counts)


def _apply(
    layer: Any,
    attentions: tuple[Attention, ...],
    h: Array,
    ctx: Context,
    masks: dict[Attention, Array | None],
    keys: DropoutKeys,
) -> Array:
    """One layer."""
    for i, facts in enumerate(attentions):
        qkv = layer.pre_attention(i, h, ctx.rope_of(facts), keys)
        q, k, v = (*qkv, *layer.encoder_keys_values(i, ctx.encoder, keys)) if facts.cross else qkv
        h = layer.post_attention(i, h, attend(q, k, v, facts, masks[facts]), keys)
    return h


def _is_slot(value: Any) -> bool:
    return isinstance(value, GradientSlot)


def _split_slots(trained: Any) -> tuple[Any, Any]:
    """(what gradients are taken with respect to, what is read beside it) of trained values."""
    slots = jax.tree.map(lambda value: value.slot if _is_slot(value) else value, trained, is_leaf=_is_slot)
    matrices = jax.tree.map(lambda value: value.matrix if _is_slot(value) else None, trained, is_leaf=_is_slot)
    return slots, matrices


def _join_slots(slots: Any, matrices: Any) -> Any:
    """The trained values that `_split_slots` took apart."""

    def joined(matrix: Any, slot: Any) -> Any:
        return slot if matrix is None else GradientSlot(matrix, slot)

    return jax.tree.map(joined, matrices, slots, is_leaf=lambda value: value is None)
