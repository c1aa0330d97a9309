"""Transformer layers on a long sequence: all but attention passes by tiles, and layer inputs may lie in host memory.

Written out by hand, forward and backward, because what must not exist is a matter of order: automatic differentiation
holds a layer's input, its queries, keys and values, the attention's output and the gradients of all of these at once.
Here gradients take the place of what they are gradients of, and the input is read a tile at a time wherever it lies.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax.nn import attention
from qlora_jax.nn.remat import Remat

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
class Layer:
    """A layer around its attention, as functions of single tokens.

    Attributes:
        before: before(place, trainable, sliced, whole, *constants, h) -> (q [T, H, E], k [T, K, E], v [T, K, E]).
        after: after(place, trainable, sliced, whole, h, attended [T, H, E]) -> the layer's output [T, D].
        window: of the attention, see `qlora_jax.nn.attention.attend`.

    place is (layer, tile), the two numbers; the rest is as in `run`: `trainable` and `sliced` of this layer, rows of
    this tile.
    """

    before: Callable[..., tuple[Array, Array, Array]]
    after: Callable[..., Array]
    window: tuple[int, int] | None


def run(
    layer: Layer,
    remat: Remat,
    trainable: Any,
    sliced: Any,
    whole: Any,
    constants: tuple[Float[Array, "B S ..."], ...],
    mask: Array | None,
    h: Float[Array, "B S D"],
) -> Float[Array, "B S D"]:
    """Apply layers one after the other; the backward pass computes each again from what `remat` says is kept.

    Args:
        layer: what to compute.
        remat: `full`, `save_attention` or `offload`.
        trainable: adapters, leading axis L.
        sliced: without gradients, leading axis L.
        whole: without gradients, given to every layer as it is.
        constants: without gradients, cut into tiles as h is.
        mask: of the attention.
        h: the first layer's input.
    """
    batch, seq, width = h.shape
    constants = tuple(x.reshape(batch * seq, *x.shape[2:]) for x in constants)
    out = _run(layer, remat, batch, trainable, (sliced, whole, constants, mask), h.reshape(batch * seq, width))
    return out.reshape(h.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(layer: Layer, remat: Remat, batch: int, trainable: Any, frozen: Any, h: Array) -> Array:
    def one(h: Array, index: Array) -> tuple[Array, None]:
        return _forward_layer(layer, batch, index, trainable, frozen, h)[0], None

    return jax.lax.scan(one, h, jnp.arange(_depth(trainable)))[0]


def _forward(layer: Layer, remat: Remat, batch: int, trainable: Any, frozen: Any, h: Array) -> tuple[Array, Any]:
    def one(h: Array, index: Array) -> tuple[Array, Any]:
        out, attention_saved = _forward_layer(layer, batch, index, trainable, frozen, h)
        kept = jax.device_put(h, jax.memory.Space.Host) if remat == "offload" else h
        return out, (kept, attention_saved if remat == "save_attention" else None)

    out, saved = jax.lax.scan(one, h, jnp.arange(_depth(trainable)))
    return out, (trainable, frozen, *saved)


def _backward(
    layer: Layer,
    remat: Remat,
    batch: int,
    residuals: Any,
    d_out: Array,
    for_trainable: Any,
    for_frozen: Any,
    for_h: Any,
) -> None:
    trainable, frozen, inputs, saved = residuals
    # A matrix whose gradient nobody asked for has an accumulator that holds nothing.
    accumulators, structure = jax.tree.flatten(for_trainable)
    asked = [
        i for i, accumulator in enumerate(accumulators) if hasattr(accumulator, "ref") or hasattr(accumulator, "val")
    ]
    leaves = jax.tree.leaves(trainable)
    given = [getattr(accumulators[i], "ref", None) for i in asked]
    # Added to in place, layer by layer: where the caller gave a place, no second copy of the gradients exists.
    totals = [
        jax.new_ref(jnp.zeros_like(leaves[i])) if ref is None else ref for i, ref in zip(asked, given, strict=True)
    ]

    def backward_layer(step: Array, dh: Array) -> Array:
        index = _depth(trainable) - 1 - step
        sliced, whole, constants, mask = frozen
        here, sliced = (jax.tree.map(lambda x: _at(x, index), tree) for tree in (trainable, sliced))

        def differentiate(function: Callable[..., Any], *arrays: Array) -> tuple[Any, Callable[..., Any]]:
            """`function` of the matrices asked for and of arrays, differentiated."""

            def of_asked(asked_leaves: list[Array], *arrays: Array) -> Any:
                mine = jax.tree.leaves(here)
                for i, leaf in zip(asked, asked_leaves, strict=True):
                    mine[i] = leaf
                return function(jax.tree.unflatten(structure, mine), *arrays)

            return jax.vjp(of_asked, [jax.tree.leaves(here)[i] for i in asked], *arrays)

        def add(gradients: list[Array]) -> None:
            for total, gradient in zip(totals, gradients, strict=True):
                total[index] += gradient

        q, k, v = _queries(layer, batch, index, here, sliced, whole, constants, inputs)
        if saved is None:
            attended, statistics = attention.forward(q, k, v, mask, layer.window)
        else:
            attended, statistics = (_at(x, index) for x in saved)
        rows = attended.reshape(dh.shape[0], *attended.shape[2:])

        def after(i: Array, h: Array, carry: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            dh, d_rows = carry
            _, vjp = differentiate(
                lambda mine, h, attended: layer.after((index, i), mine, sliced, whole, h, attended), h, _cut(rows, i)
            )
            gradients, dh_tile, d_tile = vjp(_cut(dh, i))
            add(gradients)
            return (_write(dh, dh_tile, i), _write(d_rows, d_tile, i)), None

        (dh, d_rows), _ = _each_tile(inputs, index, after, (dh, jnp.zeros_like(rows)))
        d_attended = d_rows.reshape(attended.shape)
        d_qkv = [
            x.reshape(dh.shape[0], *x.shape[2:])
            for x in attention.backward(q, k, v, mask, attended, statistics, d_attended, layer.window)
        ]

        def before(i: Array, h: Array, dh: Array) -> tuple[Array, None]:
            tiles = [_cut(x, i) for x in constants]
            _, vjp = differentiate(lambda mine, h: layer.before((index, i), mine, sliced, whole, *tiles, h), h)
            gradients, dh_tile = vjp(tuple(_cut(x, i) for x in d_qkv))
            add(gradients)
            return _write(dh, _cut(dh, i) + dh_tile, i), None

        return _each_tile(inputs, index, before, dh)[0]

    for_h.accum(jax.lax.fori_loop(0, _depth(trainable), backward_layer, d_out))
    for i, ref, total in zip(asked, given, totals, strict=True):
        if ref is None:
            accumulators[i].accum(jax.freeze(total))


_run.defvjp_with_accums(_forward, _backward)


def _forward_layer(
    layer: Layer, batch: int, index: Array, trainable: Any, frozen: Any, h: Array
) -> tuple[Array, tuple[Array, Array]]:
    """A layer's output, and what its attention returned."""
    sliced, whole, constants, mask = frozen
    trainable, sliced = (jax.tree.map(lambda x: _at(x, index), tree) for tree in (trainable, sliced))
    q, k, v = _queries(layer, batch, index, trainable, sliced, whole, constants, h[None])
    attended, statistics = attention.forward(q, k, v, mask, layer.window)
    rows = attended.reshape(h.shape[0], *attended.shape[2:])

    def after(i: Array, out: Array) -> Array:
        return _write(out, layer.after((index, i), trainable, sliced, whole, _cut(out, i), _cut(rows, i)), i)

    return jax.lax.fori_loop(0, _tiles(h), after, h), (attended, statistics)


