"""Beam search against transformers' (tests/reference/make_beam_golden.py)."""

import json

import pytest
from fixtures import tiny_model
from fixtures.tiny_configs import LLAMA

from qlora_jax.errors import UserError
from qlora_jax.generation import BeamSearch, Engine, EngineOptions, Request, Sampling, beam_search

GOLDEN = json.loads((tiny_model.GOLDEN / "beams.json").read_text())
CONFIG = {**GOLDEN["config"], "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_SEARCH = {"num_beams", "length_penalty", "early_stopping"}


@pytest.fixture(scope="module")
def parts():
    return tiny_model.build(CONFIG, seed=GOLDEN["seed"], modules=None)


def search_of(settings):
    own = {key: settings[key] for key in _SEARCH & settings.keys()}
    if isinstance(own.get("early_stopping"), bool):
        own["early_stopping"] = str(own["early_stopping"]).lower()
    return BeamSearch(**own)


def results():
    """Three beams by default; each other number compiles programs of its own."""
    for result in GOLDEN["results"]:
        other = result["settings"]["num_beams"] != 3
        yield pytest.param(result, marks=[pytest.mark.e2e] if other else [], id=str(result["settings"]))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("result", list(results()))
def test_searches_find_what_transformers_finds(parts, result):
    settings = result["settings"]
    sampling = Sampling(
        **{"max_new_tokens": GOLDEN["new"], **{key: settings[key] for key in settings.keys() - _SEARCH}}
    )
    for prompt, expected in zip(GOLDEN["prompts"], result["beams"], strict=True):
        found = beam_search(*parts, prompt, search_of(settings), eos_ids=GOLDEN["eos"], sampling=sampling, capacity=32)
        assert [list(beam.tokens) for beam in found] == [tokens for tokens, _ in expected]
        for beam, (_, score) in zip(found, expected, strict=True):
            assert score is None or beam.score == pytest.approx(score, rel=1e-4, abs=1e-5)


@pytest.mark.e2e
@pytest.mark.usefixtures("quick_compilation")
def test_one_beam_is_greedy_choice_whatever_the_cache():
    """A window that is overwritten, 8 bits, and an answer that no token ends."""
    parts = tiny_model.build({**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 6})
    prompt, sampling = [5, 9, 1, 4, 4, 7, 2, 8, 3], Sampling(max_new_tokens=12)
    engine = Engine(*parts, EngineOptions(1, 32, "int8"), eos_ids=())
    engine.submit(Request(tuple(prompt), sampling))
    greedy = list(engine.run())
    options = {"eos_ids": (), "sampling": sampling, "capacity": 32, "cache_dtype": "int8"}
    (beam,) = beam_search(*parts, prompt, BeamSearch(1, 0.0), **options)
    assert list(beam.tokens) == [token.token for token in greedy]
    assert beam.score == pytest.approx(sum(token.logprob for token in greedy), abs=1e-3)
    found = beam_search(*parts, prompt, BeamSearch(3, 0.0), **options)
    assert len({beam.tokens for beam in found}) == 3 and found[0].score >= beam.score - 1e-3


def test_searches_that_cannot_be_made_are_refused(parts):
    with pytest.raises(UserError, match=r"`num_beams=0`: must be from 1 to 256.\n  `length_penalty=nan`: must be"):
        BeamSearch(0, float("nan"))
    sampling = Sampling(max_new_tokens=4)
    with pytest.raises(ValueError, match="a prompt needs a token"):
        beam_search(*parts, [], BeamSearch(2), eos_ids=[], sampling=sampling)
    with pytest.raises(UserError, match="the prompt has 16 tokens, and prompt and answer together may have 16"):
        beam_search(*parts, [3] * 16, BeamSearch(2), eos_ids=[], sampling=sampling, capacity=16)
    with pytest.raises(UserError, match=r"`num_beams=2`: beams are not drawn; leave `do_sample` out\."):
        beam_search(*parts, [3], BeamSearch(2), eos_ids=[], sampling=Sampling(do_sample=True))
