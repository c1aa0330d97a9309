"""Keys and values of the tokens before: how they are kept, in 8 bits too, and attended to."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.nn.attention import Attention, attend_xla


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Heads:
    """Keys or values in 8 bits: those of a token and head have a scale, which is a 127th of the largest.

    Attributes:
        values: int8 [..., E].
        scales: float32 [...].
    """

    values: Any
    scales: Any

    @classmethod
    def of(cls, heads: Float[Array, "*heads E"]) -> "Int8Heads":
        """Round to the nearest multiple of the scale."""
        heads = heads.astype(jnp.float32)
        scales = jnp.max(jnp.abs(heads), axis=-1) / 127
        divisors = jnp.where(scales > 0, scales, 1)[..., None]
        return cls(jnp.round(heads / divisors).astype(jnp.int8), scales)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far; every row has its own number of them.

    Self-attentions that see the same number of tokens share a pair of arrays; with a window W those have W + margin
    slots, and token t of a row is written to its slot t mod (W + margin).

    Attributes:
        keys, values: one array [attentions, B, slots, K, E], or `Int8Heads` of that shape, for each window of the
            stack, in order of first use.
        lengths: int32 [B], tokens of each row; the last may be taken back by writing a smaller number, see `margin`.
        capacity: tokens of a row that there is room for.
        margin: tokens that may be taken back.
        row: scalar, the row that a batch of one is; None where a batch is all rows. `lengths` are those of the batch.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    lengths: Any
    capacity: int = dataclasses.field(metadata={"static": True})
    margin: int = dataclasses.field(default=0, metadata={"static": True})
    row: Any = None


def empty_heads(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return keys or values of no tokens, [..., E]; `Int8Heads` for int8."""
    if dtype == jnp.int8:
        return Int8Heads(jnp.zeros(shape, dtype), jnp.zeros(shape[:-1], jnp.float32))
    return jnp.zeros(shape, dtype)


def attend_cached(
    qkv: tuple[Array, ...],
    facts: Attention,
    arrays: tuple[Any, Any],
    place: tuple[Array | int, Any],
    tokens: tuple[Int[Array, " B"], Int[Array, " B"]],
) -> tuple[tuple[Any, Any], Float[Array, "B S H E"]]:
    """Attend over cached tokens and new ones, whose keys and values are written into the cache.

    Args:
        qkv: queries [B, S, H, E], keys and values [B, S, K, E] of the new tokens.
        facts: of the attention.
        arrays: keys and values of all attentions with this window, each as in `Cache`, so that a loop over layers
            writes them in place.
        place: (place of this attention in them, `Cache.row`).
        tokens: (tokens of each row in the cache, new ones).

    Returns:
        The arrays with the new tokens, and what was attended to.
    """
    (q, *kv), (lengths, counts), (which, row) = qkv, tokens, place
    batch, seq, slots = *q.shape[:2], jax.tree.leaves(arrays[0])[0].shape[2]
    places = lengths[:, None] + jnp.arange(seq)  # of the new tokens in their rows
    ends = (lengths + counts)[:, None]
    # Of more tokens than slots the last stay, each in its slot; what has none is dropped.
    kept = (places < ends) & (places >= ends - slots)
    if facts.window is None:  # a full cache takes no more: what it has stays
        kept &= places < slots
    target = jnp.where(kept, places % slots, slots)
    rows = jnp.arange(batch)[:, None] if row is None else row[None, None]
    new = tuple(_as_kept(x, a) for x, a in zip(kv, arrays, strict=True))

    def write(a: Array, x: Array) -> Array:
        return _as_stored(a.at[which, rows, target].set(x, mode="drop", unique_indices=True))

    def rows_of(a: Array) -> Array:
        if row is None:
            return jax.lax.dynamic_index_in_dim(a, which, keepdims=False)
        return jax.lax.dynamic_slice(a, (which, row, *[0] * (a.ndim - 2)), (1, 1, *a.shape[2:]))[0]

    def layer_of(arrays: Any) -> Any:
        return jax.tree.map(rows_of, arrays)

    def tokens_in_slots(ends: Array) -> Array:
        """Last token that was written to each slot; negative if there is none."""
        last = ends - 1
        return last - (last - jnp.arange(slots)) % slots

    written = jax.tree.map(write, arrays, new)
    if facts.window is None or seq == 1:
        k, v = layer_of(written)
        at = tokens_in_slots(ends)
    else:  # the first of several new tokens see some that the last have replaced
        k, v = jax.tree.map(lambda a, x: jnp.concatenate([a, x], axis=1), layer_of(arrays), new)
        at = jnp.concatenate([tokens_in_slots(lengths[:, None]), jnp.where(places < ends, places, -1)], axis=1)
    mask = jax.vmap(facts.visible)(places, at) & (at >= 0)[:, None, :]
    return written, _attend(q, k, v, facts, mask[:, None])


def _as_kept(new: Array, like: Any) -> Any:
    return Int8Heads.of(new) if isinstance(like, Int8Heads) else new.astype(like.dtype)


def _attend(q: Array, k: Any, v: Any, facts: Attention, mask: Bool[Array, "B 1 S T"]) -> Array:
    # The mask may hide everything from a padded query, and one token a step leaves no scores to save.
    if not isinstance(k, Int8Heads):
        return attend_xla(q, k.astype(q.dtype), v.astype(q.dtype), facts, mask)
    batch, seq, heads, width = q.shape
    queries = q.reshape(batch, seq, k.values.shape[2], -1, width)  # [B, S, K, H / K, E]
    # Scales are of tokens and heads: they go to the scores and probabilities, which are fewer than keys and values.
    keys, values = (each.values.astype(q.dtype) for each in (k, v))
    key_scales, value_scales = (each.scales.transpose(0, 2, 1)[:, :, None, None] for each in (k, v))  # [B, K, 1, 1, T]
    scores = jnp.einsum("bskge,btke->bkgst", queries, keys, preferred_element_type=jnp.float32)
    scores *= key_scales * (width**-0.5 if facts.scale is None else facts.scale)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = (jax.nn.softmax(scores, axis=-1) * value_scales).astype(q.dtype)
    attended = jnp.einsum("bkgst,btke->bskge", weights, values, preferred_element_type=jnp.float32)
    return attended.astype(q.dtype).reshape(batch, seq, heads, width)


def _as_stored(cache: Array) -> Array:
    """Keep the order of axes in memory: XLA would turn the whole cache round for a loop of layers, and back."""
    return with_layout_constraint(cache, Layout(tuple(range(cache.ndim))))
