"""Choice of the next token: filters of the logits with transformers' semantics, then the likeliest token or a draw.

Every row has its own settings, so that one program serves requests with different ones. What none of the rows asks for
is left out of the program: `Features` says what is in it.

The order is that of transformers' `GenerationMixin._get_logits_processor` (5.24): repetition penalty, n-grams, end of
sequence; then, of rows that are sampled, temperature, top-k, top-p, min-p and typical-p.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.errors import outside, refuse_all


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one answer.

    Attributes:
        max_new_tokens: longest continuation.
        min_new_tokens: an end-of-sequence token is not chosen before so many others.
        do_sample: sample; otherwise the likeliest token is taken.
        temperature: logits are divided by it.
        top_k: sample among the k likeliest tokens only (0: all).
        top_p: sample among the smallest set of likeliest tokens that holds this probability (Holtzman et al. 2020).
        min_p: sample among tokens with this share of the likeliest one's probability (Nguyen et al. 2024; 0: all).
        typical_p: sample among the tokens whose information is nearest to the entropy and that hold this probability
            (Meister et al. 2022; 1: all).
        repetition_penalty: logits of tokens in prompt and answer are divided by it, negative ones multiplied (Keskar et
            al. 2019).
        no_repeat_ngram_size: no sequence of so many tokens comes twice in prompt and answer (0: any may).
        seed: of the draws; a row's tokens depend on nothing else in the batch.

    Raises:
        UserError: values outside their ranges; names every field.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no distribution has."""
        wanted = {
            "max_new_tokens": ("from 1 to 2147483647", 1 <= self.max_new_tokens < 2**31),
            "min_new_tokens": ("from 0 to max_new_tokens", 0 <= self.min_new_tokens <= max(self.max_new_tokens, 0)),
            # Beyond these bounds float32 logits overflow, or nothing is left.
            "temperature": ("from 0.0001 to 10000", 1e-4 <= self.temperature <= 1e4),
            "top_k": ("from 0 to 2147483647", 0 <= self.top_k < 2**31),
            "top_p": ("from 0.000001 to 1", 1e-6 <= self.top_p <= 1),
            "min_p": ("from 0 to 1", 0 <= self.min_p <= 1),
            "typical_p": ("from 0.000001 to 1", 1e-6 <= self.typical_p <= 1),
            "repetition_penalty": ("from 0.0001 to 10000", 1e-4 <= self.repetition_penalty <= 1e4),
            "no_repeat_ngram_size": (f"from 0 to {MAX_NGRAM}", 0 <= self.no_repeat_ngram_size <= MAX_NGRAM),
            "seed": ("from 0 to 4294967295", 0 <= self.seed < 2**32),
        }
        refuse_all(outside(self, wanted))


MAX_NGRAM = 32
"""Longest n-gram whose repetition can be forbidden."""

_TOP_K, _NGRAMS = (0, 64, 1024, 2**31 - 1), (0, 4, MAX_NGRAM)
"""Sizes of the filters that programs have: few, so that there are few programs."""


class Features(NamedTuple):
    """Filters that a program has; each is there if a row of the batch asks for it.

    Attributes:
        sample: draws.
        top_k: largest k; 0 for no such filter.
        top_p, min_p, typical_p, penalty, minimum: the filters of these names.
        ngram: longest n-gram; 0 for no such filter.
    """

    sample: bool = False
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    typical_p: bool = False
    penalty: bool = False
    minimum: bool = False
    ngram: int = 0


class Rows(NamedTuple):
    """Settings of all rows of a batch, see `Sampling`; each [B]."""

    sample: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    typical_p: Any
    penalty: Any
    minimum: Any
    ngram: Any
    seed: Any


def features_of(settings: Sequence[Sampling]) -> Features:
    """Return the filters that some rows ask for; sizes are rounded up, so that few programs differ."""
    sampled = [each for each in settings if each.do_sample]
    largest_k = max((each.top_k for each in sampled), default=0)
    return Features(
        sample=bool(sampled),
        top_k=_at_least(largest_k, _TOP_K),
        top_p=any(each.top_p < 1 for each in sampled),
        min_p=any(each.min_p > 0 for each in sampled),
        typical_p=any(each.typical_p < 1 for each in sampled),
        penalty=any(each.repetition_penalty != 1 for each in settings),
        minimum=any(each.min_new_tokens for each in settings),
        ngram=_at_least(max((each.no_repeat_ngram_size for each in settings), default=0), _NGRAMS),
    )


def _at_least(value: int, sizes: Sequence[int]) -> int:
    return next(size for size in sizes if size >= value)


def rows_of(settings: Sequence[Sampling]) -> Rows:
    """Stack the settings of rows."""
    return Rows(
        sample=_column(settings, "do_sample", bool),
        temperature=_column(settings, "temperature", np.float32),
        top_k=_column(settings, "top_k", np.int32),
        top_p=_column(settings, "top_p", np.float32),
        min_p=_column(settings, "min_p", np.float32),
        typical_p=_column(settings, "typical_p", np.float32),
        penalty=_column(settings, "repetition_penalty", np.float32),
        minimum=_column(settings, "min_new_tokens", np.int32),
        ngram=_column(settings, "no_repeat_ngram_size", np.int32),
        seed=_column(settings, "seed", np.uint32),
    )


def _column(settings: Sequence[Sampling], name: str, dtype: Any) -> np.ndarray:
    return np.array([getattr(each, name) for each in settings], dtype)


def power_of_two(value: int) -> int:
    """Return the power of two at or above a positive value; 0 for 0."""
    return 1 << (value - 1).bit_length() if value else 0


