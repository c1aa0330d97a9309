"""Runs that are killed or stopped at random moments and started again come to the same bits as one left alone."""

import json
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import fixtures.finetune_helpers as helpers
import jax
import pytest
from fixtures.finetune_helpers import (
    SMALL,
    call,
    error_line,
    finish,
    flags,
    last_error,
    metrics,
    run,
    same_run,
    start,
    wait_until,
)

from qlora_jax import finetuning
from qlora_jax.device_memory import ProgramMemory
from qlora_jax.training import model, reporting, run_directory, setup, trainer
from qlora_jax.training.step import TrainStep

# What a resumed run could get wrong: dropout masks, accumulation, the order of length-grouped batches, the optimizer's
# moments, a decaying learning rate.
GROUPED = SMALL | {"lora_dropout": 0.1, "max_steps": 24, "save_total_limit": 3}
PACKED = GROUPED | {"packing": True, "sequence_length": 96, "source_max_len": 64, "eval_steps": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    helpers.make_model(directory / "model")
    helpers.write_jsonl(directory / "rows.jsonl", helpers.make_rows(40))
    (directory / "prompts.txt").write_text("say abcd\n")
    return directory


@pytest.fixture(scope="module")
def environment(place):
    """Compiled once: a started run then takes seconds, most of them imports."""
    return helpers.environment(
        PYTHONWARNINGS="error",
        JAX_COMPILATION_CACHE_DIR=str(place / "cache"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )


def argv(place, name, values):
    named = {"model_name_or_path": place / "model", "dataset": place / "rows.jsonl", "prompts": place / "prompts.txt"}
    return flags(**(values | named | {"output_dir": place / name}))


def uninterrupted(place, environment, name, values):
    status, _, err = run(argv(place, name, values), env=environment)
    assert status == 0, err
    assert "Warning" not in err
    return place / name


@pytest.fixture(scope="module")
def grouped(place, environment):
    return uninterrupted(place, environment, "grouped", GROUPED)


@pytest.fixture(scope="module")
def packed(place, environment):
    return uninterrupted(place, environment, "packed", PACKED)


@pytest.fixture
def rng():
    """Other moments every time; the seed is printed when a test fails."""
    seed = int(os.environ.get("QLORA_JAX_TEST_SEED", time.time_ns() % 10**9))
    print(f"QLORA_JAX_TEST_SEED={seed}")
    return random.Random(seed)


def being_saved(directory: Path, since: float):
    """Whether a checkpoint, not the first, has been begun since a time and is not complete."""
    if not list(directory.glob("checkpoint-*")):
        return False
    for path in directory.glob(".checkpoint-*.tmp"):
        try:
            if path.stat().st_mtime > since:
                return True
        except FileNotFoundError:
            continue
    return False


def kill_at_random(process, directory, kind, rng):
    """SIGKILL some lines of metrics further on, or while a checkpoint is written; whether it still ran."""
    began, lines = time.time(), helpers.line_count(directory)
    if kind == "lines":
        target = lines + rng.randint(1, 6)
        reached = wait_until(process, lambda: helpers.line_count(directory) >= target)
        delay = rng.uniform(0, 0.1)
    else:
        # The run first removes what the one before left.
        reached = wait_until(process, lambda: being_saved(directory, began))
        delay = rng.uniform(0, 0.05)
    time.sleep(delay)
    killed = helpers.kill(process)
    print(f"{kind}: reached {reached}, {delay:.3f} s later killed {killed}, {helpers.line_count(directory)} lines")
    return killed


@pytest.mark.parametrize(
    ("golden", "values", "kinds"),
    [
        ("grouped", GROUPED, ("lines", "save", "lines", "save")),
        ("packed", PACKED, ("lines", "save")),
    ],
)
def test_killed_and_resumed_is_bit_identical(place, environment, request, rng, golden, values, kinds):
    golden = request.getfixturevalue(golden)
    name = f"{golden.name}-killed"
    killed = 0
    for kind in kinds:
        killed += kill_at_random(start(argv(place, name, values), env=environment), place / name, kind, rng)
    status, out, err = run(argv(place, name, values), env=environment)
    assert status == 0, err
    assert killed == len(kinds)
    assert re.search(r"resuming .* after step \d+ of 24", out)
    same_run(place / name, golden)
    steps = [line["step"] for line in metrics(place / name) if "loss" in line]
    assert steps == list(range(1, 25))


def test_stopped_by_a_signal_and_resumed_is_bit_identical(place, environment, grouped, rng):
    output = place / "stopped"
    stops = []
    for number in (signal.SIGTERM, signal.SIGINT):
        target = helpers.line_count(output) + rng.randint(2, 6)
        process = start(argv(place, output.name, GROUPED), env=environment)
        assert wait_until(process, lambda target=target: helpers.line_count(output) >= target)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(number)
        status, out, err = finish(process)
        assert status == 0, err
        assert f"{number.name}: saving after this step" in out
        assert "Traceback" not in err
        stop = re.search(r"^interrupted after step (\d+); run the same command again to resume$", err, re.MULTILINE)
        assert stop, err
        stops.append(int(stop[1]))
        print(f"{number.name}: stopped after step {stops[-1]}")
        assert (output / f"checkpoint-{stops[-1]:06d}" / "adapter_config.json").exists()
        assert max(line["step"] for line in metrics(output)) == stops[-1]
        assert not (output / "adapter").exists()
    assert 0 < stops[0] < stops[1] < 24
    status, out, err = run(argv(place, output.name, GROUPED), env=environment)
    assert status == 0, err
    assert f"resuming {output} after step {stops[1]} of 24" in out
    # The checkpoints of the stops are beside the regular ones; the newest three are the same.
    same_run(output, grouped)


def test_disk_full_keeps_earlier_checkpoints_and_can_be_resumed(place, environment, grouped):
    output = place / "full"
    process = start(argv(place, output.name, GROUPED), env=environment)
    assert wait_until(process, lambda: (output / "checkpoint-000003").exists())
    # No file may grow beyond this from now on; an adapter has 32 kB.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16000, 16000))
    status, _, err = finish(process)
    assert status == 1, err
    message = last_error(err)
    assert "could not be saved: " in message
    assert "earlier checkpoints are intact" in message
    saved = sorted(output.glob("checkpoint-*"))
    assert saved
    assert f"checkpoint-{3 * len(saved) + 3:06d} could not be saved" in message
    status, out, err = run(argv(place, output.name, GROUPED), env=environment)
    assert status == 0, err
    assert f"after step {3 * len(saved)} of 24" in out
    same_run(output, grouped)


# --- the same in one process, where the moment of death can be chosen


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it, and nothing that would touch the disk works after it."""


class Death:
    """Counts operations on the disk and kills the run at one of them; a dead run changes nothing any more."""

    def __init__(self, monkeypatch):
        self.count, self.at, self.trace = 0, None, []
        for owner, name in (
            (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree"),
            (run_directory.ocp, "save"), (reporting.MetricsLog, "write"), (model, "save_adapter"),
        ):  # fmt: skip
            self._hook(monkeypatch, owner, name)

    def _hook(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def hooked(*args, **kwargs):
            # Orbax and TensorBoard work in threads, at moments that no test can repeat.
            if threading.current_thread() is not threading.main_thread():
                return real(*args, **kwargs)
            label = f"{name} {Path(args[-1]).name}" if name in ("replace", "rename") else name
            self._step(label)
            result = real(*args, **kwargs)
            self._step(f"{label} done")
            return result

        monkeypatch.setattr(owner, name, hooked)

    def _step(self, name):
        self.count += 1
        self.trace.append(name)
        if self.at is not None and self.count >= self.at:
            raise Killed


# The learning rate depends on the step alone, so that all runs in this process can share their compiled steps.
INSIDE = GROUPED | {
    "max_steps": 6, "save_steps": 2, "eval_steps": 2, "save_total_limit": 2, "lr_scheduler_type": "constant",
    "warmup_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    made = {}

    def once(owner, name):
        real = getattr(owner, name)

        def make(*args, **kwargs):
            if name not in made:
                made[name] = real(*args, **kwargs)
            return made[name]

        return make

    return {(setup, name): once(setup, name) for name in ("make_train_step", "make_eval_step")}


@pytest.fixture
def compiled_once(monkeypatch, compiled):
    """The second run in this process takes a second."""
    for (owner, name), make in compiled.items():
        monkeypatch.setattr(owner, name, make)


@pytest.fixture(scope="module")
def inside(place, compiled):
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), make in compiled.items():
            patch.setattr(owner, name, make)
        assert call(argv(place, "inside", INSIDE)) == 0
    return place / "inside"


def test_killed_at_any_operation_on_the_disk_and_resumed_is_bit_identical(
    place, inside, monkeypatch, compiled_once, rng, capsys
):
    """A chain of deaths, each somewhere in what was left to do, and each of the last few operations of a run."""
    with monkeypatch.context() as patch:
        death = Death(patch)
        assert call(argv(place, "inside-counted", INSIDE)) == 0
    operations = death.count
    assert operations > 60
    assert {"replace summary.json", "save", "write", "rmtree done", "save_adapter done"} <= set(death.trace)
    saved = 1 + death.trace.index("rename checkpoint-000006 done")
    chains = [
        [rng.randint(1, operations) for _ in range(6)],
        # The last checkpoint is whole: still to do are pruning, the last evaluation, the adapter and the summary.
        [saved],
        [rng.randint(saved, operations), operations - 1, 3],
        [operations - rng.randint(0, 8)],
    ]
    for number, chain in enumerate(chains):
        name = f"inside-{number}"
        for at in chain:
            with monkeypatch.context() as patch:
                death = Death(patch)
                death.at = at
                try:
                    ended = call(argv(place, name, INSIDE))
                except Killed:
                    ended = None
            print(f"chain {number}, died at {at} of about {operations}: {death.trace[-1]}, ended {ended}")
            if ended is not None:  # fewer operations were left
                break
        else:
            ended = call(argv(place, name, INSIDE))
        # A run whose last operation was its death is complete.
        finished = ended == 1 and "holds a finished run" in capsys.readouterr().err
        assert ended == 0 or finished
        same_run(place / name, inside)


def test_stopped_where_an_evaluation_is_due(place, inside, monkeypatch, compiled_once, capsys):
    """The stop comes first; the evaluation is made up for, so the log has no hole. Nor has a stop in an evaluation."""
    for name, method, step in (("stop-in-step", "_place", 2), ("stop-in-evaluation", "evaluate", 4)):
        real, steps = getattr(trainer.Trainer, method), []

        def stop(self, argument, real=real, step=step, steps=steps):
            result = real(self, argument)
            steps.append(argument)
            if (argument if isinstance(argument, int) else len(steps)) == step:
                signal.raise_signal(signal.SIGTERM)
            return result

        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, method, stop)
            assert call(argv(place, name, INSIDE | {"save_steps": 100})) == 0
        err = capsys.readouterr().err
        assert f"interrupted after step {step}; run the same command again to resume" in err
        assert (place / name / f"checkpoint-{step:06d}").is_dir()
        assert call(argv(place, name, INSIDE | {"save_steps": 2})) == 0
        assert helpers.reproducible(metrics(place / name)) == helpers.reproducible(metrics(inside))
        assert not [path for path in (place / name).glob("checkpoint-*") if int(path.name[-6:]) % 2]


def test_other_prompts_on_resume(place, monkeypatch, compiled_once, capsys):
    """Answers from before training stay with their prompts."""
    more = place / "more.txt"
    more.write_text("say zzzz\nsay abcd\n")
    values = INSIDE | {"max_steps": 4}
    assert call(argv(place, "prompts", values)) == 0
    (before,) = json.loads((place / "prompts" / "answers.json").read_text())
    changed = [*argv(place, "prompts", INSIDE), "--prompts", str(more)]
    assert call(changed) == 0
    new, old = json.loads((place / "prompts" / "answers.json").read_text())
    assert (old["prompt"], old["before"]) == ("say abcd", before["before"])
    assert (new["prompt"], new["before"]) == ("say zzzz", "(not asked before training)")
    # A constant schedule may be made longer: the steps are those of the longer run.
    assert [line["step"] for line in metrics(place / "prompts") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert json.loads((place / "prompts" / "summary.json").read_text())["steps"] == 6


def leave_room_for_two_thirds(patch):
    """A device limit with room for the gradients' program and two thirds of the optimizer's state."""
    programs = TrainStep.program

    def program(self, *args):
        compiled = programs(self, *args)
        self.optimizer.limit = ProgramMemory.of(compiled).peak + 2 * self.optimizer.state_bytes // 3
        return compiled

    patch.setattr(TrainStep, "program", program)
    patch.setattr(finetuning, "device_limit", lambda device: 1)


def test_chunks_that_change_their_place_are_logged_at_their_step(place, monkeypatch):
    assert call(argv(place, "told", INSIDE | {"max_steps": 2, "optim_placement": "host"})) == 0
    with monkeypatch.context() as patch:
        leave_room_for_two_thirds(patch)
        more = {"max_steps": 5, "optim_placement": "auto", "logging_steps": 100, "eval_steps": 100}
        assert call(argv(place, "told", INSIDE | more)) == 0
    told = {line["step"]: line for line in metrics(place / "told") if line["step"] > 2 and "eval_loss" not in line}
    assert sorted(told) == [3, 5]
    assert "loss" not in told[3]
    assert min(told[3]["returned_bytes"], told[3]["optimizer_on_host_bytes"]) > 0
    assert "returned_bytes" not in told[5]
    assert told[5]["paged_bytes"] == 2 * 2 * told[3]["optimizer_on_host_bytes"]  # of steps 4 and 5, both ways


def test_resumed_in_another_placement_is_bit_identical(place, inside, monkeypatch):
    """The state moves from host to device to wherever there is room; `inside` had it on the device all along."""
    parts = (
        {"max_steps": 2, "optim_placement": "host"},
        {"max_steps": 4, "optim": "adamw_32bit"},
        {"max_steps": 6, "optim_placement": "auto"},
    )
    for part in parts:
        with monkeypatch.context() as patch:
            if part.get("optim_placement") == "auto":
                leave_room_for_two_thirds(patch)
            assert call(argv(place, "moved", INSIDE | part)) == 0
    lines = [metrics(path) for path in (place / "moved", inside)]
    got, want = ([(line["step"], line["loss"]) for line in one if "loss" in line] for one in lines)
    assert got == want
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert helpers.digest(place / "moved" / "adapter" / name) == helpers.digest(inside / "adapter" / name)
    paging = {line["step"]: line for line in lines[0] if "loss" in line}
    state = paging[1]["optimizer_on_host_bytes"]
    assert all(paging[step]["paged_bytes"] == 2 * state for step in (1, 2))
    assert all(paging[step]["paging_seconds"] > 0 for step in (1, 2, 5, 6))
    assert not any("byte" in name or "paging" in name for step in (3, 4) for name in paging[step])
    # What was restored to the host has come back as far as there is room.
    left = paging[5]["optimizer_on_host_bytes"]
    assert 0 < left < 2 * state / 3
    assert paging[5]["returned_bytes"] == state - left
    assert paging[5]["paged_bytes"] == paging[6]["paged_bytes"] == 2 * left
    # The last evaluation was given all the room there is.
    sizes = json.loads((place / "moved" / "summary.json").read_text())["bytes"]
    assert (sizes["optimizer_on_device"], sizes["optimizer_on_host"]) == (0, state)


def test_another_optimizer_is_another_run(place, inside, capsys):
    assert call(argv(place, "inside", INSIDE | {"optim": "paged_adamw_8bit"})) == 1
    assert "--optim was 'paged_adamw_32bit', now 'paged_adamw_8bit'" in error_line(capsys.readouterr().err)


def test_out_of_memory_is_told_once_and_the_checkpoint_kept(place, inside, monkeypatch, compiled_once, capsys):
    real, output = TrainStep.__call__, place / "memory"

    def fail(self, state, *rest):
        if int(state.step) == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.99GiB.")
        return real(self, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", fail)
        assert call(argv(place, output.name, INSIDE)) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    said = err[err.index("error: step 5 ran out of device memory on 2 x 2 rows of ") :]
    assert "its program alone takes " in said
    assert f"the last good checkpoint is {output / 'checkpoint-000004'}. What would need less:\n" in said
    assert "\n  lower --source_max_len and --target_max_len shorten the rows" in said
    assert "--remat offload" in said
    assert "--remat full" not in said  # is on
    assert call(argv(place, output.name, INSIDE)) == 0
    same_run(output, inside)


def test_a_damaged_checkpoint_is_named(place, compiled_once):
    output = place / "damaged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "plot_losses", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            call(argv(place, output.name, INSIDE))
    state = output / "checkpoint-000006" / "state"
    for file in state.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    # In a process of its own: left to itself, tensorstore writes pages about it.
    status, _, err = run(argv(place, output.name, INSIDE))
    assert status == 1
    message = error_line(err)
    assert message.startswith(f"{output / 'checkpoint-000006'} cannot be restored: its file state/")
    assert message.endswith("; delete it to resume from the one before.")
    shutil.rmtree(output / "checkpoint-000006")
    assert call(argv(place, output.name, INSIDE)) == 0
    assert [line["step"] for line in metrics(output) if "loss" in line] == [1, 2, 3, 4, 5, 6]