def _queries(
    layer: Layer, batch: int, index: Array, trainable: Any, sliced: Any, whole: Any, constants: Any, inputs: Array
) -> tuple[Array, ...]:
    """q, k, v [B, S, ...] of a layer, from its input inputs[index], or inputs[0] if there is no other."""

    def before(i: Array, h: Array, carry: None) -> tuple[None, tuple[Array, Array, Array]]:
        tiles = [_cut(x, i) for x in constants]
        return None, layer.before((index, i), trainable, sliced, whole, *tiles, h)

    _, qkv = _each_tile(inputs, index if inputs.shape[0] > 1 else 0, before, None)
    return tuple(x.reshape(batch, inputs.shape[1] // batch, *x.shape[2:]) for x in qkv)


def _each_tile(
    inputs: Array, layer: Array | int, body: Callable[[Array, Array, Any], tuple[Any, Any]], carry: Any
) -> tuple[Any, Any]:
    """Scan body(i, tile i of inputs[layer], carry) -> (carry, result) over the tiles of inputs [L, T, D].

    From host memory the next tile comes while this one is worked on.
    """
    tile = tile_size(inputs.shape[1])
    tiles = inputs.shape[1] // tile

    def cut(i: Array | int) -> Array:
        # One slice: two would copy a whole layer within the host's memory.
        cut = jax.lax.dynamic_slice(inputs, (layer, i * tile, 0), (1, tile, inputs.shape[2]))
        return jax.device_put(cut, jax.memory.Space.Device)[0] if on_host else cut[0]

    on_host = jax.typeof(inputs).memory_space == jax.memory.Space.Host
    if not on_host:
        return jax.lax.scan(lambda carry, i: body(i, cut(i), carry), carry, jnp.arange(tiles))

    def step(state: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], Any]:
        h, carry = state
        coming = cut(jnp.minimum(i + 1, tiles - 1))
        carry, result = body(i, h, carry)
        return (coming, carry), result

    (_, carry), results = jax.lax.scan(step, (cut(0), carry), jnp.arange(tiles))
    return carry, results


def _depth(trainable: Any) -> int:
    return jax.tree.leaves(trainable)[0].shape[0]


def _at(x: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def _tiles(x: Array) -> int:
    return x.shape[0] // tile_size(x.shape[0])


def _cut(x: Array, i: Array) -> Array:
    """Tile i of x [T, ...]."""
    tile = tile_size(x.shape[0])
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile)


def _write(x: Array, new: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * new.shape[0], 0)
