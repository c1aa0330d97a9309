"""Functions of single tokens, applied to a tile of the sequence at a time: what lies between is never whole."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

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


# fn(tile index, trainable, frozen, *tiles of `constants`, *tiles of `arrays`) -> tuple of tiles.
TileFunction = Callable[..., tuple[Array, ...]]


def by_tiles(
    fn: TileFunction,
    tile: int,
    trainable: Any,
    frozen: Any,
    constants: Sequence[Array],
    arrays: Sequence[Array],
    in_place: tuple[tuple[int, int], ...] = (),
) -> tuple[Array, ...]:
    """`fn` on each tile of `tile` rows, one after the other, its results put together.

    The backward pass keeps only the inputs and recomputes a tile's forward pass; nothing but the gradients, and the
    results themselves, has T rows.

    Args:
        fn: fn(index, trainable, frozen, *constants, *arrays), on tiles [tile, ...], returning a tuple of such tiles.
        tile: rows of a tile, a divisor of T.
        trainable: pytree of floating arrays with gradients, whole for every tile.
        frozen: pytree without gradients, whole for every tile.
        constants: arrays [T, ...] without gradients.
        arrays: floating arrays [T, ...] with gradients.
        in_place: pairs (array, result) of one shape and dtype: the array's gradient is written over the result's
            cotangent instead of beside it.
    """
    return _by_tiles(fn, tile, in_place, trainable, frozen, tuple(constants), tuple(arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_tiles(
    fn: TileFunction,
    tile: int,
    in_place: tuple[tuple[int, int], ...],
    trainable: Any,
    frozen: Any,
    constants: tuple[Array, ...],
    arrays: tuple[Array, ...],
) -> tuple[Array, ...]:
    rows = arrays[0].shape[0]
    tiles = [x.reshape(rows // tile, tile, *x.shape[1:]) for x in (*constants, *arrays)]
    results = jax.lax.map(lambda xs: fn(xs[0], trainable, frozen, *xs[1:]), (jnp.arange(rows // tile), *tiles))
    return tuple(y.reshape(rows, *y.shape[2:]) for y in results)


def _forward(
    fn: TileFunction, tile: int, in_place: Any, trainable: Any, frozen: Any, constants: Any, arrays: Any
) -> tuple[tuple[Array, ...], Any]:
    results = _by_tiles(fn, tile, in_place, trainable, frozen, constants, arrays)
    return results, (trainable, frozen, constants, arrays)


def _backward(
    fn: TileFunction, tile: int, in_place: tuple[tuple[int, int], ...], residuals: Any, cotangents: tuple[Array, ...]
) -> tuple[Any, None, None, tuple[Array, ...]]:
    trainable, frozen, constants, arrays = residuals
    replaces = dict(in_place)
    kept = [cotangent for i, cotangent in enumerate(cotangents) if i not in replaces.values()]
    start = tuple(cotangents[replaces[i]] if i in replaces else jnp.zeros_like(x) for i, x in enumerate(arrays))

    def cut(x: Array, i: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, i * tile, tile)

    def one(i: Array, carry: tuple[Any, tuple[Array, ...]]) -> tuple[Any, tuple[Array, ...]]:
        gradient, buffers = carry
        written = {result: cut(buffers[array], i) for array, result in in_place}
        rest = iter([cut(x, i) for x in kept])
        tile_cotangents = tuple(written[k] if k in written else next(rest) for k in range(len(cotangents)))
        tile_constants = [cut(x, i) for x in constants]
        _, vjp = jax.vjp(
            lambda trainable, *xs: fn(i, trainable, frozen, *tile_constants, *xs),
            trainable,
            *(cut(x, i) for x in arrays),
        )
        new, *tile_gradients = vjp(tile_cotangents)
        buffers = tuple(
            jax.lax.dynamic_update_slice_in_dim(buffer, dx, i * tile, 0)
            for buffer, dx in zip(buffers, tile_gradients, strict=True)
        )
        return jax.tree.map(jnp.add, gradient, new), buffers

    zero = jax.tree.map(jnp.zeros_like, trainable)
    gradient, buffers = jax.lax.fori_loop(0, arrays[0].shape[0] // tile, one, (zero, start))
    return gradient, None, None, buffers


_by_tiles.defvjp(_forward, _backward)
