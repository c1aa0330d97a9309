"""Which rows a run trains on and which it evaluates on."""

import json
import math

import jax
import pytest
from fixtures.finetune_helpers import make_rows, make_tokenizer, write_jsonl
from fixtures.tiny_configs import LLAMA

from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.datasets import load_datasets, load_evaluation

ROWS = make_rows(40)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def directory(tmp_path):
    """A directory with 20 rows in train.jsonl, 6 in test.jsonl and 4 in validation.jsonl."""
    for name, rows in (("train", ROWS[:20]), ("test", ROWS[20:26]), ("validation", ROWS[26:30])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def load(tokenizer, **fields):
    """Return the files that are trained on and evaluated on, with their numbers of rows, and what is reported."""
    datasets = load_datasets(TrainConfig(gradient_accumulation_steps=1, **fields), tokenizer)

    def counted(examples):
        files = [name.split()[0] for name in {*examples} - {""}]  # an epoch may end within a batch
        return {file: files.count(file) for file in files}

    epoch = [next(datasets.train) for _ in range(math.ceil(datasets.train.batches_per_epoch))]
    trained = counted(name for batch in epoch for name in batch.example_ids)
    evaluated = counted(name for batch in datasets.evaluation for name in batch.example_ids)
    return trained, evaluated, "\n".join(datasets.reports)


def test_a_test_file_is_evaluated_on_and_nothing_cut_off(directory, tokenizer):
    trained, evaluated, said = load(tokenizer, dataset=str(directory))
    assert (trained, evaluated) == ({"train.jsonl": 20}, {"test.jsonl": 6})
    assert f"{directory}: evaluating on its split 'test', 6 rows" in said.splitlines()
    (directory / "test.jsonl").unlink()
    trained, evaluated, _ = load(tokenizer, dataset=str(directory))
    assert (trained, evaluated) == ({"train.jsonl": 20}, {"validation.jsonl": 4})
    (directory / "validation.jsonl").unlink()
    trained, evaluated, said = load(tokenizer, dataset=str(directory))
    assert (trained, evaluated) == ({"train.jsonl": 18}, {"train.jsonl": 2})
    assert "2 of 20 rows held out for evaluation (a tenth, since 20 rows are few)" in said


def test_held_out_batches_alone_are_of_the_same_rows_for_one_device(directory, tokenizer, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    config = TrainConfig(dataset=str(directory), per_device_eval_batch_size=2)
    batches, reports = load_evaluation(config, tokenizer)
    datasets = load_datasets(config, tokenizer)
    ids, wanted = ([name for batch in found for name in batch.example_ids] for found in (batches, datasets.evaluation))
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 2]
    assert [len(batch["labels"]) for batch in datasets.evaluation] == [6]
    assert ids == wanted
    assert set(reports) < set(datasets.reports)


def test_splits_are_chosen_by_name(directory, tokenizer):
    chosen = load(tokenizer, dataset=str(directory), split="test", eval_split="validation")
    assert chosen[:2] == ({"test.jsonl": 6}, {"validation.jsonl": 4})
    # What is trained on is not evaluated on unasked, but may be asked for.
    assert load(tokenizer, dataset=str(directory), split="test")[:2] == ({"test.jsonl": 6}, {"validation.jsonl": 4})
    assert load(tokenizer, dataset=str(directory), eval_split="train")[1] == {"train.jsonl": 20}
    with pytest.raises(UserError, match=r"has no file of split 'dev'; it has test\.jsonl, train\.jsonl, validation"):
        load(tokenizer, dataset=str(directory), eval_split="dev")


def test_a_number_of_rows_is_held_out_as_asked(directory, tokenizer):
    trained, evaluated, _ = load(tokenizer, dataset=str(directory), eval_dataset_size=5)
    assert (trained, evaluated) == ({"train.jsonl": 15}, {"train.jsonl": 5})


def test_another_data_set_is_evaluated_on_its_test_split(directory, tokenizer, tmp_path):
    rows = str(write_jsonl(tmp_path.parent / f"{tmp_path.name}.jsonl", ROWS[30:]))
    name = f"{tmp_path.name}.jsonl"
    assert load(tokenizer, dataset=rows, eval_dataset=str(directory))[:2] == ({name: 10}, {"test.jsonl": 6})
    chosen = load(tokenizer, dataset=rows, eval_dataset=str(directory), eval_split="validation")
    assert chosen[1] == {"validation.jsonl": 4}
    # A file has no splits: all of it.
    assert load(tokenizer, dataset=str(directory), eval_dataset=rows)[:2] == ({"train.jsonl": 20}, {name: 10})
    # Of the data set that is trained on, what is not trained on.
    same = load(tokenizer, dataset=str(directory), split="test", eval_dataset=str(directory))
    assert same[:2] == ({"test.jsonl": 6}, {"validation.jsonl": 4})
    for name in ("test", "validation"):
        (directory / f"{name}.jsonl").unlink()
    with pytest.raises(
        UserError,
        match=r"has no split test or validation to evaluate on; give one of its splits as `eval_split`: train\.$",
    ):
        load(tokenizer, dataset=rows, eval_dataset=str(directory))
    assert load(tokenizer, dataset=rows, eval_dataset=str(directory), eval_split="train")[1] == {"train.jsonl": 20}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_split": "test", "do_eval": False}, "`eval_split=test` has no effect with `do_eval=False`"),
        ({"eval_split": "test", "eval_dataset_size": 4}, "`eval_dataset_size=4` has no effect with `eval_split`"),
    ],
)
def test_splits_without_an_effect_are_refused(fields, message):
    with pytest.raises(UserError, match=f"^{message}"):
        TrainConfig(dataset="x", **fields)


def test_tokens_that_the_model_has_no_embedding_for_are_named(tmp_path, directory):
    model = tmp_path / "model"
    make_tokenizer().save_pretrained(model)
    tokenizer = load_tokenizer(model)
    config = TrainConfig(dataset=str(directory), gradient_accumulation_steps=1)
    pad = tokenizer.pad_token_id
    for size, message in (
        (
            pad,
            f"^padding: token {pad} .* is beyond the model's vocab_size {pad}; the tokenizer is that of another model",
        ),
        (pad + 1, rf"^train\.jsonl line \d+: token \d+ \(.*\) is beyond the model's vocab_size {pad + 1};"),
    ):
        (model / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": size}))
        with pytest.raises(UserError, match=message):
            load_datasets(config, tokenizer)
    (model / "config.json").write_text(json.dumps({**LLAMA, "vocab_size": len(tokenizer)}))
    assert load_datasets(config, tokenizer).evaluation
