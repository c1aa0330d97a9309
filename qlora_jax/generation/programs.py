"""Programs of generation: one that reads a piece of a prompt into a slot, one that adds tokens to every busy slot."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.choices import CacheDtype
from qlora_jax.errors import UserError
from qlora_jax.formatting import format_bytes
from qlora_jax.generation.adapters import AdapterStack
from qlora_jax.generation.sampling import Features, Rows, filtered, next_tokens, stop_mask
from qlora_jax.kernels.xla import WIDE_VECTORS

SCORED_AT_A_TIME = 16
"""Tokens of a prompt whose logits are in memory at a time."""


class Structure:
    """The structure of a model as an argument of programs: hashed once, and not at every call.

    Args:
        graphdef: of the model.
    """

    def __init__(self, graphdef: nnx.GraphDef):
        self._graphdef, self._hash = graphdef, hash(graphdef)

    def __hash__(self) -> int:
        """Return the hash of the graph definition."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Compare what the models are."""
        return self is other or (isinstance(other, Structure) and self._graphdef == other._graphdef)

    def model(self, lora: Any, frozen: nnx.State, rows: Array | None = None) -> Any:
        """Return the model, of an `AdapterStack` with the adapters of those rows; it is not to be called without."""
        if isinstance(lora, AdapterStack):
            lora = lora.matrices if rows is None else lora.of_rows(rows)
        return nnx.merge(self._graphdef, lora, frozen)


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


class Guesses(NamedTuple):
    """Tokens that may follow in each slot.

    Attributes:
        tokens: int32 [B, S], in their order.
        counts: int32 [B], those that mean something.
    """

    tokens: Any
    counts: Any


class Scores(NamedTuple):
    """Natural logarithms of probabilities before anything was filtered.

    Attributes:
        logprobs: float32 [...], of tokens that came.
        likeliest: int32 [..., n], the likeliest tokens in their places.
        likeliest_logprobs: float32 [..., n].
    """

    logprobs: Any
    likeliest: Any
    likeliest_logprobs: Any


class Chosen(NamedTuple):
    """Tokens of every slot.

    Attributes:
        tokens: int32 [B, S].
        counts: int32 [B], those that were chosen; at least one of a busy slot.
        scores: of them.
    """

    tokens: Any
    counts: Any
    scores: Scores


def empty_state(
    structure: Structure,
    lora: Any,
    frozen: nnx.State,
    slots: int,
    capacity: int,
    *,
    cache_dtype: CacheDtype = "auto",
    margin: int = 0,
) -> State:
    """Return the state of slots without tokens, each with room for `capacity`; see `Cache` for the rest.

    Raises:
        UserError: there is no memory for it; says how much it takes.
    """
    model = structure.model(lora, frozen)

    def empty() -> State:
        return State(
            model.empty_cache(slots, capacity, dtype=cache_dtype, margin=margin),
            jnp.zeros((slots, model.config.vocab_size), jnp.float32),
            jnp.zeros((slots, capacity), jnp.int32),
            jnp.zeros(slots, jnp.int32),
        )

    try:
        return jax.block_until_ready(empty())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        shapes = jax.eval_shape(empty)
        needed = format_bytes(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)))
        raise UserError(
            f"keys and values of {slots} x {capacity} tokens take {needed}, for which there is no memory; give less "
            "`context`, or fewer `slots`."
        ) from None


@functools.partial(
    jax.jit, static_argnames=("structure", "likeliest"), donate_argnames="state", compiler_options=WIDE_VECTORS
)
def prefill(
    lora: Any,
    frozen: nnx.State,
    state: State,
    tokens: Int[Array, " S"],
    piece: Piece,
    *,
    structure: Structure,
    likeliest: int | None = None,
) -> tuple[State, Scores | None]:
    """Read a piece of a prompt.

    Args:
        lora: adapters of the model, or an `AdapterStack`.
        frozen: base weights.
        state: is given up.
        tokens: of the piece, padded on the right.
        piece: where they go.
        structure: of the model.
        likeliest: how many of the likeliest tokens are returned in the scores of the tokens [S]; None for no scores.

    Returns:
        The state, and the scores of the tokens, of which the first means nothing where nothing comes before it.
    """
    model = structure.model(lora, frozen, piece.adapter[None])
    cache, places = state.cache, piece.start + jnp.arange(len(tokens))
    own = dataclasses.replace(cache, lengths=piece.start[None], row=piece.slot)
    # Of the padding, too, none beyond the piece: a rotary table may follow the longest.
    positions = jnp.minimum(places, piece.start + piece.count - 1)
    hidden, own = model(tokens[None], positions[None], cache=own, counts=piece.count[None])
    last = jax.lax.dynamic_slice_in_dim(hidden, piece.count - 1, 1, axis=1)
    written = jnp.where(jnp.arange(len(tokens)) < piece.count, places, state.history.shape[1])
    before = state.logits[piece.slot]
    scores = None if likeliest is None else _prompt_scores(model, before, hidden[0], tokens, likeliest)
    return State(
        dataclasses.replace(own, lengths=cache.lengths.at[piece.slot].set(own.lengths[0]), row=None),
        state.logits.at[piece.slot].set(model.logits(last)[0, 0]),
        state.history.at[piece.slot, written].set(tokens, mode="drop"),
        state.generated.at[piece.slot].set(0),
    ), scores