def stop_mask(eos_ids: Sequence[int], vocabulary: int) -> Bool[Array, " V"]:
    """Mark the end-of-sequence tokens of a vocabulary."""
    return jnp.isin(jnp.arange(vocabulary), jnp.asarray(eos_ids, jnp.int32))


def filtered(
    logits: Float[Array, "B V"],
    rows: Rows,
    features: Features,
    so_far: tuple[Int[Array, "B T"], Int[Array, " B"], Int[Array, " B"]],
    stops: Bool[Array, " V"],
) -> Float[Array, "B V"]:
    """Return the logits that a token is chosen by, -inf for tokens that must not be.

    Args:
        logits: of the next token, float32.
        rows: settings.
        features: filters that are applied.
        so_far: (prompts and answers, tokens of each row, those of them that are the answer); what follows a row's
            tokens means nothing.
        stops: as `stop_mask` returns it.
    """
    history, lengths, generated = so_far
    if features.penalty:
        seen = _seen(logits, history, lengths)
        penalty = rows.penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    if features.ngram:
        logits = jnp.where(_repeating(logits, rows.ngram, features.ngram, history, lengths), -jnp.inf, logits)
    if features.minimum:
        logits = jnp.where((generated < rows.minimum)[:, None] & stops, -jnp.inf, logits)
    if not features.sample:
        return logits
    warped = _warped(logits / rows.temperature[:, None], rows, features)
    return jnp.where(rows.sample[:, None], warped, logits)


def _warped(logits: Array, rows: Rows, features: Features) -> Array:
    """Keep the tokens that may be drawn; a filter that a row does not ask for keeps all."""
    if features.top_k:
        largest = jax.lax.top_k(logits, min(features.top_k, logits.shape[-1]))[0]
        last = jnp.clip(rows.top_k, 1, largest.shape[-1]) - 1
        least = jnp.take_along_axis(largest, last[:, None], axis=-1)
        logits = jnp.where((rows.top_k > 0)[:, None] & (logits < least), -jnp.inf, logits)
    if features.top_p:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token stays if the likelier ones together hold less than top_p; the likeliest always stays.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < rows.top_p[:, None]
        least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where((rows.top_p < 1)[:, None] & (logits < least), -jnp.inf, logits)
    if features.min_p:
        # In logits, so that nothing underflows: p >= min_p * p_max.
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(rows.min_p)[:, None]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if features.typical_p:
        logs = jax.nn.log_softmax(logits, axis=-1)
        probabilities = jnp.exp(logs)
        entropy = -jnp.sum(jnp.where(probabilities > 0, logs * probabilities, 0), axis=-1, keepdims=True)
        distance = jnp.abs(-logs - entropy)
        order = jnp.argsort(distance, axis=-1)
        held = jnp.cumsum(jnp.take_along_axis(probabilities, order, axis=-1), axis=-1)
        # The token that completes the mass stays too.
        last = jnp.sum(held < rows.typical_p[:, None], axis=-1, keepdims=True)
        last = jnp.minimum(last, logits.shape[-1] - 1)
        farthest = jnp.take_along_axis(distance, jnp.take_along_axis(order, last, axis=-1), axis=-1)
        logits = jnp.where((rows.typical_p < 1)[:, None] & (distance > farthest), -jnp.inf, logits)
    return logits


def _seen(logits: Array, history: Array, lengths: Array) -> Bool[Array, "B V"]:
    """Mark the tokens of the history."""
    return _marked(logits, history, jnp.arange(history.shape[1]) < lengths[:, None])


def _marked(logits: Array, history: Array, where: Array) -> Bool[Array, "B V"]:
    """Mark the tokens of the history at some places."""
    batch, vocabulary = logits.shape
    tokens = jnp.where(where, history, vocabulary)
    return jnp.zeros((batch, vocabulary), bool).at[jnp.arange(batch)[:, None], tokens].set(True, mode="drop")


def _repeating(logits: Array, sizes: Array, largest: int, history: Array, lengths: Array) -> Bool[Array, "B V"]:
    """Mark the tokens that would complete an n-gram which the history holds already."""
    width = history.shape[1]
    places = jnp.arange(width)
    # common[b, j]: tokens before j that equal those before the next one, counted backwards, up to the largest n - 1.
    common, unbroken = jnp.zeros(history.shape, jnp.int32), jnp.ones(history.shape, bool)
    for back in range(1, largest):
        last = jnp.take_along_axis(history, jnp.maximum(lengths - back, 0)[:, None], axis=1)
        before = jnp.roll(history, back, axis=1)
        unbroken &= (before == last) & (places >= back) & (lengths >= back)[:, None]
        common += unbroken
    where = (common >= sizes[:, None] - 1) & (sizes > 0)[:, None] & (places < lengths[:, None])
    return _marked(logits, history, where)


def next_tokens(
    logits: Float[Array, "B V"], rows: Rows, features: Features, generated: Int[Array, " B"]
) -> Int[Array, " B"]:
    """Choose the next token of every row.

    Args:
        logits: as `filtered` returns them.
        rows: settings.
        features: as for `filtered`.
        generated: tokens of the answer so far, which a row's draws are keyed by.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not features.sample:
        return likeliest

    def draw(seed: Array, index: Array, row: Array) -> Array:
        key: Key[Array, ""] = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.categorical(key, row).astype(jnp.int32)

    return jnp.where(rows.sample, jax.vmap(draw)(rows.seed, generated, logits), likeliest)
