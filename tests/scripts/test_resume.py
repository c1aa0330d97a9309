"""Runs in this process that stop or die at chosen moments and are started again: the same bits as one left alone."""

import contextlib
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import jax
import pytest
from fixtures.finetune_helpers import (
    GROUPED_RUN,
    assert_same_run,
    file_digest,
    make_resumable,
    only_error,
    read_metrics,
    resumable_flags,
    run_in_process,
    without_timings,
)

from qlora_jax import finetuning
from qlora_jax.device_memory import ProgramMemory
from qlora_jax.training import model, reporting, run_directory, setup, trainer
from qlora_jax.training.step import TrainStep

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_resumable(tmp_path_factory.mktemp("resume"))


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
INSIDE = GROUPED_RUN | {
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
        assert run_in_process(resumable_flags(place, "inside", INSIDE)) == 0
    return place / "inside"


@pytest.mark.e2e
def test_killed_at_any_operation_on_the_disk_and_resumed_is_bit_identical(
    place, inside, monkeypatch, compiled_once, rng, capsys
):
    """A chain of deaths, each somewhere in what was left to do, and each of the last few operations of a run."""
    with monkeypatch.context() as patch:
        death = Death(patch)
        assert run_in_process(resumable_flags(place, "inside-counted", INSIDE)) == 0
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
                    ended = run_in_process(resumable_flags(place, name, INSIDE))
                except Killed:
                    ended = None
            # A run that died in its last operation has none left.
            last = death.trace[-1] if death.trace else "no operation"
            print(f"chain {number}, died at {at} of about {operations}: {last}, ended {ended}")
            if ended is not None:  # fewer operations were left
                break
        else:
            ended = run_in_process(resumable_flags(place, name, INSIDE))
        # A run whose last operation was its death is complete.
        assert ended == 0
        assert_same_run(place / name, inside)


@pytest.mark.e2e
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
            assert run_in_process(resumable_flags(place, name, INSIDE | {"save_steps": 100})) == 75
        err = capsys.readouterr().err
        assert f"interrupted after step {step}; run the same command again to resume" in err
        assert (place / name / f"checkpoint-{step:06d}").is_dir()
        assert run_in_process(resumable_flags(place, name, INSIDE | {"save_steps": 2})) == 0
        assert without_timings(read_metrics(place / name)) == without_timings(read_metrics(inside))
        assert not [path for path in (place / name).glob("checkpoint-*") if int(path.name[-6:]) % 2]


@contextlib.contextmanager
def stopped_by_signal(step):
    """Send SIGTERM to the run as it begins a step."""
    real, begun = trainer.Trainer._place, []

    def stop(self, batch):
        begun.append(batch)
        if len(begun) == step:
            signal.raise_signal(signal.SIGTERM)
        return real(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_place", stop)
        yield


def test_ctrl_c_twice_saves_nothing_and_the_run_can_be_resumed(place, inside, monkeypatch, compiled_once, capsys):
    real, steps = trainer.Trainer._place, []

    def stop(self, batch):
        steps.append(batch)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_place", stop)
        assert run_in_process(resumable_flags(place, "twice", INSIDE)) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert run_in_process(resumable_flags(place, "twice", INSIDE)) == 0
    assert_same_run(place / "twice", inside)


@pytest.mark.e2e
def test_other_prompts_on_resume(place, monkeypatch, compiled_once, capsys):
    """Answers from before training stay with their prompts."""
    more = place / "more.txt"
    more.write_text("say zzzz\nsay abcd\n")
    values = INSIDE | {"max_steps": 4}
    assert run_in_process(resumable_flags(place, "prompts", values)) == 0
    (before,) = json.loads((place / "prompts" / "answers.json").read_text())
    changed = [*resumable_flags(place, "prompts", INSIDE), "--prompts", str(more)]
    assert run_in_process(changed) == 0
    new, old = json.loads((place / "prompts" / "answers.json").read_text())
    assert (old["prompt"], old["before"]) == ("say abcd", before["before"])
    assert (new["prompt"], new["before"]) == ("say zzzz", "(not asked before training)")
    # A constant schedule may be made longer: the steps are those of the longer run.
    assert [line["step"] for line in read_metrics(place / "prompts") if "loss" in line] == [1, 2, 3, 4, 5, 6]
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


@pytest.mark.e2e
def test_chunks_that_change_their_place_are_logged_at_their_step(place, monkeypatch):
    assert run_in_process(resumable_flags(place, "told", INSIDE | {"max_steps": 2, "optim_placement": "host"})) == 0
    with monkeypatch.context() as patch:
        leave_room_for_two_thirds(patch)
        more = {"max_steps": 5, "optim_placement": "auto", "logging_steps": 100, "eval_steps": 100}
        assert run_in_process(resumable_flags(place, "told", INSIDE | more)) == 0
    told = {line["step"]: line for line in read_metrics(place / "told") if line["step"] > 2 and "eval_loss" not in line}
    assert sorted(told) == [3, 5]
    assert "loss" not in told[3]
    assert min(told[3]["returned_bytes"], told[3]["optimizer_on_host_bytes"]) > 0
    assert "returned_bytes" not in told[5]
    assert told[5]["paged_bytes"] == 2 * 2 * told[3]["optimizer_on_host_bytes"]  # of steps 4 and 5, both ways


@pytest.mark.e2e
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
            assert run_in_process(resumable_flags(place, "moved", INSIDE | part)) == 0
    lines = [read_metrics(path) for path in (place / "moved", inside)]
    got, want = ([(line["step"], line["loss"]) for line in one if "loss" in line] for one in lines)
    assert got == want
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert file_digest(place / "moved" / "adapter" / name) == file_digest(inside / "adapter" / name)
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
    assert run_in_process(resumable_flags(place, "inside", INSIDE | {"optim": "paged_adamw_8bit"})) == 1
    assert "--optim was 'paged_adamw_32bit', now 'paged_adamw_8bit'" in only_error(capsys.readouterr().err)


def test_out_of_memory_is_told_once_and_the_checkpoint_kept(place, inside, monkeypatch, compiled_once, capsys):
    real, output = TrainStep.__call__, place / "memory"

    def fail(self, state, *rest):
        if int(state.step) == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.99GiB.")
        return real(self, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", fail)
        assert run_in_process(resumable_flags(place, output.name, INSIDE)) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    said = err[err.index("error: step 5 ran out of device memory on 2 x 2 rows of ") :]
    assert "its program alone takes " in said
    assert f"the last good checkpoint is {output / 'checkpoint-000004'}. What would need less:\n" in said
    assert "\n  lower --source_max_len and --target_max_len shorten the rows" in said
    assert "--remat offload" in said
    assert "--remat full" not in said  # is on
    assert run_in_process(resumable_flags(place, output.name, INSIDE)) == 0
    assert_same_run(output, inside)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_resumed(place, inside, compiled_once, capsys):
    output = place / "damaged"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "plot_losses", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run_in_process(resumable_flags(place, output.name, INSIDE))
    state = output / "checkpoint-000006" / "state"
    file = next(file for file in state.rglob("*") if file.is_file() and file.parent.name == "d")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)
    damaged = f"{output / 'checkpoint-000006'} is damaged: its file {file.relative_to(state.parent)} is missing or not"
    capsys.readouterr()
    assert run_in_process([*resumable_flags(place, output.name, INSIDE), "--strict_resume"]) == 1
    assert f"error: {damaged} as it was written. --strict_resume False resumes" in capsys.readouterr().err
    assert run_in_process(resumable_flags(place, output.name, INSIDE)) == 0
    out, err = capsys.readouterr()
    assert f"{damaged} as it was written. It is kept as checkpoint-000006.damaged, and the checkpoint before" in err
    assert f"resuming {output} after step 4 of 6" in out
    shutil.rmtree(output / "checkpoint-000006.damaged")
    assert_same_run(output, inside)


@pytest.mark.parametrize("changed", ["base weights", "tokenizer", "data"])
def test_another_base_tokenizer_or_data_under_the_same_name_is_refused(place, inside, compiled_once, capsys, changed):
    """Each is found by its contents, before a step is done."""
    output = place / f"swapped {changed}"
    with stopped_by_signal(3):
        assert run_in_process(resumable_flags(place, output.name, INSIDE)) == 75
    files = {"base weights": "model/model.safetensors", "tokenizer": "model/tokenizer.json", "data": "rows.jsonl"}
    file = place / files[changed]
    before = file.read_bytes()
    try:
        if changed == "base weights":
            content = bytearray(before)
            content[-2] ^= 64  # an exponent
            file.write_bytes(content)
        elif changed == "tokenizer":
            value = json.loads(before)
            value["added_tokens"][0]["rstrip"] = True
            file.write_text(json.dumps(value))
        else:
            file.write_bytes(before.replace(b"a", b"b"))
        capsys.readouterr()
        assert run_in_process(resumable_flags(place, output.name, INSIDE)) == 1
        err = capsys.readouterr().err
        assert f"holds the checkpoints of another run ({changed} was " in err
    finally:
        file.write_bytes(before)
    assert run_in_process(resumable_flags(place, output.name, INSIDE)) == 0
    assert_same_run(output, inside)
