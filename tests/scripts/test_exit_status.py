"""The status a command exits with, and the line it leaves behind."""

import dataclasses
import errno
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qlora_jax.cli import run, sigterm_as_ctrl_c
from qlora_jax.commands import finetune as finetune_command
from qlora_jax.errors import UserError
from qlora_jax.files import write_checked_json
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.results import read_summary, write_summary


def test_a_full_disk_is_one_line(capsys):
    def main(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: metrics.jsonl cannot be written: No space left on device; free space.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_training_steps_is_resumable(handlers, number, monkeypatch, capsys, tmp_path):
    def finetune_in(claim):
        signal.raise_signal(number)

    monkeypatch.setitem(sys.modules, "qlora_jax.finetuning", SimpleNamespace(finetune_in=finetune_in))
    output_dir = str(tmp_path / "run")
    assert finetune_command.train(TrainConfig(output_dir=output_dir), "finetune.py") == 75
    assert "run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):  # which is status 130: there is nothing to resume
        finetune_command.train(TrainConfig(do_train=False, output_dir=output_dir), "finetune.py")
    assert not (tmp_path / "run").exists()


def test_what_the_parent_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with sigterm_as_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.fixture
def finished(tmp_path):
    """The configuration of a run that is finished, and a function that writes its files."""
    config = TrainConfig(output_dir=str(tmp_path), learning_rate=3e-4)

    def write(flags=None):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        record = {"flags": dataclasses.asdict(config) if flags is None else flags, "facts": {"inputs": {}}}
        write_checked_json(tmp_path / "run.json", record)
        (tmp_path / "answers.json").write_text("[]")
        write_summary(tmp_path, {"steps": 7})

    return config, write


def test_a_finished_run_is_known_by_its_files(finished, tmp_path):
    config, write = finished
    assert finetune_command.finished_summary(config) is None
    write()
    assert finetune_command.finished_summary(config)["steps"] == 7
    write({"learning_rate": 3e-4})  # of a version without the other flags
    assert finetune_command.finished_summary(config)["steps"] == 7
    for change in ({"learning_rate": 1e-4}, {"prompts": "more"}, {"overwrite_output_dir": True}, {"do_train": False}):
        assert finetune_command.finished_summary(dataclasses.replace(config, **change)) is None
    for damaged in ("", "[]", '{"steps": 7}', "{}", "[" * 100_000):
        write()
        (tmp_path / "summary.json").write_text(damaged)
        assert finetune_command.finished_summary(config) is None
        with pytest.raises(UserError, match=r"summary\.json is damaged .*; delete it and run the same command again"):
            read_summary(tmp_path)
    write([])
    assert finetune_command.finished_summary(config) is None
    write()
    (tmp_path / "adapter").rmdir()
    assert finetune_command.finished_summary(config) is None


def test_results_that_have_changed_since_are_named(finished, tmp_path, monkeypatch, capsys):
    config, write = finished
    write()
    monkeypatch.setattr(finetune_command, "configure", lambda *_: (config, SimpleNamespace(plan=False)))
    assert finetune_command.main([]) == 0
    said = capsys.readouterr()
    assert "already done" in said.out and not said.err
    (tmp_path / "answers.json").write_text("[ ]")
    assert finetune_command.main([]) == 0
    said = capsys.readouterr()
    assert "already done" in said.out
    assert said.err.startswith(f"warning: {tmp_path}/answers.json is missing or not as it was written; delete ")


def test_a_reader_that_leaves_ends_it_quietly():
    program = "import sys; from qlora_jax.cli import run; run(lambda argv: print('x' * 2**20))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()
