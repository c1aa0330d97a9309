"""Decoding with a cache equals decoding without one; sampling keeps to its bounds."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import tiny_model
from fixtures.tiny_configs import LLAMA

from qlora_jax.generation import Sampling, generate
from qlora_jax.quantization import QuantizationConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

VARIANTS = {
    "plain": LLAMA,
    "window": {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 6},
    "quantised": LLAMA,
}
DYNAMIC = {**LLAMA, "max_position_embeddings": 4, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}


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


def test_rotary_tables_follow_the_length_of_a_prompt_alone():
    """Neither its padding nor its neighbours, where frequencies depend on the length."""
    graphdef, lora, frozen = tiny_model.build(DYNAMIC)
    prompts = [list(range(5, 17)), [20, 21, 22, 23, 24, 25]]
    answers = generate(graphdef, lora, frozen, prompts, eos_ids=[], sampling=Sampling(max_new_tokens=1))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == [tiny_model.logits(graphdef, lora, frozen, np.array([prompt]))[0, -1].argmax()]


def test_rows_end_at_their_own_limits_and_do_not_depend_on_each_other():
    graphdef, lora, frozen = tiny_model.build()
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    sampled = Sampling(max_new_tokens=9, do_sample=True, temperature=2.0, seed=3)
    settings = [sampled, Sampling(max_new_tokens=2, no_repeat_ngram_size=1), Sampling(max_new_tokens=5)]
    together = generate(graphdef, lora, frozen, prompts, eos_ids=[], sampling=settings)
    assert list(map(len, together)) == [9, 2, 5]
    for prompt, setting, answer in zip(prompts, settings, together, strict=True):
        assert generate(graphdef, lora, frozen, [prompt], eos_ids=[], sampling=[setting]) == [answer]
    other = dataclasses.replace(sampled, seed=4)
    assert generate(graphdef, lora, frozen, prompts[:1], eos_ids=[], sampling=other) != together[:1]


def test_an_empty_prompt_is_refused():
    graphdef, lora, frozen = tiny_model.build()
    with pytest.raises(ValueError, match="no empty ones"):
        generate(graphdef, lora, frozen, [[1], []], eos_ids=[])
    with pytest.raises(ValueError, match="2 prompts need as many settings, not 1"):
        generate(graphdef, lora, frozen, [[1], [2]], eos_ids=[], sampling=[Sampling()])
