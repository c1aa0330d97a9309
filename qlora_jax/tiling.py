"""A transformer layer on a long sequence: all but attention passes by tiles, and its input may lie in host memory.

Written out by hand, forward and backward, because what must not exist is a matter of order: automatic differentiation
holds the layer's input, its queries, keys and values, the attention's output and the gradients of all of these at once.
Here gradients take the place of what they are gradients of, and the input is read a tile at a time wherever it lies.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qlora_jax import attention
from qlora_jax.remat import Remat

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
        before: before(tile, trainable, frozen, *constants, h) -> (q [T, H, E], k [T, K, E], v [T, K, E]).
        after: after(tile, trainable, frozen, h, attended [T, H, E]) -> the layer's output [T, D].
        window: of the attention, see `qlora_jax.attention.attend`.

    Both take the number of the tile (for dropout), a pytree with gradients, a pytree without, and rows [T, ...].
    """

    before: Callable[..., tuple[Array, Array, Array]]
    after: Callable[..., Array]
    window: tuple[int, int] | None


def by_tiles(
    layer: Layer,
    remat: Remat,
    trainable: Any,
    frozen: Any,
    constants: tuple[Float[Array, "B S ..."], ...],
    mask: Array | None,
    h: Float[Array, "B S D"],
) -> Float[Array, "B S D"]:
    """A layer's output; its backward pass computes everything again from what `remat` says is kept.

    Args:
        layer: what to compute.
        remat: `full`, `save_attention` or `offload`.
        trainable: the layer's adapters; their gradients are summed over the tiles in their own dtype.
        frozen: pytree without gradients, whole for every tile.
        constants: without gradients, cut as h is.
        mask: of the attention.
        h: the layer's input.
    """
    batch, seq, width = h.shape
    constants = tuple(x.reshape(batch * seq, *x.shape[2:]) for x in constants)
    out = _by_tiles(layer, remat, batch, trainable, frozen, constants, mask, h.reshape(batch * seq, width))
    return out.reshape(h.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_tiles(
    layer: Layer, remat: Remat, batch: int, trainable: Any, frozen: Any, constants: Any, mask: Array | None, h: Array
) -> Array:
    return _forward(layer, remat, batch, trainable, frozen, constants, mask, h)[0]


def _forward(
    layer: Layer, remat: Remat, batch: int, trainable: Any, frozen: Any, constants: Any, mask: Array | None, h: Array
) -> tuple[Array, Any]:
    q, k, v = _queries(layer, batch, trainable, frozen, constants, h)
    attended, statistics = attention.forward(q, k, v, mask, layer.window)
    rows = attended.reshape(h.shape[0], *attended.shape[2:])

    def after(i: Array, out: Array) -> Array:
        return _write(out, layer.after(i, trainable, frozen, _cut(out, i), _cut(rows, i)), i)

    out = jax.lax.fori_loop(0, _tiles(h), after, h)
    kept = jax.device_put(h, jax.memory.Space.Host) if remat == "offload" else h
    saved = (attended, statistics) if remat == "save_attention" else None
    return out, (trainable, frozen, constants, mask, kept, saved)


def _backward(layer: Layer, remat: Remat, batch: int, residuals: Any, d_out: Array) -> tuple[Any, ...]:
    trainable, frozen, constants, mask, h, saved = residuals
    q, k, v = _queries(layer, batch, trainable, frozen, constants, h)
    attended, statistics = saved or attention.forward(q, k, v, mask, layer.window)
    rows = attended.reshape(h.shape[0], *attended.shape[2:])

    def after(i: Array, carry: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        gradient, dh, d_attended = carry
        _, vjp = jax.vjp(lambda *args: layer.after(i, args[0], frozen, *args[1:]), trainable, _cut(h, i), _cut(rows, i))
        mine, dh_tile, d_attended_tile = vjp(_cut(dh, i))
        return jax.tree.map(jnp.add, gradient, mine), _write(dh, dh_tile, i), _write(d_attended, d_attended_tile, i)

    start = (jax.tree.map(jnp.zeros_like, trainable), d_out, jnp.zeros_like(rows))
    gradient, dh, d_attended = jax.lax.fori_loop(0, _tiles(h), after, start)
    d_attended = d_attended.reshape(attended.shape)
    d_qkv = [
        x.reshape(h.shape[0], *x.shape[2:])
        for x in attention.backward(q, k, v, mask, attended, statistics, d_attended, layer.window)
    ]

    def before(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        gradient, dh = carry
        cut = [_cut(x, i) for x in constants]
        _, vjp = jax.vjp(lambda trainable, h: layer.before(i, trainable, frozen, *cut, h), trainable, _cut(h, i))
        mine, dh_tile = vjp(tuple(_cut(x, i) for x in d_qkv))
        return jax.tree.map(jnp.add, gradient, mine), _write(dh, _cut(dh, i) + dh_tile, i)

    gradient, dh = jax.lax.fori_loop(0, _tiles(h), before, (gradient, dh))
    return gradient, None, None, None, dh


_by_tiles.defvjp(_forward, _backward)


def _queries(
    layer: Layer, batch: int, trainable: Any, frozen: Any, constants: tuple[Array, ...], h: Array
) -> tuple[Array, ...]:
    """q, k, v [B, S, ...] of a layer's input [T, D] in whichever memory."""

    def before(i: Array) -> tuple[Array, Array, Array]:
        return layer.before(i, trainable, frozen, *(_cut(x, i) for x in constants), _cut(h, i))

    qkv = jax.lax.map(before, jnp.arange(_tiles(h)))
    return tuple(x.reshape(batch, h.shape[0] // batch, *x.shape[2:]) for x in qkv)


def _tiles(h: Array) -> int:
    return h.shape[0] // tile_size(h.shape[0])


def _cut(x: Array, i: Array) -> Array:
    """Tile i of x [T, ...], on the device."""
    tile = tile_size(x.shape[0])
    cut = jax.lax.dynamic_slice_in_dim(x, i * tile, tile)
    return jax.device_put(cut, jax.memory.Space.Device) if _on_host(x) else cut


def _on_host(x: Array) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _write(x: Array, new: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, i * new.shape[0], 0)
