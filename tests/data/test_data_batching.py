"""Batches: every example once an epoch, bounded shapes, exact resumption, and packing that keeps documents apart."""

import time
from collections import Counter
from itertools import islice

import jax
import numpy as np
import pytest

from qlora_jax.data import (
    IGNORED,
    TOKEN_FIELDS,
    Batch,
    Batches,
    Example,
    Field,
    abstract_batch,
    bucket_lengths,
    evaluation_batches,
)
from qlora_jax.data.batching import first_fit
from qlora_jax.errors import UserError
from qlora_jax.nn.long_sequence import tile_size

MODES = ["packing", "group_by_length", "plain"]
PAD = 999


def make_examples(n, *, shortest=2, longest=200, seed=0):
    """Every example's ids are its own number, so that any token tells where it came from."""
    rng = np.random.default_rng(seed)
    examples = []
    for i, length in enumerate(rng.integers(shortest, longest + 1, n)):
        ids = np.full(length, i, np.int32)
        labels = np.where(np.arange(length) >= max(1, length // 2), ids, IGNORED).astype(np.int32)
        examples.append(Example(ids, labels, f"line {i}"))
    return examples


def make_batches(examples, mode, **options):
    options = {"batch_size": 4, "pad_id": PAD, "seed": 3, "sequence_length": 256, **options}
    return Batches(examples, mode=mode, **options)


def same(a, b):
    return a.example_ids == b.example_ids and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def check_rows(batch, examples):
    """Check every invariant of a batch's rows; returns the examples that occur."""
    seen = []
    for ids, labels, positions, segments in zip(
        batch["input_ids"], batch["labels"], batch["positions"], batch["segment_ids"], strict=True
    ):
        used = int(np.count_nonzero(segments))
        assert (segments[:used] > 0).all() and (segments[used:] == 0).all()
        assert (ids[used:] == PAD).all() and (labels[used:] == IGNORED).all() and (positions[used:] == 0).all()
        start = 0
        for segment in range(1, int(segments.max(initial=0)) + 1):
            (where,) = np.nonzero(segments == segment)
            assert where.tolist() == list(range(start, start + len(where)))
            example = examples[ids[start]]
            assert np.array_equal(ids[where], example.input_ids)
            assert np.array_equal(labels[where], example.labels)
            assert labels[start] == IGNORED
            assert positions[where].tolist() == list(range(len(example)))
            seen.append(int(ids[start]))
            start += len(where)
        assert start == used
    assert batch.example_ids == tuple(f"line {i}" for i in seen)
    assert batch.n_tokens == sum(len(examples[i]) for i in seen)
    assert np.count_nonzero(batch["labels"] != IGNORED) == sum(examples[i].n_trained for i in seen)
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 3, 8, 61])
def test_every_example_once_an_epoch_and_every_batch_full(mode, n):
    examples = make_examples(n)
    batches = make_batches(examples, mode)
    seen = Counter()
    ended = {}
    while batches.state()["epoch"] < 3:
        before = batches.state()
        batch = next(batches)
        assert batch.shape in batches.shapes()
        assert all(a.dtype == np.int32 and a.shape == batch.shape for a in jax.tree.leaves(batch))
        assert (batch["segment_ids"][:, 0] == 1).all()
        seen.update(check_rows(batch, examples))
        if batches.state()["index"] == 0:
            ended[batches.state()["epoch"]] = dict(seen)
        assert batches.state() != before
    for epoch, counts in ended.items():
        assert counts == dict.fromkeys(range(n), epoch)
    assert max(seen.values()) - min(seen.values()) <= (1 if n >= 4 else 4)


@pytest.mark.parametrize("mode", MODES)
def test_restoring_at_every_position_gives_exactly_the_same_batches(mode):
    examples = make_examples(37)
    batches = make_batches(examples, mode)
    states, expected = [], []
    for _ in range(24):
        states.append(batches.state())
        expected.append(next(batches))
    assert states[-1]["epoch"] >= 1
    for i, state in enumerate(states):
        fresh = make_batches(examples, mode)
        fresh.restore(state)
        assert fresh.state() == state
        for batch in expected[i:]:
            assert same(next(fresh), batch)
    # Also backwards on an iterator that has run, and from JSON-like copies.
    batches.restore(dict(states[2]))
    assert same(next(batches), expected[2])


