"""Answers to a batch of prompts: one program that reads the prompts and decodes until every row has ended."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from qlora_jax.generation.sampling import (
    Features,
    Rows,
    Sampling,
    features_of,
    filtered,
    next_tokens,
    power_of_two,
    rows_of,
)

# Prompts are padded to a multiple of this, so that few shapes are compiled.
_PROMPT_MULTIPLE = 64


@functools.partial(jax.jit, static_argnames=("graphdef", "features", "room", "eos_ids"))
def _decode(
    lora: nnx.State,
    frozen: nnx.State,
    input_ids: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    limits: Int[Array, " B"],
    rows: Rows,
    *,
    graphdef: nnx.GraphDef,
    features: Features,
    room: int,
    eos_ids: tuple[int, ...],
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Return prompts with the tokens after them, and the tokens of each row.

    Args:
        lora: adapters.
        frozen: base weights.
        input_ids: prompts, padded on the right.
        lengths: tokens of each.
        limits: most new tokens of each row.
        rows: settings of each.
        graphdef: of the model.
        features: filters of the logits.
        room: new tokens that there is room for, at least the largest of `limits`.
        eos_ids: tokens that end a row.
    """
    model = nnx.merge(graphdef, lora, frozen)
    batch, seq = input_ids.shape
    ends = jnp.asarray(eos_ids, jnp.int32)
    stops = jnp.isin(jnp.arange(model.config.vocab_size), ends)
    history = jnp.pad(input_ids, ((0, 0), (0, room)))

    def choose(
        hidden: Array, history: Array, generated: Array, finished: Array
    ) -> tuple[Bool[Array, " B"], Array, Array, Array]:
        """Append a token to every unfinished row, by its hidden state [B, 1, D]."""
        logits = model.logits(hidden)[:, 0]
        logits = filtered(logits, rows, features, (history, lengths + generated, generated), stops)
        tokens = next_tokens(logits, rows, features, generated)
        places = jnp.where(finished, history.shape[1], lengths + generated)
        history = history.at[jnp.arange(batch), places].set(tokens, mode="drop")
        generated += ~finished
        return finished | jnp.isin(tokens, ends) | (generated >= limits), tokens, history, generated

    # Of the padding, too, none beyond the prompt: a rotary table may follow the longest.
    positions = jnp.minimum(jnp.arange(seq), lengths[:, None] - 1)
    cache = model.empty_cache(batch, seq + room)
    hidden, cache = model(input_ids, positions, cache=cache, counts=lengths)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    chosen = choose(last, history, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        (finished, *_), _ = carry
        return ~jnp.all(finished)

    def advance(carry: tuple) -> tuple:
        (finished, tokens, history, generated), cache = carry
        counts = jnp.where(finished, 0, 1)
        hidden, cache = model(tokens[:, None], cache.lengths[:, None], cache=cache, counts=counts)
        return choose(hidden, history, generated, finished), cache

    (_, _, history, generated), _ = jax.lax.while_loop(unfinished, advance, (chosen, cache))
    return history, lengths + generated


def generate(
    graphdef: nnx.GraphDef,
    lora: nnx.State,
    frozen: nnx.State,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: Sequence[int],
    sampling: Sampling | Sequence[Sampling] | None = None,
) -> list[list[int]]:
    """Continue every prompt until an end-of-sequence token or its `Sampling.max_new_tokens`.

    Args:
        graphdef: of the model, with `lora` and `frozen` from `qlora_jax.models.split_model`.
        lora: adapters.
        frozen: base weights.
        prompts: token ids, one non-empty sequence a prompt.
        eos_ids: tokens that end an answer; they are not returned.
        sampling: of all prompts, where the seed of each is one higher than that of the prompt before it, or of each;
            greedy with up to 256 tokens by default.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: no prompt, an empty one, or settings for another number of prompts.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("generate needs at least one prompt, and no empty ones.")
    if sampling is None or isinstance(sampling, Sampling):
        of_all = sampling or Sampling()
        seeds = [(of_all.seed + i) % 2**32 for i in range(len(prompts))]
        sampling = [dataclasses.replace(of_all, seed=seed) for seed in seeds]
    if len(sampling) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many settings, not {len(sampling)}.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-lengths.max() // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    input_ids = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = prompt
    limits = np.array([each.max_new_tokens for each in sampling], np.int32)
    history, ends = _decode(
        lora,
        frozen,
        input_ids,
        lengths,
        limits,
        rows_of(sampling),
        graphdef=graphdef,
        features=features_of(sampling),
        room=power_of_two(int(limits.max())),
        eos_ids=tuple(eos_ids),
    )
    answers = [
        row[start:end].tolist() for row, start, end in zip(np.asarray(history), lengths, np.asarray(ends), strict=True)
    ]
    return [answer[:-1] if answer[-1] in set(eos_ids) else answer for answer in answers]
