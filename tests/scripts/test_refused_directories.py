"""One writer an output directory, and refusals of one that come before JAX is loaded."""

import json
import resource
import subprocess
import sys

import pytest
from fixtures.finetune_helpers import (
    SMALL_RUN,
    child_environment,
    make_resumable,
    only_error,
    resumable_flags,
    start_child,
    wait_for_child,
)

from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.files import exclusive, write_checked_json
from qlora_jax.models import PRESETS
from qlora_jax.optimizers import OPTIMIZERS
from qlora_jax.training import run_state
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.ownership import _same_rule, least_checkpoint_bytes
from qlora_jax.training.setup import declare

PROGRAM = """
import collections, shutil, sys
if "--full" in sys.argv:
    sys.argv.remove("--full")
    shutil.disk_usage = lambda path: collections.namedtuple("Usage", "total used free")(1 << 40, 1 << 40, 1_000_000)
from qlora_jax import commands
try:
    commands.entry()
finally:
    assert "jax" not in sys.modules and "numpy" not in sys.modules
"""


def refusal(*flags):
    """Message of `finetune` in a process that loads no JAX, and its processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", PROGRAM, "finetune", *flags], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1
    return only_error(done.stderr), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_use(path):
    with exclusive(path, "it"):
        yield


def of_another_run(path):
    checkpoint = path / "checkpoint-000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "position.json").write_text("{}")
    flags = {"dataset": "rows.jsonl", "model_name_or_path": "model", "lora_r": 4}
    write_checked_json(path / "run.json", {"flags": flags, "identity": {}, "facts": {}})
    yield


def of_another_program(path):
    path.mkdir()
    (path / "loss.png").write_text("mine")
    yield


def a_file(path):
    path.write_text("mine")
    yield


def below_a_file(path):
    path.parent.rmdir()
    path.parent.write_text("mine")
    yield


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (in_use, "is in use by process"),
        (of_another_run, "holds the checkpoints of another run (--lora_r was 4, now 64)"),
        (of_another_program, "holds loss.png, not written by a run of this program"),
        (a_file, "is a file; give a directory."),
        (below_a_file, "cannot be written: Not a directory."),
    ],
)
def test_a_directory_is_refused_in_no_time_without_jax(prepare, said, tmp_path):
    path = tmp_path / "runs" / "run"
    path.parent.mkdir()
    prepared = prepare(path)
    next(prepared)
    message, seconds = refusal("--model_name_or_path", "model", "--dataset", "rows.jsonl", "--output_dir", str(path))
    prepared.close()
    assert message.startswith(f"--output_dir {path} ") and said in message
    # Of the processor: a busy machine does not count.
    assert seconds < 1


def test_a_full_disk_is_refused_in_no_time_without_jax(tmp_path):
    config = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 2048}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    run = str(tmp_path / "run")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--dataset", "rows.jsonl", "--output_dir", run, "--full"]
    message, seconds = refusal(*flags, "--lora_r", "16")
    assert message == (
        f"a checkpoint takes 35.7 MB or more and the disk of --output_dir {run} has 1.0 MB left; free some space or "
        "give another directory."
    )
    assert seconds < 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("preset", "optim", "modules"),
    [
        ("smollm2-135m", "adamw_8bit", "attention"),
        ("llama-3.1-8b", "paged_adamw_32bit", "all"),
        ("llama-3.1-8b", "lion_8bit", "mlp"),
        ("qwen3-0.6b", "adafactor", "all"),
        ("gemma3-1b", "sgd", "attention"),
    ],
)
def test_bytes_of_a_checkpoint_are_known_without_jax(preset, optim, modules, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[preset]))
    config = TrainConfig(
        model_name_or_path=str(tmp_path), lora_r=16, lora_modules=modules, optim=optim, output_dir=str(tmp_path)
    )
    trained = declare(config, resolve_config(tmp_path)).parts.lora
    asked = []
    monkeypatch.setattr(run_state, "check_room", lambda directory, needed, *rest: asked.append(needed))
    run_state.check_free_space(config, trained)
    assert 0.94 * asked[0] < least_checkpoint_bytes(config) <= asked[0]


def test_optimizers_that_differ_in_paging_only_are_told_by_their_names():
    assert {config.optim for config in (TrainConfig(optim=name) for name in OPTIMIZERS)} == set(OPTIMIZERS)
    for name, optimizer in OPTIMIZERS.items():
        for other, same in OPTIMIZERS.items():
            assert _same_rule(name, other) == (optimizer.transformation == same.transformation), (name, other)


@pytest.mark.e2e
def test_of_fifty_starts_of_two_runs_one_writes(tmp_path):
    place, rest = make_resumable(tmp_path), SMALL_RUN | {"max_steps": 2, "eval_steps": 2}
    ranks = [4 + 4 * (i % 2) for i in range(50)]
    starts = [
        start_child(resumable_flags(place, "run", rest | {"lora_r": rank}), env=child_environment()) for rank in ranks
    ]
    ends = [wait_for_child(start) for start in starts]
    refused = [only_error(err) for status, _, err in ends if status == 1]
    assert [status for status, _, _ in ends if status != 1] == [0]
    assert len(refused) == 49 and all("is in use by process" in message for message in refused)
    (rank,) = [rank for rank, (status, _, _) in zip(ranks, ends, strict=True) if status == 0]
    run = place / "run"
    written = json.loads((run / "run.json").read_text())["flags"]["lora_r"]
    assert written == json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == rank
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 2
    assert not list(run.glob(".*"))