@pytest.mark.parametrize("mode", MODES)
def test_order_depends_on_seed_and_epoch_only(mode):
    examples = make_examples(40)
    first, again, other = (make_batches(examples, mode, seed=s) for s in (3, 3, 4))
    a, b, c = (list(islice(x, 40)) for x in (first, again, other))
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert not all(same(x, y) for x, y in zip(a, c, strict=True))
    epochs = [make_batches(examples, mode) for _ in range(2)]
    epochs[1].restore({"epoch": 1, "index": 0})
    assert not same(next(epochs[0]), next(epochs[1]))


@pytest.mark.parametrize("mode", MODES)
def test_bad_positions_are_refused(mode):
    batches = make_batches(make_examples(10), mode)
    for state in ({"epoch": 0, "index": 1000}, {"epoch": -1, "index": 0}, {"epoch": 0, "index": -1}):
        with pytest.raises(UserError, match="does not exist in this data set"):
            batches.restore(state)


def test_fingerprint_tells_data_and_settings_apart():
    examples = make_examples(10)
    base = make_batches(examples, "plain").fingerprint
    assert base == make_batches(make_examples(10), "plain").fingerprint
    others = [
        make_batches(examples, "packing"),
        make_batches(examples, "plain", seed=4),
        make_batches(examples, "plain", batch_size=5),
        make_batches(examples[:9], "plain"),
        make_batches(make_examples(10, seed=1), "plain"),
    ]
    assert base not in {b.fingerprint for b in others}


def test_packing_rows_never_exceed_and_waste_little():
    examples = make_examples(2000, longest=256)
    batches = make_batches(examples, "packing", batch_size=8)
    assert batches.shapes() == {(8, 256)}
    taken = list(islice(batches, int(batches.batches_per_epoch)))
    filled = sum(b.n_tokens for b in taken) / sum(b["input_ids"].size for b in taken)
    assert filled > 0.93


def test_first_fit_equals_the_plain_definition():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 50, 257):
        lengths = rng.integers(1, 101, n)
        room, expected = [], []
        for length in lengths:
            place = next((i for i, r in enumerate(room) if r >= length), len(room))
            if place == len(room):
                room.append(100)
            room[place] -= length
            expected.append(place)
        assert first_fit(lengths, 100).tolist() == expected


def test_packing_50_000_examples_takes_under_two_seconds():
    examples = make_examples(50_000, longest=300)
    batches = make_batches(examples, "packing", sequence_length=1024)
    start = time.perf_counter()
    next(batches)
    assert time.perf_counter() - start < 2


def test_grouping_pads_less_than_plain_and_shows_the_longest_first():
    examples = make_examples(800, longest=500)
    share = {}
    for mode in ("plain", "group_by_length"):
        batches = make_batches(examples, mode, sequence_length=None, batch_size=8)
        taken = list(islice(batches, 100))
        share[mode] = sum(b.n_tokens for b in taken) / sum(b["input_ids"].size for b in taken)
    assert share["group_by_length"] > share["plain"] + 0.15
    first = next(make_batches(examples, "group_by_length", sequence_length=None, batch_size=8))
    assert max(len(e) for e in examples) == first["segment_ids"].sum(axis=1).max()


