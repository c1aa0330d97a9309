"""Prompt lookup: the same tokens in fewer steps."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import tiny_model
from fixtures.tiny_configs import LLAMA

from qlora_jax.errors import UserError
from qlora_jax.generation import Engine, EngineOptions, Request, Sampling
from qlora_jax.generation import engine as engine_module
from qlora_jax.generation.lookup import LookupGain, PromptLookup

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def parts():
    graphdef, lora, frozen = tiny_model.build()
    return graphdef, jax.tree.map(lambda leaf: leaf + 0.01, lora), frozen


def request(number, new=24, **settings):
    tokens = np.random.default_rng(number).integers(0, 96, 5 + 3 * number).tolist()
    return Request(tuple(tokens), Sampling(max_new_tokens=new, **settings), likeliest=2)


def guessing(monkeypatch, requests, answers):
    """Let guesses be the answers, with a wrong token at any place of some of them."""
    rng = np.random.default_rng(0)
    known = {
        request.tokens: [token.token for token in answer] for request, answer in zip(requests, answers, strict=True)
    }

    class Guesser(PromptLookup):
        def guess(self, most):
            prompt = next(prompt for prompt in known if tuple(self._tokens[: len(prompt)]) == prompt)
            guess = known[prompt][len(self._tokens) - len(prompt) :][: int(rng.integers(0, most + 1))]
            wrong = int(rng.integers(0, 2 * len(guess) + 1))
            return [(token + (i == wrong)) % 96 for i, token in enumerate(guess)]

    monkeypatch.setattr(engine_module, "PromptLookup", Guesser)
    monkeypatch.setattr(LookupGain, "worthwhile", True)  # whatever the time of steps of a tiny model


def run(parts, requests, lookup, *, slots=3, eos_ids=(), **options):
    """Tokens of each request, the steps taken, and the engine."""
    engine = Engine(*parts, EngineOptions(slots, 96, lookup=lookup, **options), eos_ids=eos_ids)
    answers = {engine.submit(request): [] for request in requests}
    steps = 0
    while engine.busy or engine.waiting:
        steps += 1
        for token in engine.step():
            answers[token.request].append(token)
    return list(answers.values()), steps, engine


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert [(token.token, token.end) for token in one] == [(token.token, token.end) for token in other]
        np.testing.assert_allclose([t.logprob for t in one], [t.logprob for t in other], atol=1e-4)
        assert [[i for i, _ in t.likeliest] for t in one] == [[i for i, _ in t.likeliest] for t in other]


def test_guesses_are_what_followed_the_last_words_before():
    text = PromptLookup([1, 2, 3, 4, 5, 1, 2, 3])
    assert text.guess(3) == [4, 5, 1]
    text.extend([9, 8, 2, 3])
    assert text.guess(4) == [9, 8, 2, 3]  # the last time that they stood, not the first
    text.extend([7])
    assert text.guess(9) == []
    assert PromptLookup([5, 5, 5, 5]).guess(3) == [5, 5, 5]
    assert PromptLookup([9, 1, 2, 1, 2]).guess(5) == [1, 2, 1, 2, 1]
    assert PromptLookup([5]).guess(2) == PromptLookup().guess(2) == []


def test_guesses_that_do_not_help_are_made_less_often():
    text, guessed = PromptLookup([1, 2, 3, 1, 2]), []
    for _ in range(64):
        guess = text.guess(2)
        guessed.append(bool(guess))
        if guess:
            text.learn(0)
    assert sum(guessed[:8]) == 3 and sum(guessed[8:]) == 4
    text.learn(1)
    assert text.guess(3) == [3, 1, 2]


@pytest.mark.e2e
def test_answers_are_those_without_guesses_in_fewer_steps(parts, monkeypatch):
    """Greedy, drawn and filtered rows in one batch; tokens, ends and probabilities."""
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 8, "seed": 5}
    requests = [
        request(0),
        request(1, 3),
        request(2, **drawn),
        request(3, repetition_penalty=1.2),
        request(4, no_repeat_ngram_size=2, min_new_tokens=20),
    ]
    expected, plain_steps, _ = run(parts, requests, 0)
    eos_ids = [expected[0][9].token, expected[2][5].token]
    ended, _, _ = run(parts, requests, 0, eos_ids=eos_ids)
    guessing(monkeypatch, requests, expected)
    found, steps, engine = run(parts, requests, 4)
    same(found, expected)
    assert steps < 0.8 * plain_steps
    assert 0 < engine.gain.accepted < engine.gain.guessed
    # An answer ends where it would, whatever was guessed beyond.
    found, _, _ = run(parts, requests, 4, eos_ids=eos_ids)
    same(found, ended)
    assert {row[-1].end for row in found} == {"stop", "length"}


@pytest.mark.e2e
@pytest.mark.parametrize(("window", "cache_dtype"), [(4, "auto"), (9, "int8")])
def test_a_window_has_what_guesses_would_have_overwritten(window, cache_dtype, monkeypatch):
    parts = tiny_model.build({**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": window})
    requests = [request(number) for number in range(4)]
    expected, plain_steps, _ = run(parts, requests, 0, cache_dtype=cache_dtype)
    guessing(monkeypatch, requests, expected)
    for lookup in (1, 5):
        found, steps, engine = run(parts, requests, lookup, cache_dtype=cache_dtype)
        same(found, expected)
        assert steps < plain_steps and 0 < engine.gain.accepted < engine.gain.guessed


def test_the_next_turn_goes_on_after_tokens_that_were_guessed(parts, monkeypatch):
    first = request(0)
    (answer,), _, _ = run(parts, [first], 0, slots=1)
    second = Request((*first.tokens, *(token.token for token in answer), 3, 4), Sampling(max_new_tokens=6))
    (expected,), _, _ = run(parts, [second], 0, slots=1)
    guessing(monkeypatch, [first], [answer])
    (again,), steps, engine = run(parts, [first], 4, slots=1)
    same([again], [answer])
    assert steps < len(answer) and engine.gain.accepted < engine.gain.guessed
    monkeypatch.undo()
    engine.submit(second)
    tokens = []
    while engine.busy or engine.waiting:
        tokens += engine.step()
    assert engine.reused == len(first.tokens) + len(answer)
    assert [token.token for token in tokens] == [token.token for token in expected]


def test_a_rotary_table_that_follows_the_length_refuses_guesses():
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    parts = tiny_model.build({**LLAMA, **scaling})
    with pytest.raises(UserError, match="`prompt_lookup_num_tokens=4`: the rotary table of this model follows"):
        Engine(*parts, EngineOptions(1, 64, lookup=4), eos_ids=())


def test_the_gain_is_the_time_of_single_steps_by_the_time_taken():
    gain = LookupGain()
    assert str(gain) == "prompt lookup: nothing to guess" and gain.speedup is None
    for seconds in (9.0, 0.1, 0.1, 0.1):  # the first waits for compilation
        gain.note_plain(seconds)
    gain.guessed, gain.accepted = 8, 6
    assert gain.speedup is None
    for seconds in (9.0, 0.2, 0.2):
        gain.note_lookup(seconds, 3.0)
    # 4 + 9 tokens at 0.1 s each, in 4 * 0.1 + 3 * 0.2 s.
    assert gain.speedup == pytest.approx(1.3)
    assert gain.worthwhile  # too few to know
    for _ in range(8):
        gain.note_lookup(0.2, 1.0)
    assert not gain.worthwhile
    for _ in range(16):
        gain.note_lookup(0.2, 3.0)
    assert gain.worthwhile
    gain = dataclasses.replace(gain, _tokens=9.0, _lookup_steps=3)
    assert str(gain) == "prompt lookup: 6 of 8 guessed tokens accepted, 1.30 times as fast as without"
