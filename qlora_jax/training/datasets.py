"""Data of a run: rows read, split, made into examples and batched."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from qlora_jax import data
from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.data.hub import ask_anew
from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import objective_of


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Batches of a run.

    Attributes:
        train: training batches, resumable.
        evaluation: held-out batches; empty without evaluation.
        total_steps: optimizer steps of the run; 0 if it does not train.
        dataset_format: row format of the training data.
        reports: what became of the rows, for people.
    """

    train: data.Batches
    evaluation: Sequence[data.Batch]
    total_steps: int
    dataset_format: str
    reports: tuple[str, ...]


def load_datasets(config: TrainConfig, tokenizer: Any) -> Datasets:
    """Read, split, tokenise and batch the data of a run.

    Args:
        config: of the run.
        tokenizer: of the model; one that was loaded from a path is checked against the config.json there.

    Raises:
        UserError: data that cannot be used, or a token that the model has no embedding for.
    """
    objective, batching = objective_of(config), _batching(config, tokenizer)
    ask_anew()  # a run before this one may have been without a network
    rows, held_out, notes = _load_rows(config)
    examples, report = objective.examples(rows, tokenizer, config)
    vocabulary = _vocabulary(tokenizer)
    _check_tokens(examples, tokenizer, vocabulary)
    rows_a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * jax.device_count()
    train = data.Batches(examples, batch_size=rows_a_step, seed=config.seed, **batching)
    rows_a_batch = config.per_device_eval_batch_size * jax.device_count()
    evaluation, eval_reports = _evaluation(config, tokenizer, vocabulary, held_out, rows_a_batch)
    reports = (*notes, str(report), *eval_reports)
    return Datasets(train, evaluation, _total_steps(config, train), report.dataset_format, reports)


def load_evaluation(config: TrainConfig, tokenizer: Any) -> tuple[list[data.Batch], list[str]]:
    """Return held-out batches of the rows of `load_datasets`, for one device, and what became of the rows.

    Arguments and errors are those of `load_datasets`.
    """
    ask_anew()
    held_out: data.Rows | None
    notes: list[str] = []
    if config.do_eval and config.eval_dataset is not None:
        held_out = _first(_load_eval_dataset(config), config.max_eval_samples)
    else:
        _, held_out, notes = _load_rows(config)
    rows_a_batch = config.per_device_eval_batch_size
    batches, reports = _evaluation(config, tokenizer, _vocabulary(tokenizer), held_out, rows_a_batch)
    return batches, [*notes, *reports]


def _batching(config: TrainConfig, tokenizer: Any) -> dict[str, Any]:
    """Return what training and held-out batches have in common."""
    return {
        "mode": "packing" if config.packing else "group_by_length" if config.group_by_length else "plain",
        "pad_id": tokenizer.pad_token_id,
        "sequence_length": config.packed_length,
        "fields": objective_of(config).fields,
    }


def _evaluation(
    config: TrainConfig, tokenizer: Any, vocabulary: int | None, held_out: data.Rows | None, rows_a_batch: int
) -> tuple[list[data.Batch], list[str]]:
    if held_out is None or not len(held_out):
        return [], []
    examples, report = objective_of(config).examples(held_out, tokenizer, config)
    _check_tokens(examples, tokenizer, vocabulary)
    return data.evaluation_batches(examples, batch_size=rows_a_batch, **_batching(config, tokenizer)), [str(report)]


def _vocabulary(tokenizer: Any) -> int | None:
    """Return the tokens of the model that a tokenizer was loaded from; None if it was not loaded from a path."""
    return resolve_config(tokenizer.name_or_path).vocab_size if tokenizer.name_or_path else None


def _check_tokens(examples: Sequence[data.Example], tokenizer: Any, vocabulary: int | None) -> None:
    """Refuse tokens beyond the model's vocabulary, whose embeddings would be NaN."""
    if vocabulary is None:
        return
    data.check_tokens([tokenizer.pad_token_id], tokenizer, vocabulary, "padding")
    for example in examples:
        data.check_tokens(example.input_ids, tokenizer, vocabulary, example.example_id)


def _load_rows(config: TrainConfig) -> tuple[data.Rows, data.Rows | None, list[str]]:
    """Return (training rows, held-out rows, notes); rows that cannot be read are left to `Objective.examples`."""
    trained = config.split or "train"
    rows, held_out, notes = data.load_rows(config.dataset, split=trained, on_bad_row="skip"), None, []
    if config.do_eval and config.eval_dataset is not None:
        held_out = _load_eval_dataset(config)
    elif config.do_eval:
        split = config.eval_split
        # Where rows are set apart already, none are held out of the training data, unless their number is given.
        if split is None and config.eval_dataset_size is None:
            split = data.evaluated_split(data.split_names(config.dataset), trained)
        if split is None:
            rows, held_out, note = data.split_rows(rows, config.eval_dataset_size, seed=config.seed)
        else:
            held_out = data.load_rows(config.dataset, split=split, on_bad_row="skip")
            note = f"{config.dataset}: evaluating on its split '{split}', {len(held_out)} rows"
        notes.append(note)
    return _first(rows, config.max_train_samples), held_out and _first(held_out, config.max_eval_samples), notes


def _load_eval_dataset(config: TrainConfig) -> data.Rows:
    """Read the rows of `eval_dataset`: of a training split only if `eval_split` names it."""
    dataset, split = str(config.eval_dataset), config.eval_split
    names = data.split_names(dataset, field="eval_dataset") if split is None else ()
    if names:
        trained = config.split if config.split is not None and dataset == config.dataset else "train"
        split = data.evaluated_split(names, trained)
        if split is None:
            raise UserError(
                f"`eval_dataset={dataset}` has no split test or validation to evaluate on; give one of its splits as "
                f"`eval_split`: {', '.join(names)}."
            )
    return data.load_rows(dataset, split=split or "train", field="eval_dataset", on_bad_row="skip")


def _first(rows: data.Rows, count: int | None) -> data.Rows:
    return rows if count is None else rows.select(range(min(len(rows), count)))


def _total_steps(config: TrainConfig, train: data.Batches) -> int:
    if not config.do_train:
        return 0
    if config.num_train_epochs is not None:
        steps = math.ceil(min(config.num_train_epochs * train.batches_per_epoch, 2**31))
        if steps >= 2**31:
            raise UserError(f"`num_train_epochs={config.num_train_epochs}`: makes more steps than can be counted.")
        return steps
    return config.max_steps


def longest_batch(config: TrainConfig, datasets: Datasets) -> tuple[int, int]:
    """Return (rows, tokens of each) that a device takes through the model at once, of the longest training batch."""
    rows, length = max(datasets.train.shapes())
    return rows // config.gradient_accumulation_steps // jax.device_count(), length