@pytest.mark.parametrize(("longest", "most"), [(1, 1), (64, 1), (65, 2), (300, 5), (1280, 8), (6000, 8), (100_000, 8)])
def test_bucket_lengths_are_few_multiples_that_reach_the_longest(longest, most):
    buckets = bucket_lengths(longest)
    assert 1 <= len(buckets) <= most
    assert list(buckets) == sorted(set(buckets)) and all(b % 64 == 0 for b in buckets)
    assert longest <= buckets[-1] < max(longest + 64, longest * 9 / 8)
    assert all(tile_size(b) < b for b in buckets if b > 4096)
    assert bucket_lengths(longest, max_buckets=1) == buckets[-1:]


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_one_pass_with_padding_rows_at_the_end(mode):
    examples = make_examples(23)
    batches = evaluation_batches(examples, batch_size=4, mode=mode, pad_id=PAD, sequence_length=256)
    seen = [i for batch in batches for i in check_rows(batch, examples)]
    assert sorted(seen) == list(range(23))
    assert all(batch.shape[0] == 4 for batch in batches)
    assert all((batch["segment_ids"][:, 0] == 1).all() for batch in batches[:-1])
    if mode == "plain":
        assert seen == list(range(23))
        assert (batches[-1]["segment_ids"][3] == 0).all() and (batches[-1]["labels"][3] == IGNORED).all()


def test_errors_name_what_to_do():
    examples = make_examples(5, shortest=100)
    with pytest.raises(UserError, match="no examples"):
        make_batches([], "plain")
    with pytest.raises(UserError, match="batch size must be at least 1"):
        make_batches(examples, "plain", batch_size=0)
    with pytest.raises(UserError, match="packing needs a sequence length"):
        make_batches(examples, "packing", sequence_length=None)
    with pytest.raises(UserError, match=r"line \d has \d+ tokens, more than the sequence length 99"):
        make_batches(examples, "packing", sequence_length=99)


def test_batch_is_a_pytree_whose_ids_do_not_recompile():
    traces = []

    @jax.jit
    def total(batch):
        traces.append(batch.shape)
        return batch["segment_ids"].sum()

    batches = make_batches(make_examples(20), "packing")
    for batch in islice(batches, 5):
        assert int(total(batch)) == int(batch["segment_ids"].sum())
    assert len(traces) == 1
    assert len(jax.tree.leaves(batch)) == 4
    rebuilt = jax.tree.map(lambda x: x, batch)
    assert (rebuilt.example_ids, rebuilt.n_tokens) == ((), 0)
    assert list(rebuilt) == list(batch) == [field.name for field in TOKEN_FIELDS]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(batch)]
    assert paths == [f"['{name}']" for name in batch]
    assert isinstance(jax.eval_shape(lambda b: b, batch), Batch)


FIELDS = (*TOKEN_FIELDS[:2], Field("weights", "float32", padding=-1.0), Field("score", "float32", "B", padding=9.0))


def scored(examples):
    return [
        Example(e.input_ids, e.labels, e.example_id, {"weights": np.arange(len(e)) / 8, "score": i / 4})
        for i, e in enumerate(examples)
    ]


def test_fields_of_another_objective_are_laid_out_and_padded():
    examples = scored(make_examples(3))
    (batch,) = evaluation_batches(examples, batch_size=4, mode="plain", pad_id=PAD, fields=FIELDS)
    assert list(batch) == ["input_ids", "labels", "weights", "score"]
    assert batch["score"].tolist() == [0.0, 0.25, 0.5, 9.0]
    assert (batch["score"].dtype, batch["weights"].dtype) == (np.float32, np.float32)
    for row, example in enumerate(examples):
        assert batch["weights"][row, : len(example)].tolist() == example.more["weights"].tolist()
        assert (batch["weights"][row, len(example) :] == -1).all()
    assert (batch["weights"][3] == -1).all()
    abstract = abstract_batch(FIELDS, *batch.shape)
    assert jax.tree.structure(abstract) == jax.tree.structure(batch)
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(batch), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
    assert abstract_batch(FIELDS, 2, 4, 64)["score"].shape == (2, 4)


def test_further_values_are_part_of_the_fingerprint():
    examples = make_examples(4)
    plain, more, other = (
        make_batches(rows, "plain").fingerprint
        for rows in (examples, scored(examples), scored(scored(examples)[::-1])[::-1])
    )
    assert len({plain, more, other}) == 3


def test_a_value_a_row_cannot_be_packed():
    with pytest.raises(UserError, match="`packing`: 'score' has one value a row"):
        make_batches(scored(make_examples(3)), "packing", fields=FIELDS)
