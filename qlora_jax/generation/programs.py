"""Programs of the engine: one that reads a piece of a prompt into a slot, one that adds a token to every busy slot."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.generation.adapters import AdapterStack
from qlora_jax.generation.sampling import Features, Rows, filtered, next_tokens
from qlora_jax.nn.stack import Cache


class State(NamedTuple):
    """All slots on the device; programs update it in place.

    Attributes:
        cache: keys and values, a row a slot; its `lengths` are the tokens of each.
        logits: float32 [B, V], of the token that follows.
        history: int32 [B, capacity], tokens of each slot.
        generated: int32 [B], those of them that are the answer.
    """

    cache: Any
    logits: Any
    history: Any
    generated: Any


class Piece(NamedTuple):
    """A piece of a prompt; scalars.

    Attributes:
        slot: that it goes to.
        start: tokens of the prompt before it, which the slot's cache has.
        count: tokens of it; what follows them is padding.
        adapter: of the request, where there are several.
    """

    slot: Any
    start: Any
    count: Any
    adapter: Any


class Chosen(NamedTuple):
    """A token of every slot.

    Attributes:
        tokens: int32 [B].
        logprobs: float32 [B], of each before anything was filtered.
        likeliest: int32 [B, n], the likeliest tokens.
        likeliest_logprobs: float32 [B, n].
    """

    tokens: Any
    logprobs: Any
    likeliest: Any
    likeliest_logprobs: Any


def empty_state(graphdef: nnx.GraphDef, lora: Any, frozen: nnx.State, slots: int, capacity: int) -> State:
    """Return the state of slots without tokens, each with room for `capacity`."""
    model = model_of(graphdef, lora, frozen)
    return State(
        model.empty_cache(slots, capacity),
        jnp.zeros((slots, model.config.vocab_size), jnp.float32),
        jnp.zeros((slots, capacity), jnp.int32),
        jnp.zeros(slots, jnp.int32),
    )


def model_of(graphdef: nnx.GraphDef, lora: Any, frozen: nnx.State, rows: Array | None = None) -> Any:
    """Return the model; of an `AdapterStack` with the adapters of some rows, and without any it is not to be called."""
    if isinstance(lora, AdapterStack):
        lora = lora.matrices if rows is None else lora.of_rows(rows)
    return nnx.merge(graphdef, lora, frozen)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def prefill(
    lora: Any, frozen: nnx.State, state: State, tokens: Int[Array, " S"], piece: Piece, *, graphdef: nnx.GraphDef
) -> State:
    """Read a piece of a prompt.

    Args:
        lora: adapters of the model, or an `AdapterStack`.
        frozen: base weights.
        state: is given up.
        tokens: of the piece, padded on the right.
        piece: where they go.
        graphdef: of the model.
    """
    model = model_of(graphdef, lora, frozen, piece.adapter[None])
    cache, places = state.cache, piece.start + jnp.arange(len(tokens))

    def row(arrays: Any) -> Any:
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, piece.slot, 1, axis=1), arrays)

    def put_back(arrays: Any, rows: Any) -> Any:
        return jax.tree.map(
            lambda a, one: jax.lax.dynamic_update_slice_in_dim(a, one, piece.slot, axis=1), arrays, rows
        )

    own = Cache(row(cache.keys), row(cache.values), piece.start[None], cache.capacity)
    # Of the padding, too, none beyond the piece: a rotary table may follow the longest.
    positions = jnp.minimum(places, piece.start + piece.count - 1)
    hidden, own = model(tokens[None], positions[None], cache=own, counts=piece.count[None])
    last = jax.lax.dynamic_slice_in_dim(hidden, piece.count - 1, 1, axis=1)
    written = jnp.where(jnp.arange(len(tokens)) < piece.count, places, state.history.shape[1])
    return State(
        Cache(
            put_back(cache.keys, own.keys),
            put_back(cache.values, own.values),
            cache.lengths.at[piece.slot].set(own.lengths[0]),
            cache.capacity,
        ),
        state.logits.at[piece.slot].set(model.logits(last)[0, 0]),
        state.history.at[piece.slot, written].set(tokens, mode="drop"),
        state.generated.at[piece.slot].set(0),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "features", "eos_ids", "likeliest"), donate_argnames="state")
def advance(
    lora: Any,
    frozen: nnx.State,
    state: State,
    busy: Bool[Array, " B"],
    rows: tuple[Rows, Int[Array, " B"]],
    *,
    graphdef: nnx.GraphDef,
    features: Features,
    eos_ids: tuple[int, ...],
    likeliest: int,
) -> tuple[State, Chosen]:
    """Choose a token for every busy slot and pass it through the model.

    Args:
        lora: adapters of the model, or an `AdapterStack`.
        frozen: base weights.
        state: is given up.
        busy: slots that get a token; the others stay as they are.
        rows: settings of each slot, and its adapter.
        graphdef: of the model.
        features: filters of the logits.
        eos_ids: tokens that end an answer.
        likeliest: how many of the likeliest tokens are returned.
    """
    settings, adapters = rows
    model = model_of(graphdef, lora, frozen, adapters)
    lengths, generated = state.cache.lengths, state.generated
    stops = jnp.isin(jnp.arange(state.logits.shape[1]), jnp.asarray(eos_ids, jnp.int32))
    logits = filtered(state.logits, settings, features, (state.history, lengths, generated), stops)
    tokens = next_tokens(logits, settings, features, generated)
    chosen = _logprobs(state.logits, tokens, likeliest)
    places = jnp.where(busy, lengths, state.history.shape[1])
    history = state.history.at[jnp.arange(len(tokens)), places].set(tokens, mode="drop")
    hidden, cache = model(tokens[:, None], lengths[:, None], cache=state.cache, counts=busy.astype(jnp.int32))
    logits = jnp.where(busy[:, None], model.logits(hidden)[:, 0], state.logits)
    return State(cache, logits, history, generated + busy), chosen


def _logprobs(logits: Float[Array, "B V"], tokens: Int[Array, " B"], likeliest: int) -> Chosen:
    logs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logs, likeliest)
    return Chosen(tokens, jnp.take_along_axis(logs, tokens[:, None], axis=1)[:, 0], ids.astype(jnp.int32), top)
