"""Output of a command: the library's log and errors with flags for fields, and the report of a run."""

import dataclasses
import logging
import sys
import threading
import time
import types

import pytest

from qlora_jax.cli import argument, command, flag, spellings, with_dashes
from qlora_jax.commands import finetune as finetune_command
from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`max_steps=0`: must be at least 1.", "--max_steps 0: must be at least 1."),
        ("give `packing` too", "give --packing too"),
        ("`dataset=my rows.jsonl` is missing", "--dataset my rows.jsonl is missing"),
        (
            "log in with `hf auth login`; `hidden_size` is missing",
            "log in with `hf auth login`; `hidden_size` is missing",
        ),
        ("`model` is no model", "MODEL is no model"),
    ],
)
def test_fields_are_shown_as_flags(message, shown):
    assert with_dashes(message, {**spellings(TrainConfig), "model": "MODEL"}) == shown


def test_positional_arguments_are_not_given_dashes():
    @dataclasses.dataclass(frozen=True)
    class Schema:
        model: str = argument("")
        rank: int = flag(1, "")

    assert spellings(Schema) == {"model": "MODEL", "rank": "--rank"}


def test_a_command_prints_what_the_library_logs(capsys):
    logger = logging.getLogger("qlora_jax.somewhere")
    before = logging.getLogger("qlora_jax").level, list(logging.getLogger("qlora_jax").handlers)
    with command({"packing": "--packing"}):
        logger.info("%d rows; see `packing`", 3)
        logger.warning("odd")
        logger.debug("never shown")
    logger.info("after it")
    captured = capsys.readouterr()
    assert captured.out == "3 rows; see --packing\n"
    assert captured.err == "odd\n"
    assert (logging.getLogger("qlora_jax").level, logging.getLogger("qlora_jax").handlers) == before
    assert logging.getLogger("qlora_jax").propagate


class FakeBars:
    """Stands for the module of the progress bars, of which there are some."""

    class tqdm:
        _instances = frozenset({"a bar"})

        @staticmethod
        def write(text, file):
            print(text, file=file)


def test_long_silence_is_broken(capsys, monkeypatch):
    said, logger = "", logging.getLogger("qlora_jax.somewhere")
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    with command({}, silence=0.05):
        deadline = time.monotonic() + 10
        while said.count("still at work, 0 s so far\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().out
    assert said.count("still at work, 0 s so far\n") >= 2
    monkeypatch.setitem(sys.modules, "tqdm", FakeBars)
    with command({}, silence=0.05):
        time.sleep(0.3)
        logger.info("a line")
    assert capsys.readouterr().out == "a line\n"
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))  # another thread is importing it
    with command({}, silence=0.05):
        time.sleep(0.3)
        logger.info("a line")
    printed = capsys.readouterr()
    assert "a line\n" in printed.out and "still at work" in printed.out and not printed.err
    monkeypatch.delitem(sys.modules, "tqdm")
    with command({}, silence=5.0):
        time.sleep(0.3)
    assert capsys.readouterr().out == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "signs-of-life"]


def test_an_error_of_the_library_names_the_flag():
    class Special(UserError):
        pass

    with pytest.raises(UserError, match=r"^--remat full is enough$"), command({"remat": "--remat"}):
        raise Special("`remat=full` is enough")


SUMMARY = {
    "first_loss": 4.0, "last_loss": 1.5, "first_eval_loss": 4.5, "last_eval_loss": None,
    "bytes": {"base_packed": 2**20},
    "measured_peak_bytes": None, "planned_peak_bytes": None, "bits_per_quantized_parameter": 4.127, "steps": 1200,
    "tokens": 5, "trainable_parameters": 8192, "total_parameters": 10**6, "seconds": 90.0, "step_shapes_compiled": 1,
}  # fmt: skip


def test_the_report_of_a_run(capsys, tmp_path):
    (tmp_path / "adapter").mkdir()
    config = TrainConfig(model_name_or_path="my model", dataset="rows.jsonl", bits=8, output_dir=str(tmp_path))
    finetune_command.report(SUMMARY, [("Who?", "I.", "Aye,\ncaptain!")], config, "qlora-jax finetune")
    assert (
        capsys.readouterr().out
        == f"""
> Who?
  before: I.
  after: Aye,
  captain!

Loss (nats a token)
  training, first step  4.0000
  training, last step   1.5000
  held out, before      4.5000

Memory held by buffers
  base packed  1.0 MiB

Run
  trainable parameters            8,192
  total parameters            1,000,000
  bits a quantised parameter      4.127
  steps                           1,200
  tokens                              5
  minutes                           1.5
  step shapes compiled                1

Saved in {tmp_path}
  adapter (PEFT's format)  adapter

Use the adapter
  talk to it:
    qlora-jax chat {tmp_path}
  answer {{"prompt": ...}}, one a line in FILE:
    qlora-jax generate {tmp_path} --input FILE
  in PEFT, with the base as transformers loads it:
    PeftModel.from_pretrained(base, "{tmp_path}/adapter")
  merged: what that costs, in every format:
    qlora-jax merge {tmp_path}
  merged, in DIRECTORY, for transformers and vLLM:
    qlora-jax export {tmp_path} DIRECTORY
  as GGUF, for llama.cpp and Ollama:
    qlora-jax export {tmp_path} DIRECTORY --to gguf-q8_0
"""
    )


def test_the_report_of_a_run_that_only_answered(capsys, tmp_path):
    losses = dict.fromkeys(("first_loss", "last_loss", "first_eval_loss", "last_eval_loss"))
    summary = {**SUMMARY, **losses, "bits_per_quantized_parameter": None}
    finetune_command.report(summary, [], TrainConfig(output_dir=str(tmp_path)), "qlora-jax finetune")
    text = capsys.readouterr().out
    assert text.startswith("\nMemory held by buffers\n") and text.endswith("step shapes compiled          1\n")
    assert "bits a quantised" not in text
