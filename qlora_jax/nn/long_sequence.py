"""Transformer layers on a long sequence: all but attention passes by tiles, and layer inputs may lie in host memory.

Written out by hand, forward and backward, because what must not exist is a matter of order: automatic differentiation
holds a layer's input, its queries, keys and values, the attention's output and the gradients of all of these at once.
Here gradients take the place of what they are gradients of, and the input is read a tile at a time wherever it lies.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.choices import Remat
from qlora_jax.nn import attention, jax_internals

# Tokens of a tile: enough rows for full-speed products, few enough that a tile's hidden layer is small.
TILE = 2048
# Divisors looked for are multiples of this, so that no tile of a product is cut.
_MULTIPLE = 128


def tile_size(tokens: int) -> int:
    """Tokens of a tile: `tokens` itself up to twice TILE, else its largest divisor up to TILE that is fit for products.

    A number of tokens without such a divisor is not tiled.
    """
    if tokens <= 2 * TILE:
        return tokens
    sizes = (size for size in range(TILE, TILE // 4 - 1, -_MULTIPLE) if tokens % size == 0)
    return next(sizes, tokens)


@dataclasses.dataclass(frozen=True)
class Program:
    """The layers to execute; static.

    Attributes:
        layer_at: layer_at(layer, tile, trained, scanned, shared) -> (layer, dropout keys): the layer's module from its
            slices of `trained` and `scanned`, see `run`; one for each tile, whose dropout is its own.
        segments: attentions of the layers, see `qlora_jax.nn.stack.Segment`.
        remat: `full`, `save_attention` or `offload`.
    """

    layer_at: Callable[..., tuple[Any, Any]]
    segments: tuple[Any, ...]
    remat: Remat


def run(
    program: Program, trained: Any, scanned: Any, shared: Any, ctx: Any, masks: Any, h: Float[Array, "B S D"]
) -> Float[Array, "B S D"]:
    """Apply layers one after the other; the backward pass computes each again from what `remat` says is kept.

    Args:
        program: what to compute.
        trained: adapters, leading axis L.
        scanned: without gradients, leading axis L.
        shared: without gradients, given to every layer as it is.
        ctx: `qlora_jax.nn.stack.Context`; a gradient reaches the encoder's output, if there is one.
        masks: of each different attention.
        h: the first layer's input.
    """
    batch, seq, width = h.shape
    rope = jax.tree.map(lambda x: x.reshape(batch * seq, *x.shape[2:]), ctx.rope)
    keys = tuple(masks)
    frozen = _Frozen(scanned, shared, rope, tuple(masks[key] for key in keys))
    out = _run(program, keys, batch, trained, ctx.encoder, frozen, h.reshape(batch * seq, width))
    return out.reshape(h.shape)


class _Frozen(NamedTuple):
    """Arguments without gradients, see `run`; masks without their names."""

    scanned: Any
    shared: Any
    rope: Any
    masks: Any


class _LayerState(NamedTuple):
    """Parts of one layer, without its adapters."""

    index: Any
    scanned: Any
    shared: Any
    rope: Any
    masks: Any
    encoder: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(program: Program, kinds: Any, batch: int, trained: Any, encoder: Any, frozen: _Frozen, h: Array) -> Array:
    return _forward_layers(program, kinds, batch, trained, encoder, frozen, h)[0]


def _forward(
    program: Program, kinds: Any, batch: int, trained: Any, encoder: Any, frozen: _Frozen, h: Array
) -> tuple[Array, Any]:
    out, saved = _forward_layers(program, kinds, batch, trained, encoder, frozen, h, keep=True)
    return out, (trained, encoder, frozen, saved)


@jax.named_scope("layers")
def _forward_layers(
    program: Program,
    kinds: Any,
    batch: int,
    trained: Any,
    encoder: Any,
    frozen: _Frozen,
    h: Array,
    keep: bool = False,
) -> tuple[Array, Any]:
    """The last layer's output and, to `keep`, of every segment what its layers' backward pass begins from."""
    saved = []
    for start, pattern, repeats in program.segments:

        def period(h: Array, repeat: Array, start: int = start, pattern: Any = pattern) -> tuple[Array, Any]:
            kept = []
            for j, attentions in enumerate(pattern):
                index = start + repeat * len(pattern) + j
                mine, state = _layer_state(index, trained, encoder, frozen, kinds)
                layer = _TiledLayer(program, attentions, batch, mine, state)
                out, attended = layer.forward(h)
                if keep:
                    inputs = jax.device_put(h, jax.memory.Space.Host) if program.remat == "offload" else h
                    kept.append((inputs, attended if program.remat == "save_attention" else None))
                h = out
            return h, tuple(kept)

        h, kept = jax.lax.scan(period, h, jnp.arange(repeats))
        saved.append(kept)
    return h, saved


@jax.named_scope("layers")
def _backward(
    program: Program,
    kinds: Any,
    batch: int,
    residuals: Any,
    d_out: Array,
    for_trained: Any,
    for_encoder: Any,
    for_frozen: Any,
    for_h: Any,
) -> None:
    trained, encoder, frozen, saved = residuals
    gradients = _Gradients(trained, for_trained)
    carry: Any = (d_out, None if encoder is None else jnp.zeros(encoder.shape, jnp.float32))
    for (start, pattern, repeats), kept in reversed(list(zip(program.segments, saved, strict=True))):

        def period(step: Array, carry: Any, segment: Any = (start, pattern, repeats), kept: Any = kept) -> Any:
            start, pattern, repeats = segment
            repeat = repeats - 1 - step
            for j, attentions in reversed(list(enumerate(pattern))):
                index = start + repeat * len(pattern) + j
                mine, state = _layer_state(index, trained, encoder, frozen, kinds)
                inputs, attended = kept[j]
                attended = None if attended is None else layer_slice(attended, repeat)
                layer = _TiledLayer(program, attentions, batch, mine, state)
                dh, d_encoder = carry
                carry = layer.backward(_Tiles(inputs, repeat), attended, dh, d_encoder, gradients)
            return carry

        carry = jax.lax.fori_loop(0, repeats, period, carry)
    for_h.accum(carry[0])
    if encoder is not None:
        for_encoder.accum(carry[1].astype(encoder.dtype))
    gradients.deliver()


_run.defvjp_with_accums(_forward, _backward)


class _Gradients:
    """Gradients of the trained matrices, added to in place, layer by layer.

    Where the caller gave a place, no second copy of them exists; a matrix whose gradient nobody asked for is skipped.
    """

    def __init__(self, trained: Any, accumulators: Any):
        self._accumulators, self._structure = jax.tree.flatten(accumulators)
        leaves = jax.tree.leaves(trained)
        self._asked = [i for i, accumulator in enumerate(self._accumulators) if jax_internals.is_asked(accumulator)]
        self._given = [jax_internals.given_ref(self._accumulators[i]) for i in self._asked]
        self._totals = [
            jax.new_ref(jnp.zeros_like(leaves[i])) if ref is None else ref
            for i, ref in zip(self._asked, self._given, strict=True)
        ]

    def differentiate(self, function: Callable[..., Any], mine: Any, *arrays: Array) -> tuple[Any, Callable[..., Any]]:
        """Return `function(mine, *arrays)` and its pullback to [matrices asked for], *arrays."""

        def of_asked(asked: list[Array], *arrays: Array) -> Any:
            leaves = jax.tree.leaves(mine)
            for i, leaf in zip(self._asked, asked, strict=True):
                leaves[i] = leaf
            return function(jax.tree.unflatten(self._structure, leaves), *arrays)

        return jax.vjp(of_asked, [jax.tree.leaves(mine)[i] for i in self._asked], *arrays)

    def add(self, index: Array, gradients: list[Array]) -> None:
        """Add one layer's gradients to the totals."""
        for total, gradient in zip(self._totals, gradients, strict=True):
            total[index] += gradient

    def deliver(self) -> None:
        """Hand over the totals that lie in no place of the caller's."""
        for i, ref, total in zip(self._asked, self._given, self._totals, strict=True):
            if ref is None:
                self._accumulators[i].accum(jax.freeze(total))


