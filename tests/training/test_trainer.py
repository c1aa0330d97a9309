"""The training loop on steps that take no time: its rates, its progress bar, what it waits for and what it saves."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.data import Batches, Example, evaluation_batches
from qlora_jax.device_memory import ProgramMemory
from qlora_jax.optimizers import PagedOptimizer, TransferStats
from qlora_jax.training import reporting, setup
from qlora_jax.training import trainer as trainer_module
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.datasets import Datasets
from qlora_jax.training.failures import NonFiniteLoss, StepOutOfMemory, advised_out_of_memory
from qlora_jax.training.model import Model
from qlora_jax.training.objectives import NEXT_TOKEN, Sums
from qlora_jax.training.reporting import MetricsLog, StepTimer, Throughput, read_metrics
from qlora_jax.training.run_directory import RunDirectory
from qlora_jax.training.run_state import Counters, RunState
from qlora_jax.training.step import StepReport, TrainState, TrainStep
from qlora_jax.training.trainer import Trainer

STEP, COMPILATION, EVALUATION, SAVING = 2.0, 1000.0, 300.0, 500.0  # seconds on the fake clock
TOKENS = 4 * 10  # of a step: rows of ten tokens


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when something sets `clock.now`."""
    clock = types.SimpleNamespace(now=0.0)

    def moment(self, number):
        future = concurrent.futures.Future()
        future.set_result(number.after)
        return future

    monkeypatch.setattr(reporting.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(StepTimer, "moment", moment)
    return clock


def unchecked(cls, **values):
    """An instance whose fields need not have the declared types."""
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


class Number:
    """A scalar on a device that has it `after` seconds on the clock; reading it waits."""

    def __init__(self, clock, value, after):
        self.clock, self.value, self.after = clock, value, after

    def __float__(self):
        self.clock.now = max(self.clock.now, self.after)
        return float(self.value)

    def item(self):
        return self.value


class FakeOptimizer(PagedOptimizer):
    """Has nothing to page."""

    def __init__(self):
        pass

    def resident_chunks(self, needed):
        return 0

    def evict(self, state, resident):
        return state, TransferStats()

    def host_bytes(self, state):
        return 0

    def masters(self, lora, state):
        return lora

    def gather(self, state):
        return state


class FakeStep(TrainStep):
    """Steps of two seconds: done when the call returns, as on a CPU at times, or later, as on a GPU."""

    def __init__(self, clock, synchronous, losses=None):
        self.clock, self.synchronous, self.losses = clock, synchronous, losses or {}
        self.optimizer, self.programs, self.busy_until, self.done = FakeOptimizer(), {}, 0.0, 0

    def compiled(self, batch):
        return batch if batch.shape in self.programs else None

    def program(self, lora, frozen, batch, step):
        self.clock.now += COMPILATION
        self.programs[batch.shape] = None

    def __call__(self, state, frozen, batch):
        assert batch.shape in self.programs
        self.done += 1
        self.busy_until = max(self.busy_until, self.clock.now) + STEP
        if self.synchronous:
            self.clock.now = self.busy_until
        loss = self.losses.get(self.done, 1 / self.done)
        if isinstance(loss, Exception):
            raise loss
        one, weight = (Number(self.clock, value, self.busy_until) for value in (1.0, 36))
        report = unchecked(
            StepReport,
            loss=Number(self.clock, loss, self.busy_until),
            grad_norm=one,
            weight=weight,
            metrics={"double": one},
            transfers=TransferStats(),
        )
        return dataclasses.replace(state, step=state.step + 1), report


def examples(count):
    ids = np.arange(10, dtype=np.int32)
    return [Example(ids, np.where(ids > 0, ids, -100).astype(np.int32), f"row {i}") for i in range(count)]


@pytest.fixture
def make_trainer(tmp_path, clock):
    """`new_trainer` in one directory; the logs are closed."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            trainer = new_trainer(tmp_path, clock, **options)
            stack.callback(trainer.log.close)
            return trainer

        yield make


def new_trainer(tmp_path, clock, *, synchronous=True, losses=None, start=0, **changes):
    values = {
        "max_steps": 12, "eval_steps": 4, "save_steps": 3, "logging_steps": 1, "report_to": "none",
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
    }  # fmt: skip
    config = TrainConfig(output_dir=str(tmp_path / "run"), **(values | changes))
    batching = {"batch_size": 4, "mode": "plain", "pad_id": 0, "fields": NEXT_TOKEN.fields}
    train = Batches(examples(40), **batching)
    datasets = Datasets(train, evaluation_batches(examples(4), **batching), config.max_steps, "alpaca", ())

    def evaluate(lora, frozen, batch):
        clock.now += EVALUATION
        return Sums(jnp.float32(72.0), jnp.int32(36), {"further": jnp.int32(9)})

    devices = setup.make_devices(config)
    programs = setup.Programs(FakeStep(clock, synchronous, losses), evaluate, NEXT_TOKEN, devices)
    model = unchecked(Model, parts=unchecked(setup.ModelParts, frozen=None))
    directory = RunDirectory.open(config, {})
    state = unchecked(TrainState, lora=nnx.State({}), opt_state=[], step=start)
    state = RunState(state, start, Counters(start * TOKENS, start * 36, 0.0))
    return Trainer(config, model, programs, datasets, directory, MetricsLog(directory.path, config, start), state)


@pytest.fixture
def saved(monkeypatch, clock):
    """Positions that were saved, by step; saving takes long."""
    positions = {}

    def save(self, step, state, position, write_adapter):
        clock.now += SAVING
        positions[step] = position
        return self.path

    monkeypatch.setattr(RunDirectory, "save", save)
    return positions


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("logging_steps", [1, 5])
def test_the_rate_is_that_of_training_alone(tmp_path, make_trainer, saved, synchronous, logging_steps):
    """Neither compilation nor evaluation nor saving counts, before, at or after the steps that do them."""
    trainer = make_trainer(synchronous=synchronous, logging_steps=logging_steps)
    trainer.evaluate(0)
    assert trainer.train()
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == ([*range(1, 13)] if logging_steps == 1 else [1, 5, 10, 12])
    assert [line["tokens_per_second"] for line in lines] == pytest.approx([TOKENS / STEP] * len(lines))
    assert [line["tokens"] for line in lines] == [TOKENS * line["step"] for line in lines]
    assert [line["loss"] for line in lines] == [1 / line["step"] for line in lines]
    assert {line["double"] for line in lines} == {1.0}
    # The seconds of the run are all of them.
    assert lines[-1]["seconds"] > COMPILATION + 3 * EVALUATION + 3 * SAVING
    assert sorted(saved) == [3, 6, 9, 12]


def test_lines_are_on_disk_before_the_checkpoint_that_refers_to_them(tmp_path, make_trainer, monkeypatch):
    trainer = make_trainer()
    order = []
    monkeypatch.setattr(os, "fsync", lambda _: order.append(read_metrics(trainer.log.path)[-1]["step"]))
    monkeypatch.setattr(RunDirectory, "save", lambda self, step, *rest: order.append(f"saved {step}") or self.path)
    assert trainer.train()
    assert order == [each for step in (3, 6, 9, 12, 12) for each in (step, f"saved {step}")]


def test_evaluation_reports_means(tmp_path, make_trainer, saved):
    trainer = make_trainer()
    assert trainer.evaluate(0) == 2.0
    assert trainer.evaluate(0) is None  # logged already
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert line == {
        "step": 0, "eval_loss": 2.0, "eval_perplexity": pytest.approx(np.e**2), "eval_tokens": 36, "eval_further": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize("synchronous", [True, False])
def test_the_progress_bar_agrees_with_the_log(tmp_path, make_trainer, saved, caplog, capsys, synchronous):
    caplog.set_level("INFO", logger="qlora_jax")
    trainer = make_trainer(synchronous=synchronous)
    shown = []
    real = trainer.log.write
    trainer.log.write = lambda line: (real(line), shown.append(trainer._bar and (trainer._bar._bar.n, line)))
    assert trainer.train()
    for n, line in filter(None, shown):
        assert n == line["step"]
    err = capsys.readouterr().err
    last = re.findall(r"(\d+)/12 \[[^\r]*?loss=([\d.]+), tok/s=(\d+)\]", err)[-1]
    assert last == ("12", f"{1 / 12:.4f}", f"{TOKENS / STEP:.0f}")


def test_nothing_is_printed_unless_messages_are_asked_for(tmp_path, make_trainer, saved, capfd):
    assert make_trainer().train()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_previous_steps_numbers_are_read_while_the_device_works(tmp_path, make_trainer, saved):
    trainer = make_trainer(synchronous=False, eval_steps=0, save_strategy="no")
    read = []
    real = trainer.log.write
    trainer.log.write = lambda line: (real(line), read.append((line["step"], trainer.programs.train.done)))
    assert trainer.train()
    # Of step 1 before step 2 is compiled for, no; shapes are alike: when step n + 1 has been dispatched.
    assert [(step, done) for step, done in read if step in range(1, 12)] == [(n, n + 1) for n in range(1, 12)]


def test_a_checkpoint_holds_the_counters_up_to_its_step(tmp_path, make_trainer, saved):
    trainer = make_trainer(synchronous=False, start=3)
    assert trainer.train()
    for step, position in saved.items():
        assert (position["tokens"], position["trained_tokens"]) == (TOKENS * step, 36 * step)
        assert position["data"] == {"epoch": (step - 3) // 10, "index": 4 * (step - 3) % 40}
        json.dumps(position)
    assert trainer.counters.tokens == 12 * TOKENS


@pytest.mark.parametrize("synchronous", [True, False])
def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(tmp_path, make_trainer, saved, synchronous):
    trainer = make_trainer(synchronous=synchronous, losses={6: float("nan")})
    with pytest.raises(NonFiniteLoss, match=r"^loss nan and gradient norm 1.0 at step 6 \(rows: row \d+, "):
        trainer.train()
    assert sorted(saved) == [3]
    assert max(line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")) == 5


def test_memory_that_does_not_suffice_is_explained(tmp_path, make_trainer, saved, monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.99GiB.")
    trainer = make_trainer(losses={5: error})
    memory = types.SimpleNamespace(peak=3 * 2**30)
    monkeypatch.setattr(ProgramMemory, "of", classmethod(lambda cls, program: memory))
    asked = []
    with (
        pytest.raises(ValueError, match="step 5 ran out of device memory") as raised,
        advised_out_of_memory(trainer.directory, lambda shape: asked.append(shape) or ["give less", "or more"]),
    ):
        trainer.train()
    assert asked == [(2, 2, 64)]
    assert isinstance(raised.value.__cause__, StepOutOfMemory)
    assert str(raised.value) == (
        "step 5 ran out of device memory on 2 x 2 rows of 64 tokens (its program alone takes 3.0 GiB); no checkpoint "
        "had been saved. What would need less:\n  give less\n  or more"
    )
    trainer = make_trainer(losses={1: jax.errors.JaxRuntimeError("INTERNAL: something else")})
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        trainer.train()


class FakeBar:
    """Stands for the progress bar, and keeps what it was shown."""

    def __init__(self, done, total):
        self.shown, self.closed = [], False
        FakeBar.last = self

    def show(self, step, **values):
        self.shown.append((step, values))

    def close(self):
        self.closed = True


@pytest.mark.parametrize("synchronous", [True, False])
def test_the_progress_bar_shows_what_the_log_has(tmp_path, make_trainer, saved, synchronous, monkeypatch):
    """To the last step, and at the steps that evaluate or save too."""
    monkeypatch.setattr(trainer_module, "ProgressBar", FakeBar)
    assert make_trainer(synchronous=synchronous).train()
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert FakeBar.last.shown == [
        (line["step"], {"loss": f"{line['loss']:.4f}", "tok/s": f"{TOKENS / STEP:.0f}"}) for line in lines
    ]
    assert FakeBar.last.closed


def test_throughput_pauses_and_restarts(clock):
    throughput = Throughput(tokens=100)
    clock.now = 2.0
    assert throughput.rate(160, 2.0) == 30.0
    with throughput.paused():
        clock.now = 50.0
    assert throughput.rate(160, 50.0) == 30.0
    throughput.restart(160, 50.0)
    clock.now = 54.0
    assert throughput.rate(200, 54.0) == 10.0
    with pytest.raises(KeyError), throughput.paused():
        clock.now = 60.0
        raise KeyError
    assert throughput.rate(200, 60.0) == 10.0


def test_moments_are_those_of_the_computation_not_of_the_reading():
    ready, read = threading.Event(), []

    class Slow:
        def block_until_ready(self):
            read.append(threading.current_thread() is threading.main_thread())
            ready.wait(10)

    with contextlib.closing(StepTimer()) as timer:
        moment = timer.moment(Slow())
        assert not moment.done()
        begin = time.perf_counter()
        ready.set()
        moment.result(10)
        after = time.perf_counter()
        time.sleep(0.05)
        assert begin <= moment.result() <= after
        assert read == [False]
        computed = timer.moment(jnp.ones(3)).result(10)
        assert after < computed <= time.perf_counter()
