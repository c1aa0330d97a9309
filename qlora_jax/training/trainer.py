"""The training loop: train, evaluate, save."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from qlora_jax import data
from qlora_jax.device_memory import ProgramMemory
from qlora_jax.optimizers import TransferStats
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.datasets import Datasets
from qlora_jax.training.failures import StepOutOfMemory, non_finite
from qlora_jax.training.model import Model
from qlora_jax.training.progress import ProgressBar, announced
from qlora_jax.training.reporting import MetricsLog, StepTimer, Stopwatch, Throughput
from qlora_jax.training.run_directory import RunDirectory
from qlora_jax.training.run_state import Counters, RunState, position
from qlora_jax.training.schedule import learning_rate_schedule
from qlora_jax.training.setup import Programs
from qlora_jax.training.signals import StopOnSignal
from qlora_jax.training.step import StepReport, TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DispatchedStep:
    """A step whose numbers have not been read: the device may still be at work on it.

    Attributes:
        step: its number.
        report: arrays to come.
        batch: on the host.
        tokens: of the run, up to and with this step.
        computed: moment at which the loss was there.
    """

    step: int
    report: StepReport
    batch: data.Batch
    tokens: int
    computed: concurrent.futures.Future[float]


class Trainer:
    """Trains, evaluates and saves one run.

    Attributes:
        state: adapters and optimizer state after the last step.
        start_step: steps that were done before.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        programs: Programs,
        datasets: Datasets,
        directory: RunDirectory,
        log: MetricsLog,
        start: RunState,
    ):
        self.config, self.model, self.programs = config, model, programs
        self.datasets, self.directory, self.log = datasets, directory, log
        self.state, self.start_step = start.state, start.step
        self.total_steps = datasets.total_steps
        self._schedule = learning_rate_schedule(config, self.total_steps)
        self._tokens, self._weight = start.counters.tokens, start.counters.trained_tokens
        self._watch, self._throughput = Stopwatch(start.counters.seconds), Throughput(self._tokens)
        self._dispatched: DispatchedStep | None = None
        self._transfers = TransferStats()  # since the last training line of the log
        self._bar: ProgressBar | None = None

    @property
    def counters(self) -> Counters:
        """Totals of the run so far."""
        return Counters(self._tokens, self._weight, self._watch.seconds)

    @property
    def masters(self) -> nnx.State:
        """The trained variables in float32."""
        return self.programs.train.optimizer.masters(self.state.lora, self.state.opt_state)

    def train(self) -> bool:
        """Train to the last step; False if a signal stopped the run early (its state is saved).

        Raises:
            NonFiniteLoss: a loss or gradient is not finite; nothing of it is saved.
            StepOutOfMemory: the device refused memory to a step.
        """
        with StopOnSignal() as stop, contextlib.closing(StepTimer()) as timer, self._progress_bar():
            if self.start_step and self._evaluation_due(self.start_step):
                self.evaluate(self.start_step)  # left out by the signal that stopped the run there
            self._throughput.restart(self._tokens, time.perf_counter())
            for step in range(self.start_step + 1, self.total_steps + 1):
                self._do_step(step, next(self.datasets.train), timer)
                # Before saving: whatever is logged up to a checkpoint is there when the run resumes from it.
                if self._evaluation_due(step) and not stop.requested:
                    self.evaluate(step)
                stopping = stop.requested and step < self.total_steps
                if stopping or (self.config.save_strategy == "steps" and step % self.config.save_steps == 0):
                    self.save(step)
                if stopping:
                    return False
            # If it was saved before the run was killed, what is beyond save_total_limit may still be there.
            self.save(self.total_steps)
        self.evaluate(self.total_steps)
        return True

    def evaluate(self, step: int) -> float | None:
        """Log the mean loss over the held-out rows with the present adapters and return it.

        None if there are no such rows, or if the log has that step.
        """
        self.flush_metrics()
        if not self.datasets.evaluation or step in self.log.evaluated:
            return None
        with self._training_paused(), announced("evaluating on the held-out rows", at_once=False):
            self.evict_optimizer_state()
            return self._evaluate(step)

    def save(self, step: int) -> Path:
        """Save a checkpoint: adapters, optimizer, data position, counters, and the adapter in PEFT's format."""
        with self._training_paused():
            masters = self.masters
            gathered = self.programs.train.optimizer.gather(self.state.opt_state)
            self.log.flush_to_disk()
            return self.directory.save(
                step,
                TrainState(masters, gathered, self.state.step),
                position(self.datasets.train, self.counters),
                functools.partial(self.model.write_adapter, masters, base_model_name=self.config.model_name_or_path),
            )

    def adapters_alone(self) -> nnx.State:
        """Return the adapters as the model reads them, once `evict_optimizer_state` has made room."""
        self.evict_optimizer_state()
        return self.state.lora

    def evict_optimizer_state(self) -> None:
        """Move all optimizer state that may page to the host: what evaluation and generation need is not known."""
        optimizer = self.programs.train.optimizer
        opt_state, moved = optimizer.evict(self.state.opt_state, optimizer.resident_chunks(math.inf))
        self.state = dataclasses.replace(self.state, opt_state=opt_state)
        self._transfers += moved

    def flush_metrics(self) -> None:
        """Wait for the step that was dispatched last, stop the run if its numbers are not finite, log them."""
        done, self._dispatched = self._dispatched, None
        if done is None:
            return
        with self._memory_errors(done.step, done.batch):
            loss, grad_norm = float(done.report.loss), float(done.report.grad_norm)
            computed = done.computed.result()
        self._weight += done.report.weight.item()
        self._transfers += done.report.transfers
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            found = f"loss {loss} and gradient norm {grad_norm}"
            raise non_finite(found, done.step, done.batch.example_ids, self.directory)
        rate = self._throughput.rate(done.tokens, computed)
        if self._bar is not None:
            self._bar.show(done.step, loss=f"{loss:.4f}", **{"tok/s": f"{rate:.0f}"})
        paging = _paging_line(self._transfers, self.programs.train.optimizer.host_bytes(self.state.opt_state))
        if done.step % self.config.logging_steps == 0 or done.step in (1, self.total_steps):
            numbers = {
                "step": done.step,
                "loss": loss,
                "learning_rate": self._learning_rate(done.step),
                "grad_norm": grad_norm,
                "tokens": done.tokens,
                "tokens_per_second": rate,
                "seconds": self._watch.seconds,
            }
            metrics = {name: value.item() for name, value in done.report.metrics.items()}
            self.log.write({**numbers, **metrics, **paging})
            self._throughput.restart(done.tokens, computed)
            self._transfers = TransferStats()
        elif self._transfers.evicted_bytes or self._transfers.returned_bytes:
            # Chunks that change their place are logged at once, not with the next line of losses.
            self.log.write({"step": done.step, **paging})
            self._transfers = TransferStats()

    def _do_step(self, step: int, batch: data.Batch, timer: StepTimer) -> None:
        placed = self._place(batch)
        program = self.programs.train
        with self._memory_errors(step, batch):
            if program.compiled(placed) is None:
                shape = " x ".join(map(str, placed.shape))
                with self._training_paused(), announced(f"compiling the training step for {shape} tokens"):
                    program.program(self.state.lora, self.model.parts.frozen, placed, self.state.step)
            self.state, report = program(self.state, self.model.parts.frozen, placed)
        # The previous step's numbers are read while the device works on this one.
        self.flush_metrics()
        self._tokens += batch.n_tokens
        self._dispatched = DispatchedStep(step, report, batch, self._tokens, timer.moment(report.loss))

    def _evaluate(self, step: int) -> float:
        sharding = self.programs.devices.batch_sharding()
        total, weight, further = 0.0, 0, collections.Counter[str]()
        for batch in self.datasets.evaluation:
            sums = self.programs.evaluate(self.state.lora, self.model.parts.frozen, jax.device_put(batch, sharding))
            if not math.isfinite(sums.loss):
                raise non_finite(f"held-out loss {float(sums.loss)}", step, batch.example_ids, self.directory)
            total, weight = total + float(sums.loss), weight + sums.weight.item()
            further.update({name: value.item() for name, value in sums.metrics.items()})
        loss, objective = total / weight, self.programs.objective
        numbers: dict[str, Any] = {"loss": loss, **objective.derived(loss), objective.unit: weight}
        numbers |= {name: value / weight for name, value in further.items()}
        self.log.write({"step": step, **{f"eval_{name}": value for name, value in numbers.items()}})
        logger.info("step %d: held-out loss %.4f (%s %s)", step, loss, weight, objective.unit)
        return loss

    def _place(self, batch: data.Batch) -> data.Batch:
        """Put a batch on the mesh, as arrays [A, B, ...] with B split over its devices."""
        micro_batches = self.config.gradient_accumulation_steps
        sharding = self.programs.devices.batch_sharding(3)
        arrays = jax.tree.map(lambda array: array.reshape(micro_batches, -1, *array.shape[1:]), batch)
        return jax.device_put(arrays, sharding)

    @contextlib.contextmanager
    def _training_paused(self) -> Iterator[None]:
        """Wait for all steps; the block is no training time."""
        self.flush_metrics()
        jax.block_until_ready(self.state)
        with self._throughput.paused():
            yield

    def _evaluation_due(self, step: int) -> bool:
        return self.config.eval_steps > 0 and step % self.config.eval_steps == 0 and step < self.total_steps

    def _learning_rate(self, step: int) -> float:
        # On the host: on an accelerator the number would wait in line behind the step that was just dispatched.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return float(self._schedule(step - 1))

    @contextlib.contextmanager
    def _progress_bar(self) -> Iterator[None]:
        with contextlib.closing(ProgressBar(self.start_step, self.total_steps)) as self._bar:
            try:
                yield
            finally:
                self._bar = None

    @contextlib.contextmanager
    def _memory_errors(self, step: int, batch: data.Batch) -> Iterator[None]:
        """Raise StepOutOfMemory where the device refuses memory."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            micro_batches = self.config.gradient_accumulation_steps
            rows, length = batch.shape
            shape = (micro_batches, rows // micro_batches, length)
            program = self.programs.train.compiled(data.abstract_batch(self.programs.objective.fields, *shape))
            raise StepOutOfMemory(step, shape, None if program is None else ProgramMemory.of(program).peak) from error


def _paging_line(transfers: TransferStats, host_bytes: int) -> Mapping[str, Any]:
    """Return paging counters since the last logged line; empty if no chunk moved."""
    line: dict[str, Any] = {"optimizer_on_host_bytes": host_bytes}
    for name in ("evicted_bytes", "returned_bytes", "paged_bytes"):
        line[name] = getattr(transfers, name)
    line["paging_seconds"] = transfers.seconds
    return {name: value for name, value in line.items() if value}
