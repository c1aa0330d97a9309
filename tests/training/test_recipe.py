"""The recipe from end to end: quiet, without traces in the process, with other objectives, and with its own kernels."""

import contextlib
import dataclasses
import logging
import signal
import warnings

import fixtures.finetune_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import finetuning, kernels
from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.data import TOKEN_FIELDS, Field
from qlora_jax.errors import UserError
from qlora_jax.files import read_checked_json, write_checked_json
from qlora_jax.training import datasets, setup
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import NEXT_TOKEN, Sums

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recipe")
    helpers.make_model(directory / "model")
    helpers.write_jsonl(directory / "rows.jsonl", helpers.make_rows(20))
    return directory


def config(place, name, **changes):
    values = helpers.SMALL_RUN | {
        "model_name_or_path": str(place / "model"), "dataset": str(place / "rows.jsonl"),
        "output_dir": str(place / name), "gradient_accumulation_steps": 1, "lr_scheduler_type": "constant",
        "warmup_steps": 1, "max_steps": 2, "eval_steps": 0, "save_strategy": "no", "packing": True,
        "sequence_length": 128, "source_max_len": 64, "eval_dataset_size": 2,
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def process_wide():
    """Settings of the process that a library may be tempted to change."""
    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]
    levels = {logger.name: logger.level for logger in loggers}
    return list(warnings.filters), levels, [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(scope="module")
def first(place):
    """A run of two steps."""
    return finetuning.finetune(config(place, "run"))


@pytest.mark.e2e
def test_a_run_prints_nothing_and_leaves_the_process_as_it_was(place, first, capfd):
    """The first run has loaded whatever is loaded late."""
    capfd.readouterr()
    before = process_wide()
    result = finetuning.finetune(config(place, "quiet"))
    assert result.summary["steps"] == 2
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert process_wide() == before


def test_a_foreign_directory_is_refused_before_anything_is_read(place, monkeypatch):
    theirs = place / "theirs" / "checkpoint-500"
    theirs.mkdir(parents=True)
    (theirs / "trainer_state.json").write_text("{}")
    monkeypatch.setattr(finetuning, "resolve_model", lambda *_: pytest.fail("read too early"))
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds checkpoint-500, not written by a run of this program"):
            finetuning.finetune(config(place, "theirs", overwrite_output_dir=overwrite))
    assert (theirs / "trainer_state.json").read_text() == "{}"


def pinned_choices(monkeypatch):
    """Spy on what is pinned."""
    found = []

    def spy(choices):
        found.append(kernels.choices_to_json(choices))
        return contextlib.nullcontext()

    monkeypatch.setattr(finetuning.kernels, "pinned", spy)
    return found


@pytest.mark.e2e
def test_a_resumed_run_keeps_the_kernels_and_facts_it_began_with(place, first, monkeypatch, caplog):
    file = place / "run" / "run.json"
    record = read_checked_json(file)
    recorded = record["facts"]["kernels"]
    # Of training and evaluation: rows of 2 x 128 tokens, forward and backward.
    assert {choice["m"] for choice in recorded} == {256}
    assert {choice["implementation"] for choice in recorded} == {"xla"}
    assert record["facts"]["environment"].keys() == {"jax", "jaxlib", "qlora-jax", "device"}
    # What another file of timings would have chosen then.
    recorded[0]["implementation"] = "unfused"
    record["facts"]["environment"]["jax"] = "0.0"
    write_checked_json(file, record)
    found = pinned_choices(monkeypatch)
    assert finetuning.finetune(config(place, "run", max_steps=3)).summary["steps"] == 3
    assert found == [recorded]
    assert read_checked_json(file)["facts"] == record["facts"]
    warned = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert warned == [f"this run began with jax 0.0 and goes on with {jax.__version__}: bits of its results may differ"]
    # A new run resolves its own.
    finetuning.finetune(config(place, "new", max_steps=1, do_eval=False, eval_dataset_size=None))
    assert {choice["implementation"] for choice in found[1]} == {"xla"}


@pytest.mark.e2e
def test_choices_that_were_not_recorded_are_resolved_on_resume(place, monkeypatch):
    """As in runs of earlier versions."""
    changes = {"do_eval": False, "eval_dataset_size": None}
    finetuning.finetune(config(place, "earlier", max_steps=1, **changes))
    record = read_checked_json(place / "earlier" / "run.json")
    del record["facts"], record["wrote"]
    write_checked_json(place / "earlier" / "run.json", record)
    found = pinned_choices(monkeypatch)
    assert finetuning.finetune(config(place, "earlier", max_steps=2, **changes)).summary["steps"] == 2
    assert {choice["m"] for choice in found[0]} == {256}


@dataclasses.dataclass(frozen=True)
class StayClose:
    """A toy: next-token loss of the first document of a row, and distance to the model without adapters."""

    fields = (*TOKEN_FIELDS, Field("score", "float32"))
    unit = "points"
    uses_reference = True

    def examples(self, rows, tokenizer, config):
        examples, report = NEXT_TOKEN.examples(rows, tokenizer, config)
        scores = [{"score": np.full(len(example), 0.5)} for example in examples]
        return [dataclasses.replace(e, more=more) for e, more in zip(examples, scores, strict=True)], report

    def sums(self, model, batch, *, dropout_key, remat, reference=None):
        arguments = batch["input_ids"], batch["positions"]
        hidden, _ = model(*arguments, segment_ids=batch["segment_ids"], dropout_key=dropout_key, remat=remat)
        target, _ = reference(*arguments, segment_ids=batch["segment_ids"])
        wanted = batch["score"] * (batch["labels"] != -100)
        distance = jnp.mean((hidden - target - 1.0) ** 2, axis=-1)
        return Sums(
            jnp.sum(wanted * distance), jnp.sum(wanted), {"moved": jnp.sum(wanted * (jnp.abs(distance - 1.0) > 1e-4))}
        )

    def derived(self, loss):
        return {"distance": loss**0.5}


@pytest.mark.e2e
def test_another_objective_with_a_reference_model_runs_from_rows_to_adapter(place, monkeypatch):
    """Nothing but the objective knows its fields, its weight, its metrics and its second model."""
    for module in (setup, datasets):
        monkeypatch.setattr(module, "objective_of", lambda config: StayClose())
    result = finetuning.finetune(config(place, "toy", max_steps=4, learning_rate=3e-2, remat="none"))
    lines = helpers.read_metrics(place / "toy")
    evaluations = [line for line in lines if "eval_loss" in line]
    assert list(evaluations[0]) == ["step", "eval_loss", "eval_distance", "eval_points", "eval_moved"]
    # Without a step the two models are one, but for the rounding of two programs.
    assert evaluations[0]["eval_loss"] == pytest.approx(1.0, abs=1e-5)
    assert evaluations[0]["eval_distance"] == pytest.approx(1.0, abs=1e-5)
    assert evaluations[0]["eval_moved"] == 0.0
    assert evaluations[-1]["eval_loss"] < 0.999
    assert evaluations[-1]["eval_moved"] == 1.0
    assert all(line["moved"] in (0.0, 1.0) for line in lines if "loss" in line)
    assert result.summary["trained_tokens"] > 0
    tensors, _ = load_adapter(place / "toy" / "adapter", resolve_config(place / "model"))
    assert any(np.any(value != 0) for path, value in tensors.items() if path[-1] == "lora_b")
