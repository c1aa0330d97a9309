"""Continuous batching: whoever shares a batch, an answer is the one that its prompt has alone."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import tiny_model
from fixtures.tiny_configs import LLAMA

from qlora_jax import models
from qlora_jax.errors import UserError
from qlora_jax.generation import Engine, EngineOptions, Request, Sampling, stack_adapters, stack_config
from qlora_jax.generation import programs as engine_programs
from qlora_jax.generation.engine import MOST_PIECE, pieces
from qlora_jax.generation.sampling import Features
from qlora_jax.nn.linear import LoRAConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")
CAPACITY = 64


@pytest.fixture(scope="module")
def parts():
    graphdef, lora, frozen = tiny_model.build()
    return graphdef, jax.tree.map(lambda leaf: leaf + 0.01, lora), frozen


def engine_of(parts, slots=3, **options):
    return Engine(*parts, EngineOptions(slots, CAPACITY, **options), eos_ids=[])


def run(engine):
    """{number: tokens} of all that is asked of an engine."""
    answers = {}
    while engine.busy or engine.waiting:
        for token in engine.step():
            answers.setdefault(token.request, []).append(token.token)
    return answers


def alone(parts, request):
    """Tokens of a request that shares nothing with any other."""
    engine = engine_of(parts)
    engine.submit(request)
    (answer,) = run(engine).values()
    return answer


def request(seed, length=5, new=6, **settings):
    tokens = np.random.default_rng(seed).integers(0, 96, length).tolist()
    return Request(tuple(tokens), Sampling(max_new_tokens=new), **settings)


def test_prompts_are_cut_into_few_pieces_with_little_padding():
    for tokens in (*range(1, 1200), 4096, 10_000):
        found = pieces(tokens)
        padding = sum(found) - tokens
        assert 0 <= padding < 16 or padding <= 0.15 * tokens
        assert padding < found[-1]  # the last piece has a token
        assert found == sorted(found, reverse=True) and set(found) <= {16, 32, 64, 128, 256, MOST_PIECE}
        assert len(found) <= tokens // MOST_PIECE + 4


def test_requests_join_and_leave_at_every_token(parts):
    requests = [request(seed, length, new) for seed, (length, new) in enumerate(itertools.product((1, 5, 20), (2, 9)))]
    expected = [alone(parts, each) for each in requests]
    engine = engine_of(parts)
    answers, numbers = {}, []
    for each in requests:  # one joins at a step
        numbers.append(engine.submit(each))
        for token in engine.step():
            answers.setdefault(token.request, []).append(token.token)
    for number, tokens in run(engine).items():
        answers.setdefault(number, []).extend(tokens)
    assert [answers[number] for number in numbers] == expected


@pytest.mark.e2e
def test_a_long_prompt_does_not_stall_the_others(parts):
    """Neither answers nor other prompts, wherever their slots are; a step reads about a piece."""
    engine = Engine(*parts, EngineOptions(4, 4096), eos_ids=[])
    read, reading = [], engine._read

    def noted(slot, most):
        size, tokens = reading(slot, most)
        read.append(size)
        return size, tokens

    engine._read = noted
    answering = engine.submit(request(0, 5, 40))
    engine.step()
    long = engine.submit(request(1, 6 * MOST_PIECE, 2))
    assert [token.request for token in engine.step()] == [answering]
    short = [engine.submit(request(2, length, 2)) for length in (5, 100)]
    came = {}
    for step in range(1, 14):
        read.clear()
        for token in engine.step():
            came.setdefault(token.request, step)
        assert sum(read) <= MOST_PIECE + 2 * 16
    assert came[answering] == came[short[0]] == came[short[1]] == 1
    assert 5 < came[long] <= 7


@pytest.mark.e2e
def test_slots_are_chosen_by_what_is_gained_and_lost(parts):
    """Two chats with one header keep a slot each; a new one takes the slot that was idle for longest."""
    engine = engine_of(parts)
    header, chats = (10, 11, 12), {}
    for turn in range(3):
        for chat in (0, 1):
            before = engine.reused
            prompt = (*chats.get(chat, header), 30 + chat, 40 + turn)
            engine.submit(Request(prompt, Sampling(max_new_tokens=2)))
            (answer,) = run(engine).values()
            assert engine.reused - before == len(chats.get(chat, ()))
            chats[chat] = (*prompt, *answer)
    assert sum(bool(slot.kept) for slot in engine._slots) == 2
    for first in (50, 60, 70):
        engine.submit(Request((first, 1, 2), Sampling(max_new_tokens=1)))
        run(engine)
    assert sorted(slot.kept[0] for slot in engine._slots) == [50, 60, 70]


@pytest.mark.e2e
def test_numbers_that_are_not_finite_stay_where_they_are(parts):
    engine, asked = engine_of(parts, 1), request(0)
    expected = alone(parts, asked)
    engine.submit(request(1, 20, 3))
    engine.step()
    cache = engine._state.cache
    values = tuple(array.at[:, :, 15].set(jnp.nan) for array in cache.values)
    engine._state = engine._state._replace(cache=dataclasses.replace(cache, values=values))
    run(engine)
    engine.submit(asked)
    assert list(run(engine).values()) == [expected]


def test_a_second_prompt_of_a_size_compiles_nothing(parts):
    engine = engine_of(parts)
    engine.submit(request(0, 20))
    run(engine)
    compiled = [program._cache_size() for program in (engine_programs.prefill, engine_programs.advance)]
    engine.submit(request(1, 17, 11))
    engine.submit(request(2, 30, 3))
    run(engine)
    assert [program._cache_size() for program in (engine_programs.prefill, engine_programs.advance)] == compiled


def test_the_next_turn_of_a_chat_reads_what_is_new(parts):
    engine = engine_of(parts, 1)
    first = request(0, 20, 8)
    engine.submit(first)
    (answer,) = run(engine).values()
    second = Request((*first.tokens, *answer, 3, 4, 5), Sampling(max_new_tokens=8))
    engine.submit(second)
    (again,) = run(engine).values()
    assert engine.reused == 28
    assert again == alone(parts, second)
    branch = Request((*first.tokens[:10], 7, 8), Sampling(max_new_tokens=8))  # another second half
    engine.submit(branch)
    (other,) = run(engine).values()
    assert engine.reused == 38
    assert other == alone(parts, branch)


@pytest.mark.e2e
def test_a_rotary_table_that_follows_the_length_keeps_nothing():
    parts = tiny_model.build(
        {**LLAMA, "max_position_embeddings": 8, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    )
    engine, first = engine_of(parts, 1), request(0, 20, 8)
    engine.submit(first)
    run(engine)
    branch = Request((*first.tokens[:12], 7, 8), Sampling(max_new_tokens=4))
    engine.submit(branch)
    (other,) = run(engine).values()
    assert engine.reused == 0 and other == alone(parts, branch)


@pytest.mark.e2e
def test_what_a_window_has_overwritten_is_read_again():
    window = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 6}
    parts = tiny_model.build(window)
    engine, first = engine_of(parts, 1), request(0, 20, 8)
    engine.submit(first)
    (answer,) = run(engine).values()
    branch = Request((*first.tokens[:18], 7, 8), Sampling(max_new_tokens=8))
    engine.submit(branch)
    (other,) = run(engine).values()
    assert engine.reused == 0
    assert other == alone(parts, branch)
    onward = Request((*branch.tokens, *other, 9), Sampling(max_new_tokens=4))
    engine.submit(onward)
    (last,) = run(engine).values()
    assert engine.reused == 28  # nothing was taken back
    assert last == alone(parts, onward)
    assert answer


def test_a_cancelled_request_frees_its_slot(parts):
    engine = engine_of(parts, 1)
    first, second = (engine.submit(request(seed, 5, 30)) for seed in (0, 1))
    engine.step()
    assert (engine.busy, engine.waiting) == (1, 1)
    engine.cancel(first)
    tokens = run(engine)
    assert list(tokens) == [second] and tokens[second] == alone(parts, request(1, 5, 30))
    third = engine.submit(request(2))
    engine.cancel(third)
    assert not engine.step() and not engine.waiting


def test_logprobs_are_those_of_the_model(parts):
    engine, asked = engine_of(parts), request(0, 5, 3, likeliest=3)
    engine.submit(asked)
    tokens = [token for _ in range(3) for token in engine.step()]
    ids = (*asked.tokens, *(token.token for token in tokens))
    logits = tiny_model.logits(*parts, np.array([[*ids, *[0] * (16 - len(ids))]]))[0]
    for place, token in enumerate(tokens, len(asked.tokens) - 1):
        logs = np.asarray(jax.nn.log_softmax(logits[place]))
        assert token.logprob == pytest.approx(logs[token.token], abs=1e-4)
        best = np.argsort(-logs)[:3]
        assert [each for each, _ in token.likeliest] == best.tolist()
        np.testing.assert_allclose([value for _, value in token.likeliest], logs[best], atol=1e-4)
    assert tokens[-1].end == "length"


@pytest.mark.e2e
def test_tokens_of_a_prompt_are_scored_by_the_model(parts):
    """In one piece and in several, padded; nothing that a slot has is taken over for it."""
    engine = engine_of(parts, 1)
    for length in (1, 2, 40):
        asked = dataclasses.replace(request(length, length, 2), likeliest=3, scored=True)
        for _ in range(2):
            engine.submit(asked)
            tokens = []
            while engine.busy or engine.waiting:
                tokens += engine.step()
            assert [token.prompt for token in tokens] == [True] * length + [False] * 2
            assert tuple(token.token for token in tokens[:length]) == asked.tokens
            ids = np.array([[token.token for token in tokens]], np.int32)
            logs = np.asarray(jax.nn.log_softmax(tiny_model.logits(*parts, ids)[0]))
            assert (tokens[0].logprob, tokens[0].likeliest) == (None, ())
            for before, token in zip(logs, tokens[1:], strict=False):
                assert token.logprob == pytest.approx(before[token.token], abs=1e-4)
                best = np.argsort(-before)[:3]
                assert [i for i, _ in token.likeliest] == best.tolist()
                np.testing.assert_allclose([value for _, value in token.likeliest], before[best], atol=1e-4)
    assert engine.reused == 0


@pytest.mark.e2e
def test_a_warm_engine_compiles_nothing(parts):
    """Whatever is asked for, alone or together; and who asks for little gets a program that does little."""
    greedy = request(0, 40, 5)
    expected = alone(parts, greedy)
    before = [program._cache_size() for program in (engine_programs.prefill, engine_programs.advance)]
    engine = engine_of(parts, 2, lookup=2)
    engine.warm_up()
    assert not (engine.busy or engine.waiting or engine.reused)
    compiled = [program._cache_size() for program in (engine_programs.prefill, engine_programs.advance)]
    # Pieces of 16, 32 and 64; five programs of a step, each with guesses and without.
    assert [after - before for after, before in zip(compiled, before, strict=True)] == [3, 10]
    engine.submit(greedy)
    assert run(engine).popitem()[1] == expected
    settings = [
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "top_k": 3, "min_p": 0.1, "seed": 3},
        {"typical_p": 0.5, "do_sample": True, "top_p": 0.7},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 2},
    ]
    for each in settings:
        asked = request(1, 9, 4)
        engine.submit(dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, **each), likeliest=5))
        engine.submit(request(2, 3, 2))
    run(engine)
    assert [program._cache_size() for program in (engine_programs.prefill, engine_programs.advance)] == compiled


@pytest.mark.e2e
def test_programs_do_what_is_asked_of_them_and_there_are_few(parts):
    """The smallest that there is; a new one does what was asked for before, too."""
    engine = engine_of(parts, 1)

    def program(**settings):
        engine.submit(Request((1, 2), Sampling(max_new_tokens=1, **settings)))
        run(engine)
        return engine._program.features

    assert program() == Features()
    assert program(do_sample=True, top_k=0) == Features(sample=True)
    assert program(min_new_tokens=1) == Features(sample=True, minimum=True)
    assert program() == Features()
    assert len(engine._compiled) == 3
    # It is chosen anew where a request leaves.
    engine = engine_of(parts, 2)
    engine.submit(request(0, 5, 4))
    engine.step()
    engine.submit(Request((1, 2), Sampling(max_new_tokens=1, min_new_tokens=1)))
    engine.step()
    assert engine._program.features == Features(minimum=True)
    engine.step()
    assert engine._program.features == Features()


def test_a_prompt_must_leave_room(parts):
    engine = engine_of(parts)
    with pytest.raises(UserError, match="the prompt has 64 tokens, and prompt and answer together may have 64"):
        engine.submit(request(0, CAPACITY))
    engine.submit(request(0, CAPACITY - 2, 10))
    assert [len(answer) for answer in run(engine).values()] == [2]


def test_each_row_has_its_own_adapter():
    """Of different ranks and modules, beside rows without one; each as a model with that adapter alone."""
    everywhere = models.lora_modules(models.model_config(LLAMA), "all")
    chosen = [LoRAConfig(4, 32.0, 0.0, everywhere), LoRAConfig(2, 6.0, 0.0, ("q_proj", "up_proj"))]
    graphdef, declared, frozen = tiny_model.build(rank=4)

    def random(adapter, seed):
        rng = np.random.default_rng(seed)
        return {
            path: rng.normal(0, 0.2, _shape(path, value.shape, adapter.rank)).astype(np.float32)
            for path, value in models.flatten(declared).items()
            if path[-2] in adapter.modules
        }

    matrices = [random(adapter, seed) for seed, adapter in enumerate(chosen)]
    stack = stack_adapters(declared, [None, *zip(chosen, matrices, strict=True)], jnp.float32)
    assert stack_config(chosen) == LoRAConfig(4, 4.0, 0.0, chosen[0].modules)
    engine = engine_of((graphdef, stack, frozen), 4)
    requests = [request(seed, 5, 8, adapter=adapter) for seed, adapter in enumerate((0, 1, 2, 1))]
    numbers = [engine.submit(each) for each in requests]
    together = run(engine)
    for number, each in zip(numbers, requests, strict=True):
        adapter = chosen[each.adapter - 1] if each.adapter else None
        own = _alone_with(adapter, matrices[each.adapter - 1] if adapter else {})
        assert together[number] == alone(own, Request(each.tokens, each.sampling))
    other = engine.submit(Request(requests[0].tokens, requests[0].sampling, adapter=1))
    assert run(engine)[other] != together[numbers[0]]
    assert engine.reused == 0  # another adapter's keys and values are of no use


def _shape(path, full, rank):
    return (full[0], rank, full[2]) if path[-1] == "lora_a" else (full[0], full[1], rank)


def _alone_with(adapter, matrices):
    if adapter is None:
        return tiny_model.build(modules=None)
    graphdef, lora, frozen = tiny_model.build(rank=adapter.rank, modules=",".join(adapter.modules), alpha=adapter.alpha)
    return graphdef, models.unflatten_like(lora, matrices, what="adapter"), frozen
