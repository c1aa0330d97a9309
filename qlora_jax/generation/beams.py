"""Beam search with transformers' semantics (`GenerationMixin._beam_search`, 5.24), greedy in its choice of beams.

Beams are slots of one cache. A step scores all continuations of all beams on the device; the best of them come back,
and which beams go on, and from where, is decided here.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.choices import CacheDtype, EarlyStopping
from qlora_jax.errors import UserError, outside, refuse_all
from qlora_jax.generation.engine import next_piece, no_room, pieces
from qlora_jax.generation.programs import Piece, State, Structure, empty_state, prefill
from qlora_jax.generation.sampling import Features, Rows, Sampling, features_of, filtered, rows_of, stop_mask
from qlora_jax.kernels.xla import WIDE_VECTORS

_NOT_YET = -1e9
"""Score of a beam that does not exist yet; as in transformers, so that ties are broken alike."""


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Settings of a search.

    Attributes:
        num_beams: beams that are kept.
        length_penalty: a finished beam's score is its log-probability divided by its length to this power.
        early_stopping: see `qlora_jax.choices.EarlyStopping`.

    Raises:
        UserError: values outside their ranges.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "false"

    def __post_init__(self) -> None:
        """Refuse what no search has."""
        wanted = {
            "num_beams": ("from 1 to 256", 1 <= self.num_beams <= 256),
            "length_penalty": ("from -100 to 100", -100 <= self.length_penalty <= 100),
        }
        refuse_all(outside(self, wanted))


class Beam(NamedTuple):
    """A continuation.

    Attributes:
        tokens: of it, with the end-of-sequence token if there is one.
        score: see `BeamSearch.length_penalty`.
    """

    tokens: tuple[int, ...]
    score: float


def beam_search(
    graphdef: nnx.GraphDef,
    lora: Any,
    frozen: nnx.State,
    prompt: Sequence[int],
    search: BeamSearch,
    *,
    eos_ids: Sequence[int],
    sampling: Sampling,
    adapter: int = 0,
    capacity: int | None = None,
    cache_dtype: CacheDtype = "auto",
) -> list[Beam]:
    """Continue a prompt by the likeliest sequences that a search finds.

    Args:
        graphdef: of the model, with `lora` and `frozen` as `Engine` takes them.
        lora: adapters.
        frozen: base weights.
        prompt: token ids, at least one.
        search: settings.
        eos_ids: tokens that end an answer.
        sampling: limits of the length and filters; nothing is drawn.
        adapter: place in an `AdapterStack`.
        capacity: most tokens of prompt and answer together; by default as many as may be asked for.
        cache_dtype: that keys and values are kept in.

    Returns:
        Up to `num_beams` continuations, the best first.

    Raises:
        ValueError: an empty prompt.
        UserError: a prompt that leaves no room for an answer, or draws.
    """
    if not prompt:
        raise ValueError("a prompt needs a token.")
    if sampling.do_sample:
        raise UserError(f"`num_beams={search.num_beams}`: beams are not drawn; leave `do_sample` out.")
    capacity = capacity or sum(pieces(len(prompt) + sampling.max_new_tokens))
    most = min(sampling.max_new_tokens, capacity - len(prompt))
    if most < 1:
        raise UserError(no_room(len(prompt), capacity))
    structure, eos, beams = Structure(graphdef), tuple(sorted(set(eos_ids))), search.num_beams
    state = empty_state(structure, lora, frozen, beams, capacity, cache_dtype=cache_dtype)
    state = _read(structure, (lora, frozen), state, prompt, adapter)
    settings = rows_of([sampling] * beams)
    best = functools.partial(
        _best, settings=settings, features=features_of([sampling]), eos_ids=eos, count=max(2, 1 + len(eos)) * beams
    )
    adapters = np.full(beams, adapter, np.int32)
    running = [Beam((), 0.0), *[Beam((), _NOT_YET)] * (beams - 1)]
    finished: list[Beam] = []
    while True:
        scores, places = jax.device_get(best(state, np.array([beam.score for beam in running], np.float32)))
        parents, ids = np.divmod(places, state.logits.shape[1])
        found = [
            (parent, Beam((*running[parent].tokens, token), score))
            for parent, token, score in zip(parents.tolist(), ids.tolist(), scores.tolist(), strict=True)
        ]
        length = len(running[0].tokens) + 1
        ended = [beam.tokens[-1] in eos or length == most for _, beam in found]
        # Only the best may finish; the others are there so that enough go on.
        finished += [
            beam._replace(score=beam.score / length**search.length_penalty)
            for (_, beam), end in zip(found[:beams], ended, strict=False)
            if end
        ]
        finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
        onward = [each for each, end in zip(found, ended, strict=True) if not end][:beams]
        if not onward or not _may_improve(onward[0][1], finished, search, length, most):
            return finished
        running = [beam for _, beam in onward]
        state = _extend(
            lora,
            frozen,
            state,
            np.array([parent for parent, _ in onward], np.int32),
            np.array([beam.tokens[-1] for beam in running], np.int32),
            adapters,
            structure=structure,
        )


def _may_improve(best: Beam, finished: Sequence[Beam], search: BeamSearch, length: int, most: int) -> bool:
    """Tell if the best running beam could still be among the finished ones."""
    if len(finished) < search.num_beams:
        return True
    if search.early_stopping == "true":
        return False
    lasting = search.early_stopping == "never" and search.length_penalty > 0
    return best.score / (most if lasting else length) ** search.length_penalty > finished[-1].score


def _read(structure: Structure, weights: tuple[Any, Any], state: State, prompt: Sequence[int], adapter: int) -> State:
    """Read a prompt into the first slot; the others are copied from it when the first tokens are chosen."""
    lora, frozen = weights
    whole = structure.model(lora, frozen).config.rotary_follows_length
    unread, start = list(prompt), 0
    while unread:
        piece, tokens = next_piece(unread, whole)
        place = Piece(*map(np.int32, (0, start, len(piece), adapter)))
        state, _ = prefill(lora, frozen, state, tokens, place, structure=structure)
        unread, start = unread[len(piece) :], start + len(piece)
    return state


@functools.partial(jax.jit, static_argnames=("features", "eos_ids", "count"))
def _best(
    state: State,
    scores: Float[Array, " B"],
    *,
    settings: Rows,
    features: Features,
    eos_ids: tuple[int, ...],
    count: int,
) -> tuple[Float[Array, " N"], Int[Array, " N"]]:
    """Return the scores of the best continuations, and beam * V + token of each."""
    stops = stop_mask(eos_ids, state.logits.shape[1])
    # transformers filters log-probabilities here, not logits: a repetition penalty differs.
    logs = jax.nn.log_softmax(state.logits, axis=-1)
    so_far = state.history, state.cache.lengths, state.generated
    logs = filtered(logs, settings, features, so_far, stops) + scores[:, None]
    best, places = jax.lax.top_k(logs.reshape(-1), min(count, logs.size))
    return best, places


@functools.partial(jax.jit, static_argnames="structure", donate_argnames="state", compiler_options=WIDE_VECTORS)
def _extend(
    lora: Any,
    frozen: nnx.State,
    state: State,
    parents: Int[Array, " B"],
    tokens: Int[Array, " B"],
    adapters: Int[Array, " B"],
    *,
    structure: Structure,
) -> State:
    """Continue each beam from another, or itself, by a token."""
    keys, values = jax.tree.map(lambda a: a[:, parents], (state.cache.keys, state.cache.values))
    lengths, generated, history = (a[parents] for a in (state.cache.lengths, state.generated, state.history))
    cache = dataclasses.replace(state.cache, keys=keys, values=values, lengths=lengths)
    history = history.at[jnp.arange(len(tokens)), lengths].set(tokens)
    model = structure.model(lora, frozen, adapters)
    hidden, cache = model(tokens[:, None], lengths[:, None], cache=cache)
    return State(cache, model.logits(hidden)[:, 0], history, generated + 1)