def _layer_state(index: Array, trained: Any, encoder: Any, frozen: _Frozen, kinds: Any) -> tuple[Any, _LayerState]:
    """A layer's adapters, and all else that it is made of."""
    mine, scanned = layer_slice((trained, frozen.scanned), index)
    masks = dict(zip(kinds, frozen.masks, strict=True))
    return mine, _LayerState(index, scanned, frozen.shared, frozen.rope, masks, encoder)


class _TiledLayer:
    """One layer on a whole sequence, of which everything but attention takes a tile at a time."""

    def __init__(self, program: Program, attentions: Any, batch: int, mine: Any, state: _LayerState):
        self.attentions, self.batch, self.mine, self.state = attentions, batch, mine, state
        self._layer_at = program.layer_at

    def _layer(self, tile: Array | int, mine: Any) -> tuple[Any, Any]:
        return self._layer_at(self.state.index, tile, mine, self.state.scanned, self.state.shared)

    # One tile: h [T, D], queries, keys, values and what was attended [T, heads, E].

    def pre_attention(self, i: int, tile: Array, rope: Any, mine: Any, h: Array) -> tuple[Array, ...]:
        """Queries, keys and values of one tile."""
        layer, keys = self._layer(tile, mine)
        rope = None if rope is None else jax.tree.map(lambda x: x[None], rope)
        return tuple(x[0] for x in layer.pre_attention(i, h[None], rope, keys))

    def post_attention(self, i: int, tile: Array, mine: Any, h: Array, attended: Array) -> Array:
        """The residual stream of one tile after attention i."""
        layer, keys = self._layer(tile, mine)
        return layer.post_attention(i, h[None], attended[None], keys)[0]

    def encoder_keys_values(self, i: int, mine: Any, encoder: Array) -> tuple[Array, Array]:
        """Keys and values of a cross-attention, of the whole encoder output."""
        # Tiles are counted from 0: the encoder's dropout has a number that no tile has.
        layer, keys = self._layer(-1, mine)
        return layer.encoder_keys_values(i, encoder, keys)

    # All tiles, forward.

    def _rope(self, i: int) -> Any:
        name = self.attentions[i].rope
        return None if name is None else self.state.rope[name]

    def queries(self, i: int, inputs: "_Tiles") -> tuple[Array, ...]:
        """Queries, keys and values [B, S, ...] of attention i from its input."""
        rope = self._rope(i)

        def one(tile: Array, h: Array, carry: None) -> tuple[None, tuple[Array, ...]]:
            here = None if rope is None else jax.tree.map(lambda x: _cut(x, tile), rope)
            return None, self.pre_attention(i, tile, here, self.mine, h)

        _, made = inputs.scan(one, None)
        seq = inputs.tokens // self.batch
        made = tuple(x.reshape(self.batch, seq, *x.shape[2:]) for x in made)
        if self.attentions[i].cross:
            made = (*made, *self.encoder_keys_values(i, self.mine, self.state.encoder))
        return made

    def attend(self, i: int, qkv: tuple[Array, ...]) -> tuple[Array, Array]:
        """Output and row statistics of attention i."""
        facts = self.attentions[i]
        with jax.named_scope("attention"):
            q, k, v = qkv
            return attention.forward(q, k, v, facts, self.state.masks[facts])

    def advance(self, i: int, h: Array, attended: Array) -> Array:
        """The residual stream [T, D] after attention i, written over the one before it."""
        rows = attended.reshape(h.shape[0], *attended.shape[2:])

        def one(tile: Array, out: Array) -> Array:
            return _write(out, self.post_attention(i, tile, self.mine, _cut(out, tile), _cut(rows, tile)), tile)

        return jax.lax.fori_loop(0, _tiles(h), one, h)

    def forward(self, h: Array) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
        """The layer's output, and what its attentions returned."""
        returned = []
        for i in range(len(self.attentions)):
            returned.append(self.attend(i, self.queries(i, _Tiles(h[None], 0))))
            h = self.advance(i, h, returned[-1][0])
        return h, tuple(returned)

    # Backward.

    def backward(
        self, inputs: "_Tiles", returned: Any, dh: Array, d_encoder: Array | None, gradients: _Gradients
    ) -> tuple[Array, Array | None]:
        """Gradients of the layer's input and of the encoder's output, which is added to; `gradients` is added to."""
        streams: list[_Tiles] = [inputs]
        again: list[Any] = [] if returned is None else list(returned)
        qkv: list[tuple[Array, ...]] = []
        # All but the last attention's part once more, for the streams between them.
        for i in range(len(self.attentions)):
            qkv.append(self.queries(i, streams[i]))
            if returned is None:
                again.append(self.attend(i, qkv[i]))
            if i + 1 < len(self.attentions):
                streams.append(_Tiles(self.advance(i, streams[i].whole(), again[i][0])[None], 0))
        for i in reversed(range(len(self.attentions))):
            dh, d_encoder = self._attention_backward(i, streams[i], qkv[i], again[i], dh, d_encoder, gradients)
        return dh, d_encoder

    def _attention_backward(
        self,
        i: int,
        inputs: "_Tiles",
        qkv: tuple[Array, ...],
        returned: tuple[Array, Array],
        dh: Array,
        d_encoder: Array | None,
        gradients: _Gradients,
    ) -> tuple[Array, Array | None]:
        """Gradients of the stream before attention i from that of the stream after it, written over it."""
        facts, index, rope = self.attentions[i], self.state.index, self._rope(i)
        attended, _ = returned
        rows = attended.reshape(dh.shape[0], *attended.shape[2:])

        def after(tile: Array, h: Array, carry: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            dh, d_rows = carry
            function = functools.partial(self.post_attention, i, tile)
            _, vjp = gradients.differentiate(function, self.mine, h, _cut(rows, tile))
            of_matrices, dh_tile, d_tile = vjp(_cut(dh, tile))
            gradients.add(index, of_matrices)
            return (_write(dh, dh_tile, tile), _write(d_rows, d_tile, tile)), None

        (dh, d_rows), _ = inputs.scan(after, (dh, jnp.zeros_like(rows)))
        d_attended = d_rows.reshape(attended.shape)
        with jax.named_scope("attention"):
            q, k, v = qkv
            d_qkv: tuple[Array, ...] = attention.backward(q, k, v, facts, self.state.masks[facts], returned, d_attended)
        if facts.cross:
            function = functools.partial(self.encoder_keys_values, i)
            _, vjp = gradients.differentiate(function, self.mine, self.state.encoder)
            of_matrices, more = vjp(d_qkv[1:])
            gradients.add(index, of_matrices)
            d_encoder = more.astype(jnp.float32) if d_encoder is None else d_encoder + more.astype(jnp.float32)
            d_qkv = d_qkv[:1]
        d_qkv = tuple(x.reshape(dh.shape[0], *x.shape[2:]) for x in d_qkv)

        def before(tile: Array, h: Array, dh: Array) -> tuple[Array, None]:
            here = None if rope is None else jax.tree.map(lambda x: _cut(x, tile), rope)
            function = functools.partial(self.pre_attention, i, tile, here)
            _, vjp = gradients.differentiate(function, self.mine, h)
            of_matrices, dh_tile = vjp(tuple(_cut(x, tile) for x in d_qkv))
            gradients.add(index, of_matrices)
            return _write(dh, _cut(dh, tile) + dh_tile, tile), None

        return inputs.scan(before, dh)[0], d_encoder


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """inputs[index] of [L, T, D], tile by tile, wherever it lies."""

    inputs: Array
    index: Array | int

    @property
    def tokens(self) -> int:
        """T."""
        return self.inputs.shape[1]

    @property
    def on_host(self) -> bool:
        """True where the inputs lie in host memory."""
        return jax.typeof(self.inputs).memory_space == jax.memory.Space.Host

    def whole(self) -> Array:
        """All tiles, on the device."""
        return jax.device_put(layer_slice(self.inputs, self.index), jax.memory.Space.Device)

    def tile(self, i: Array | int) -> Array:
        """Tile i, on the device."""
        size = tile_size(self.tokens)
        # One slice: two would copy a whole layer within the host's memory.
        cut = jax.lax.dynamic_slice(self.inputs, (self.index, i * size, 0), (1, size, self.inputs.shape[2]))
        return jax.device_put(cut, jax.memory.Space.Device)[0] if self.on_host else cut[0]

    def scan(self, body: Callable[[Array, Array, Any], tuple[Any, Any]], carry: Any) -> tuple[Any, Any]:
        """Scan body(i, tile i, carry) -> (carry, result) over the tiles.

        From host memory the next tile comes while this one is worked on.
        """
        tiles = self.tokens // tile_size(self.tokens)
        if not self.on_host:
            return jax.lax.scan(lambda carry, i: body(i, self.tile(i), carry), carry, jnp.arange(tiles))

        def step(state: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], Any]:
            h, carry = state
            coming = self.tile(jnp.minimum(i + 1, tiles - 1))
            carry, result = body(i, h, carry)
            return (coming, carry), result

        (_, carry), results = jax.lax.scan(step, (self.tile(0), carry), jnp.arange(tiles))
        return carry, results


@jax.named_scope("slice")
def layer_slice(tree: Any, layer: Array | int) -> Any:
    """One layer's part of every leaf."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), tree)


def _tiles(x: Array) -> int:
    return x.shape[0] // tile_size(x.shape[0])


def _cut(x: Array, i: Array) -> Array:
    """Tile i of x [T, ...]."""
    tile = tile_size(x.shape[0])
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile)


def _write(x: Array, new: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * new.shape[0], 0)
