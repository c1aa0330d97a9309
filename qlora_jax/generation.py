"""Answering prompts: batched decoding with a key-value cache, greedy or sampled."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

# Prompts are padded to a multiple of this, so that few shapes are compiled.
_PROMPT_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Choice of the next token.

    Attributes:
        max_new_tokens: longest continuation.
        do_sample: sample; otherwise the likeliest token is taken and the other fields do not matter.
        temperature: logits are divided by it.
        top_k: sample among the k likeliest tokens only (0: all).
        top_p: sample among the smallest set of likeliest tokens that holds this probability (Holtzman et al. 2020).
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0


def next_token(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, " B"]:
    """The next token of every row."""
    if not sampling.do_sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token stays if the likelier ones together hold less than top_p; the likeliest always stays.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p
        least = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling", "eos_ids"))
def _decode(
    lora: nnx.State,
    frozen: nnx.State,
    input_ids: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    key: Array,
    *,
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
) -> tuple[Int[Array, "B T"], Int[Array, ""]]:
    """(tokens, number of columns of them that were written) after prompts padded on the right."""
    model = nnx.merge(graphdef, lora, frozen)
    batch, seq = input_ids.shape
    stop = jnp.asarray(eos_ids, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(seq), input_ids.shape)
    cache = model.empty_cache(batch, seq + sampling.max_new_tokens)
    hidden, cache = model(input_ids, positions, cache=cache, counts=lengths)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    first = next_token(model.logits(last)[:, 0], jax.random.fold_in(key, 0), sampling)
    tokens = jnp.zeros((batch, sampling.max_new_tokens), jnp.int32).at[:, 0].set(first)
    finished = jnp.isin(first, stop)

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        i, _, finished, _, _ = carry
        return (i < sampling.max_new_tokens) & ~jnp.all(finished)

    def advance(carry: tuple) -> tuple:
        i, tokens, finished, last, cache = carry
        hidden, cache = model(last[:, None], cache.lengths[:, None], cache=cache)
        token = next_token(model.logits(hidden)[:, 0], jax.random.fold_in(key, i), sampling)
        tokens = tokens.at[:, i].set(token)
        return i + 1, tokens, finished | jnp.isin(token, stop), token, cache

    written, tokens, *_ = jax.lax.while_loop(
        unfinished, advance, (jnp.ones((), jnp.int32), tokens, finished, first, cache)
    )
    return tokens, written


def generate(
    graphdef: nnx.GraphDef,
    lora: nnx.State,
    frozen: nnx.State,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: Sequence[int],
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue every prompt until an end-of-sequence token or `sampling.max_new_tokens`.

    Args:
        graphdef: of the model, with `lora` and `frozen` from `qlora_jax.models.split_model`.
        lora: adapters.
        frozen: base weights.
        prompts: token ids, one non-empty sequence a prompt.
        eos_ids: tokens that end an answer; they are not returned.
        sampling: greedy with up to 256 tokens by default.
        seed: of the sampling.

    Returns:
        The new tokens of each prompt.
    """
    sampling = sampling or Sampling()
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("generate needs at least one prompt, and no empty ones.")
    longest = max(len(prompt) for prompt in prompts)
    width = -(-longest // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    input_ids = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = prompt
    tokens, written = _decode(
        lora,
        frozen,
        input_ids,
        np.array([len(prompt) for prompt in prompts], np.int32),
        jax.random.key(seed),
        graphdef=graphdef,
        sampling=sampling,
        eos_ids=tuple(eos_ids),
    )
    answers = []
    for answer in np.asarray(tokens)[:, : int(written)].tolist():
        ends = [i for i, token in enumerate(answer) if token in set(eos_ids)]
        answers.append(answer[: ends[0]] if ends else answer)
    return answers
