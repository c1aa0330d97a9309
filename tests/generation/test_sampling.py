"""Filters of logits against transformers' own (tests/reference/make_sampling_golden.py), and draws."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import UserError
from qlora_jax.generation.sampling import Features, Sampling, features_of, filtered, next_tokens, rows_of

with np.load(Path(__file__).parents[1] / "golden" / "sampling.npz") as file:
    GOLDEN = dict(file)
SETTINGS = [Sampling(**{"top_k": 50, **each}) for each in json.loads(str(GOLDEN["settings"]))]
HISTORIES = [GOLDEN[f"history_{row}"] for row in range(len(GOLDEN["logits"]))]
STOPS = np.arange(GOLDEN["logits"].shape[1]) == GOLDEN["eos"]


def run(settings: list[Sampling], rows: list[int], features: Features | None = None) -> np.ndarray:
    """Filter the golden logits of some rows, each with its own settings."""
    width = max(map(len, HISTORIES)) + 5
    history = np.full((len(rows), width), 1, np.int32)  # what follows a row's tokens must not count
    lengths = np.array([len(HISTORIES[row]) for row in rows], np.int32)
    for i, row in enumerate(rows):
        history[i, : lengths[i]] = HISTORIES[row]
    so_far = (jnp.asarray(history), jnp.asarray(lengths), jnp.asarray(lengths - int(GOLDEN["prompt"])))
    features = features or features_of(settings)
    packed = jax.tree.map(jnp.asarray, rows_of(settings))
    return np.asarray(filtered(jnp.asarray(GOLDEN["logits"][rows]), packed, features, so_far, jnp.asarray(STOPS)))


@pytest.mark.parametrize(
    "i", range(len(SETTINGS)), ids=[str(each) or "nothing" for each in json.loads(str(GOLDEN["settings"]))]
)
def test_filters_are_transformers(i: int):
    rows = list(range(len(HISTORIES)))
    found, want = run([SETTINGS[i]] * len(rows), rows), GOLDEN["filtered"][i]
    assert np.array_equal(np.isinf(found), np.isinf(want))
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_rows_of_one_batch_have_their_own_settings():
    """A program with every filter leaves each row what its own settings do."""
    pairs = [(i, row) for i in range(len(SETTINGS)) for row in range(len(HISTORIES))]
    found = run([SETTINGS[i] for i, _ in pairs], [row for _, row in pairs])
    want = GOLDEN["filtered"].reshape(len(pairs), -1)
    assert np.array_equal(np.isinf(found), np.isinf(want))
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_programs_have_what_their_rows_ask_for():
    assert features_of([Sampling()]) == Features()
    assert features_of([Sampling(top_p=0.5, min_p=0.1)]) == Features()  # greedy
    assert features_of([Sampling(), Sampling(do_sample=True, top_k=5)]) == Features(sample=True, top_k=64)
    assert features_of([Sampling(no_repeat_ngram_size=3, repetition_penalty=2.0)]) == Features(penalty=True, ngram=4)


def test_draws_follow_the_distribution_and_depend_on_seed_and_place_alone():
    probabilities = np.array([0.6, 0.2, 0.15, 0.05], np.float32)
    settings = [Sampling(do_sample=True, top_k=0, seed=i) for i in range(4000)]
    logits = jnp.broadcast_to(jnp.log(probabilities), (len(settings), 4))

    def draw(part, place):
        rows = jax.tree.map(jnp.asarray, rows_of(part))
        return np.asarray(next_tokens(logits[: len(part)], rows, features_of(part), jnp.full(len(part), place)))

    drawn = draw(settings, 0)
    counts = np.bincount(drawn, minlength=4)
    # Pearson's chi-squared with three degrees of freedom exceeds 16.3 once in a thousand; the seeds are fixed.
    assert ((counts - 4000 * probabilities) ** 2 / (4000 * probabilities)).sum() < 16.3
    assert np.array_equal(draw(settings[:7], 0), drawn[:7])
    assert not np.array_equal(draw(settings[:100], 1), drawn[:100])
    mixed = [settings[0], Sampling(), settings[1]]
    assert draw(mixed, 0).tolist() == [drawn[0], 0, drawn[1]]


def test_settings_outside_their_ranges_are_refused_together():
    with pytest.raises(UserError) as error:
        Sampling(temperature=0.0, top_p=1.5, top_k=2**31, min_new_tokens=300)
    assert len(error.value.sentences) == 4
    assert "`min_new_tokens=300`: must be from 0 to max_new_tokens." in error.value.sentences
