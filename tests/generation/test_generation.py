"""Decoding with a cache equals decoding without one; sampling keeps to its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import tiny_model
from fixtures.tiny_configs import LLAMA

from qlora_jax.generation import Sampling, generate, next_token
from qlora_jax.quantization import QuantizationConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIANTS = {
    "plain": LLAMA,
    "window": {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 6},
    "quantised": LLAMA,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_recomputing_everything(variant):
    quantization = QuantizationConfig() if variant == "quantised" else tiny_model.PLAIN
    graphdef, lora, frozen = tiny_model.build(VARIANTS[variant], quantization=quantization)
    lora = jax.tree.map(lambda leaf: leaf + 0.01, lora)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]  # of different lengths: padding must not matter
    answers = generate(graphdef, lora, frozen, prompts, eos_ids=[], sampling=Sampling(max_new_tokens=8))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 8
        # One pass over prompt and answer gives the logits before every token; padding on the right is not seen.
        logits = tiny_model.logits(graphdef, lora, frozen, np.array([(prompt + answer + [0] * 16)[:16]]))[0]
        for i, token in enumerate(answer):
            before = logits[len(prompt) + i - 1]
            assert before[token] >= before.max() - 1e-4


def test_an_answer_ends_at_eos_and_does_not_hold_it():
    graphdef, lora, frozen = tiny_model.build()
    free = generate(graphdef, lora, frozen, [[5, 6, 7]], eos_ids=[], sampling=Sampling(max_new_tokens=8))[0]
    stop = free[4]
    cut = generate(graphdef, lora, frozen, [[5, 6, 7]], eos_ids=[stop], sampling=Sampling(max_new_tokens=8))[0]
    assert cut == free[: free.index(stop)]


def test_sampling_is_reproducible_and_varied():
    graphdef, lora, frozen = tiny_model.build()
    sampling = Sampling(max_new_tokens=12, do_sample=True, temperature=2.0)
    draw = lambda seed: generate(graphdef, lora, frozen, [[5, 6]], eos_ids=[], sampling=sampling, seed=seed)  # noqa: E731
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(do_sample=True, top_k=2, temperature=5.0), {0, 1}),
        (Sampling(do_sample=True, top_k=0, top_p=0.5, temperature=1.0), {0}),
        (Sampling(do_sample=True, top_k=0, top_p=0.75, temperature=1.0), {0, 1}),
    ],
)
def test_top_k_and_top_p(sampling, allowed):
    logits = jnp.log(jnp.asarray([[0.6, 0.2, 0.15, 0.05]]))
    drawn = {int(next_token(logits, jax.random.key(i), sampling)[0]) for i in range(200)}
    assert drawn == allowed


def test_an_empty_prompt_is_refused():
    graphdef, lora, frozen = tiny_model.build()
    with pytest.raises(ValueError, match="no empty ones"):
        generate(graphdef, lora, frozen, [[1], []], eos_ids=[])