@functools.partial(jax.jit, donate_argnames="state")
def forget(state: State, slot: Any) -> State:
    """Clear a slot: numbers that are not finite would reach whatever comes after them, hidden or not.

    Args:
        state: is given up.
        slot: scalar.
    """
    keys, values = jax.tree.map(lambda a: a.at[:, slot].set(0), (state.cache.keys, state.cache.values))
    cache = dataclasses.replace(state.cache, keys=keys, values=values, lengths=state.cache.lengths.at[slot].set(0))
    return state._replace(cache=cache, logits=state.logits.at[slot].set(0))


def _prompt_scores(
    model: Any, before: Float[Array, " V"], hidden: Float[Array, "S D"], tokens: Int[Array, " S"], likeliest: int
) -> Scores:
    """Score tokens by the logits before the first and the hidden states that the others follow."""
    size = min(SCORED_AT_A_TIME, len(tokens))
    following = jnp.roll(tokens, -1).reshape(-1, size)

    def score(tile: tuple[Array, Array]) -> Scores:
        hidden, tokens = tile
        return _scores(model.logits(hidden[None])[0], tokens, likeliest)

    later = jax.lax.map(score, (hidden.reshape(*following.shape, -1), following))
    first = _scores(before[None], tokens[:1], likeliest)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b.reshape(len(tokens), *b.shape[2:])[:-1]]), first, later)


@functools.partial(
    jax.jit,
    static_argnames=("structure", "features", "eos_ids", "likeliest"),
    donate_argnames="state",
    compiler_options=WIDE_VECTORS,
)
def advance(
    lora: Any,
    frozen: nnx.State,
    state: State,
    busy: Bool[Array, " B"],
    rows: tuple[Rows, Int[Array, " B"]],
    guesses: Guesses | None = None,
    *,
    structure: Structure,
    features: Features,
    eos_ids: tuple[int, ...],
    likeliest: int,
) -> tuple[State, Chosen]:
    """Choose a token for every busy slot and pass it through the model, with guesses at those that follow.

    Guesses that are what would have been chosen are tokens of the answer; the first that is not, and all after it, are
    taken back. So a slot gets the tokens that it would get without guesses, in fewer steps.

    Args:
        lora: adapters of the model, or an `AdapterStack`.
        frozen: base weights.
        state: is given up.
        busy: slots that get tokens; the others stay as they are.
        rows: settings of each slot, and its adapter.
        guesses: at the next tokens, S of them; None for none. The cache's margin must be S - 1 or more.
        structure: of the model.
        features: filters of the logits.
        eos_ids: tokens that end an answer.
        likeliest: how many of the likeliest tokens are returned.

    Returns:
        The state, and the tokens that were chosen.
    """
    settings, adapters = rows
    model = structure.model(lora, frozen, adapters)
    lengths, generated = state.cache.lengths, state.generated
    stops = stop_mask(eos_ids, state.logits.shape[1])

    def choose(logits: Array, history: Array, settings: Rows, lengths: Array, generated: Array) -> Array:
        logits = filtered(logits, settings, features, (history, lengths, generated), stops)
        return next_tokens(logits, settings, features, generated)

    fed = choose(state.logits, state.history, settings, lengths, generated)[:, None]
    counts = busy.astype(jnp.int32)
    if guesses is not None:
        right = guesses.tokens[:, :1] == fed
        fed = jnp.concatenate([fed, guesses.tokens[:, 1:]], axis=1)
        counts = jnp.where(busy & right[:, 0], jnp.maximum(guesses.counts, 1), counts)
    batch, size = fed.shape
    places = lengths[:, None] + jnp.arange(size)
    written = jnp.where(jnp.arange(size) < counts[:, None], places, state.history.shape[1])
    history = state.history.at[jnp.arange(batch)[:, None], written].set(fed, mode="drop")
    positions = jnp.minimum(places, jnp.maximum(lengths + counts - 1, lengths)[:, None])
    hidden, cache = model(fed, positions, cache=state.cache, counts=counts)
    logits = model.logits(hidden)
    taken = busy.astype(jnp.int32)
    if size > 1:

        def each(values: Any) -> Any:
            return jax.tree.map(lambda a: jnp.repeat(a, size - 1, axis=0), values)

        # The token after each guess, as if all before it had been chosen.
        further = (lengths[:, None] + jnp.arange(1, size)).reshape(-1)
        later = choose(
            logits[:, :-1].reshape(-1, logits.shape[2]), each(history), each(settings), further,
            further - each(lengths - generated),
        )  # fmt: skip
        agreed = (later.reshape(batch, -1) == fed[:, 1:]) & (jnp.arange(1, size) < counts[:, None])
        taken += jnp.sum(jnp.cumprod(agreed, axis=1), axis=1)
    scores = _scores(jnp.concatenate([state.logits[:, None], logits[:, :-1]], axis=1), fed, likeliest)
    following = jnp.take_along_axis(logits, jnp.maximum(taken - 1, 0)[:, None, None], axis=1)[:, 0]
    return State(
        dataclasses.replace(cache, lengths=lengths + taken),
        jnp.where(busy[:, None], following, state.logits),
        history,
        generated + taken,
    ), Chosen(fed, taken, scores)


def _scores(logits: Float[Array, "*B V"], tokens: Int[Array, "*B"], likeliest: int) -> Scores:
    total = jax.nn.logsumexp(logits, axis=-1)
    top, ids = jax.lax.top_k(logits, min(likeliest, logits.shape[-1]))
    came = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return Scores(came - total, ids.astype(jnp.int32), top - total[..., None])
