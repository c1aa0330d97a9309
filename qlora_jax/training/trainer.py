"""A fine-tuning run from flags to saved adapters: load, adapt, train, evaluate, save, resume."""

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from qlora_jax import data, kernels, models
from qlora_jax.checkpoints.loading import LoadedBase, load_base
from qlora_jax.checkpoints.peft import save_adapter
from qlora_jax.checkpoints.streaming import inventory
from qlora_jax.defaults import DEFAULT_DATASET
from qlora_jax.device_memory import ProgramMemory, device_limit, device_peak
from qlora_jax.errors import UserError
from qlora_jax.formatting import format_bytes
from qlora_jax.generation import Sampling, generate
from qlora_jax.nn.linear import LoRAConfig
from qlora_jax.optimizers import PagedOptimizer, TransferStats
from qlora_jax.quantization import QuantizedTensor
from qlora_jax.training import setup
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import objective_of
from qlora_jax.training.reporting import METRICS_FILE, MetricsLog, Stopwatch, read_metrics
from qlora_jax.training.run_directory import RunDirectory
from qlora_jax.training.schedule import learning_rate_schedule
from qlora_jax.training.step import StepReport, TrainState, make_eval_step

logger = logging.getLogger(__name__)


class NonFiniteLoss(UserError):
    """Training met a loss or gradient that is not a number or infinite."""


class OutOfMemory(UserError):
    """A training step needed more memory than the device had left."""


@dataclasses.dataclass(frozen=True)
class Datasets:
    """Training batches (resumable) and evaluation batches of a run, with what is to be said about them."""

    train: data.Batches
    evaluation: Sequence[data.Batch]
    dataset_format: str
    reports: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to train: structure, adapters (float32) and frozen base weights, placed on the mesh.

    A `Trainer` takes the adapters over; they may be gone afterwards.
    """

    parts: setup.ModelParts
    base: LoadedBase
    adapters: LoRAConfig


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        summary: the contents of summary.json.
        answers: (prompt, answer before training, answer after), empty if the run was interrupted.
        interrupted: stopped by a signal; the same command resumes it.
    """

    summary: dict[str, Any]
    answers: list[tuple[str, str, str]]
    interrupted: bool


def make_mesh() -> jax.sharding.Mesh:
    """All devices on one axis, `data`: sequences are split over it, weights and adapters replicated."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def load_datasets(config: TrainConfig, tokenizer: Any) -> Datasets:
    """Read, split, tokenise and batch the data of a run."""
    objective = objective_of(config)
    mode = "packing" if config.packing else "group_by_length" if config.group_by_length else "plain"
    batching = {
        "mode": mode,
        "pad_id": tokenizer.pad_token_id,
        "sequence_length": config.packed_length,
        "fields": objective.fields,
    }

    rows, held_out, reports = data.load_rows(config.dataset), None, []
    if config.do_eval and config.eval_dataset is not None:
        held_out = data.load_rows(config.eval_dataset)
    elif config.do_eval and config.dataset == DEFAULT_DATASET:
        held_out = data.load_rows(DEFAULT_DATASET, split="heldout")
    elif config.do_eval:
        rows, held_out, note = data.split_rows(rows, config.eval_dataset_size, seed=config.seed)
        reports.append(note)
    if config.max_train_samples is not None:
        rows = rows.select(range(min(len(rows), config.max_train_samples)))
    examples, report = objective.examples(rows, tokenizer, config)
    reports.append(str(report))
    rows_a_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * jax.device_count()
    train = data.Batches(examples, batch_size=rows_a_step, seed=config.seed, **batching)

    evaluation: list[data.Batch] = []
    if held_out is not None and len(held_out):
        if config.max_eval_samples is not None:
            held_out = held_out.select(range(min(len(held_out), config.max_eval_samples)))
        eval_examples, eval_report = objective.examples(held_out, tokenizer, config)
        reports.append(str(eval_report))
        eval_rows = config.per_device_eval_batch_size * jax.device_count()
        evaluation = data.evaluation_batches(eval_examples, batch_size=eval_rows, **batching)
    return Datasets(train, evaluation, report.dataset_format, tuple(reports))


def load_model(config: TrainConfig, path: Path, mesh: jax.sharding.Mesh) -> Model:
    """Load and quantise the base model and set up its adapters: fresh ones, or those of --adapter."""
    dtype = setup.compute_dtype(config)
    base = load_base(path, quantization=setup.quantization_config(config), dtype=dtype)
    adapters = setup.find_adapters(config, base.config)
    declared = setup.declare_model(config, base.config, adapters.config, dtype)
    if adapters.tensors is None:
        lora = models.initialize(declared.lora, jax.random.key(config.seed))
    else:
        logger.info(
            "adapter %s: rank %d, alpha %g, on %s (its own, not those of the configuration)",
            config.adapter, adapters.config.rank, adapters.config.alpha, ", ".join(adapters.config.modules),
        )  # fmt: skip
        lora = models.unflatten_like(declared.lora, adapters.tensors, what=f"adapter {config.adapter}")
    replicated = NamedSharding(mesh, PartitionSpec())
    frozen = models.fill_base(declared.frozen, base.tensors)
    parts = dataclasses.replace(
        declared, lora=jax.device_put(lora, replicated), frozen=jax.device_put(frozen, replicated)
    )
    return Model(parts, base, adapters.config)


def longest_batch(config: TrainConfig, datasets: Datasets) -> tuple[int, int]:
    """(sequences, tokens of each) that a device takes through the model at once, of the longest training batch."""
    rows, length = max(datasets.train.shapes())
    return rows // config.gradient_accumulation_steps // jax.device_count(), length


def kernel_choices(config: TrainConfig, model: Model, datasets: Datasets) -> list[str]:
    """Describe the implementation of the 4-bit products on a device's rows of the longest training batch."""
    rows, length = longest_batch(config, datasets)
    weights = {
        ".".join(name for name in path if name not in ("layers", "weight")): value
        for path, value in models.flatten(model.parts.frozen).items()
    }
    dtype = setup.compute_dtype(config)
    return kernels.describe(kernels.resolve(weights, [rows * length], dtype, implementation=config.kernel))


class Trainer:
    """One run: owns the state, the data position, the log and the directory.

    `advise` says, of the run's flags and a batch shape [A, B, S] that ran out of memory, what would help.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        datasets: Datasets,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        advise: Callable[[TrainConfig, tuple[int, ...]], list[str]],
    ):
        self.advise = advise
        self.config, self.model, self.datasets, self.tokenizer, self.mesh = config, model, datasets, tokenizer, mesh
        self.total_steps = config.max_steps if config.do_train else 0
        if config.do_train and config.num_train_epochs is not None:
            self.total_steps = math.ceil(config.num_train_epochs * datasets.train.batches_per_epoch)
        self.schedule = learning_rate_schedule(config, self.total_steps)
        # Counted on one device: all hold the same.
        limit = device_limit(jax.local_devices()[0])
        self.train_step = setup.make_step(config, model.parts, self.total_steps, limit=limit, mesh=mesh)
        self.optimizer = self.train_step.optimizer
        self.objective = objective_of(config)
        self.eval_step = make_eval_step(
            model.parts.graphdef, objective=self.objective, reference=model.parts.reference, mesh=mesh
        )
        identity = {
            "data": datasets.train.fingerprint,
            "compute_dtype": jnp.dtype(setup.compute_dtype(config)).name,
            "devices": jax.device_count(),
            "adapters": [model.adapters.rank, model.adapters.alpha, *model.adapters.modules],
        }
        self.directory = RunDirectory.open(config, identity)
        self.summary_file = self.directory.path / "summary.json"
        # Placed before the first step: a step compiled for other shardings would be compiled twice.
        replicated = NamedSharding(mesh, PartitionSpec())
        # How far the run is; saved with every checkpoint.
        self.tokens = self.trained_tokens = 0
        self.start_step, seconds = 0, 0.0
        if self.directory.checkpoints():
            self.start_step = self.directory.checkpoints()[-1]
            finished = self.start_step == self.total_steps and self.summary_file.exists()
            if finished or self.start_step > self.total_steps:
                raise UserError(
                    f"`output_dir={config.output_dir}` holds a finished run of {self.start_step} steps; "
                    "give another `output_dir`, or `overwrite_output_dir` to delete it."
                )
            # No state is made beside the one that is read: the two would not always fit.
            jax.tree.map(lambda leaf: leaf.delete(), model.parts.lora)
            abstract = TrainState(*self.optimizer.abstract(), jax.ShapeDtypeStruct((), jnp.int32))
            saved, position = self.directory.restore(self.start_step, abstract)
            lora, opt_state = self.optimizer.scatter(saved.lora, saved.opt_state, replicated)
            self.state = TrainState(lora, opt_state, jax.device_put(saved.step, replicated))
            datasets.train.restore(position["data"])
            self.tokens, self.trained_tokens = position["tokens"], position["trained_tokens"]
            seconds = position["seconds"]
        else:
            state = TrainState.create(model.parts.lora, self.optimizer)
            self.state = dataclasses.replace(state, step=jax.device_put(state.step, replicated))
        self.log = MetricsLog(self.directory.path, config, self.start_step)
        self.watch = Stopwatch(seconds)
        self._pending: tuple[int, StepReport, data.Batch] | None = None
        self._since = (self.watch.seconds, self.tokens)
        self._traffic = TransferStats()  # since the last line of the log
        self.last: dict[str, str] = {}

    def train(self) -> bool:
        """Train to the last step; False if a signal stopped the run early (its state is saved)."""
        with _StopOnSignal() as stop, self._progress() as bar:
            if self.start_step and self._evaluation_due(self.start_step):
                self.evaluate(self.start_step)  # left out by the signal that stopped the run there
            for step in range(self.start_step + 1, self.total_steps + 1):
                batch = next(self.datasets.train)
                with self._memory_errors(step, batch):
                    self.state, report = self.train_step(self.state, self.model.parts.frozen, self._device_batch(batch))
                # The previous step's numbers are read while the device works on this one.
                self._drain()
                self._pending = (step, report, batch)
                self.tokens += batch.n_tokens
                bar.update()
                bar.set_postfix(self.last, refresh=False)
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

    def _evaluation_due(self, step: int) -> bool:
        return self.config.eval_steps > 0 and step % self.config.eval_steps == 0 and step < self.total_steps

    def _progress(self) -> tqdm:
        interactive = sys.stderr.isatty()
        return tqdm(
            total=self.total_steps,
            initial=self.start_step,
            desc="training",
            unit="step",
            mininterval=0.1 if interactive else 10.0,
        )

    def _device_batch(self, batch: data.Batch) -> data.Batch:
        """Put a batch on the mesh, as arrays [A, B, ...] with B split over its devices."""
        accumulate = self.config.gradient_accumulation_steps
        sharding = NamedSharding(self.mesh, PartitionSpec(None, "data"))
        return jax.device_put(
            jax.tree.map(lambda array: array.reshape(accumulate, -1, *array.shape[1:]), batch), sharding
        )

    def _drain(self) -> None:
        """Read the numbers of the step that was dispatched last, stop if they are not finite, log them."""
        if self._pending is None:
            return
        step, report, batch = self._pending
        self._pending = None
        with self._memory_errors(step, batch):
            loss, grad_norm = float(report.loss), float(report.grad_norm)
        self.trained_tokens += report.weight.item()
        self._traffic += report.transfers
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._not_finite(f"loss {loss} and gradient norm {grad_norm}", step, batch)
        seconds, tokens = self.watch.seconds, self.tokens
        rate = (tokens - self._since[1]) / max(seconds - self._since[0], 1e-9)
        paging = _paging_line(self._traffic, self.optimizer.host_bytes(self.state.opt_state))
        self.last = {"loss": f"{loss:.4f}", "tok/s": f"{rate:.0f}"}
        if step % self.config.logging_steps == 0 or step in (1, self.total_steps):
            self.log.write(
                {
                    "step": step,
                    "loss": loss,
                    "learning_rate": self._learning_rate(step),
                    "grad_norm": grad_norm,
                    "tokens": tokens,
                    "tokens_per_second": rate,
                    "seconds": seconds,
                    **{name: float(value) for name, value in report.metrics.items()},
                    **paging,
                }
            )
            self._since = (seconds, tokens)
            self._traffic = TransferStats()
        elif self._traffic.evicted_bytes or self._traffic.returned_bytes:
            # Chunks that change their place are told at once, not with the next line of losses.
            self.log.write({"step": step, **paging})
            self._traffic = TransferStats()

    def _learning_rate(self, step: int) -> float:
        # On the host: on an accelerator the number would wait in line behind the step that was just dispatched.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return float(self.schedule(step - 1))

    def _last_checkpoint(self) -> str:
        saved = self.directory.checkpoints()
        if not saved:
            return "no checkpoint had been saved"
        return f"the last good checkpoint is {self.directory.checkpoint_path(saved[-1])}"

    def _not_finite(self, what: str, step: int, batch: data.Batch) -> NonFiniteLoss:
        return NonFiniteLoss(
            f"{what} at step {step} (rows: {', '.join(batch.example_ids)}); {self._last_checkpoint()}. "
            "Lower `learning_rate`, or look at those rows."
        )

    @contextlib.contextmanager
    def _memory_errors(self, step: int, batch: data.Batch) -> Iterator[None]:
        """Turn the device's refusal of memory into one sentence, and say what would help."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            micro_batches = self.config.gradient_accumulation_steps
            rows, length = batch.shape
            shape = (micro_batches, rows // micro_batches, length)
            program = self.train_step.compiled(data.abstract_batch(self.objective.fields, *shape))
            needs = (
                "" if program is None else f" (its program alone takes {format_bytes(ProgramMemory.of(program).peak)})"
            )
            advice = "".join(f"\n  {line}" for line in self.advise(self.config, shape))
            raise OutOfMemory(
                f"step {step} ran out of device memory on {micro_batches} x {shape[1]} rows of {length} tokens{needs}; "
                f"{self._last_checkpoint()}. What would need less:{advice}"
            ) from error

    def evaluate(self, step: int) -> float | None:
        """Mean loss over the held-out rows with the present adapters, logged; None if there are none, or it was."""
        self._drain()
        if not self.datasets.evaluation or step in self.log.evaluated:
            return None
        self._make_room()
        sharding = NamedSharding(self.mesh, PartitionSpec("data"))
        total, weight, further = 0.0, 0, collections.Counter[str]()
        for batch in self.datasets.evaluation:
            sums = self.eval_step(self.state.lora, self.model.parts.frozen, jax.device_put(batch, sharding))
            if not math.isfinite(sums.loss):
                raise self._not_finite(f"held-out loss {float(sums.loss)}", step, batch)
            total, weight = total + float(sums.loss), weight + sums.weight.item()
            further.update({name: value.item() for name, value in sums.metrics.items()})
        loss, unit = total / weight, self.objective.unit
        numbers = {"loss": loss, **self.objective.derived(loss), unit: weight}
        numbers |= {name: value / weight for name, value in further.items()}
        self.log.write({"step": step, **{f"eval_{name}": value for name, value in numbers.items()}})
        logger.info("step %d: held-out loss %.4f (%s %s)", step, loss, weight, unit)
        # Evaluation is no training time.
        self._since = (self.watch.seconds, self.tokens)
        return loss

    def _make_room(self) -> None:
        """Give evaluation and generation all the memory that paging can: what they need is not known ahead."""
        resident = self.optimizer.resident_chunks(math.inf)
        opt_state, traffic = self.optimizer.evict(self.state.opt_state, resident)
        self.state = dataclasses.replace(self.state, opt_state=opt_state)
        self._traffic += traffic

    def save(self, step: int) -> Path:
        """Save a checkpoint: adapters, optimizer, data position, counters, and the adapter in PEFT's format."""
        self._drain()
        position = {
            "data": self.datasets.train.state(),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "seconds": self.watch.seconds,
        }
        masters = self.optimizer.masters(self.state.lora, self.state.opt_state)
        whole = TrainState(masters, self.optimizer.gather(self.state.opt_state), self.state.step)
        return self.directory.save(step, whole, position, functools.partial(self._write_adapter, masters))

    def write_adapter(self, directory: Path) -> None:
        """Write the present adapters in PEFT's format."""
        self._write_adapter(self.optimizer.masters(self.state.lora, self.state.opt_state), directory)

    def _write_adapter(self, masters: nnx.State, directory: Path) -> None:
        adapters = self.model.adapters
        save_adapter(
            directory,
            models.flatten(masters),
            rank=adapters.rank,
            alpha=adapters.alpha,
            dropout=adapters.dropout,
            target_modules=adapters.modules,
            base_model_name=self.config.model_name_or_path,
        )

    def answer(self, prompts: Sequence[str]) -> list[str]:
        """The model's answers with the present adapters."""
        if not prompts:
            return []
        self._make_room()
        tokenizer, config = self.tokenizer, self.config
        encoded = [
            data.encode_prompt(prompt, tokenizer=tokenizer, dataset_format=self.datasets.dataset_format).tolist()
            for prompt in prompts
        ]
        stop = self.model.base.config.get("eos_token_id")
        stop = stop if isinstance(stop, list) else [stop]
        tokens = generate(
            self.model.parts.graphdef,
            self.state.lora,
            self.model.parts.frozen,
            encoded,
            eos_ids=sorted({tokenizer.eos_token_id, *stop} - {None}),
            sampling=Sampling(config.max_new_tokens, config.do_sample, config.temperature, config.top_k, config.top_p),
            seed=config.seed,
        )
        return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]

    def summary(self) -> dict[str, Any]:
        """What summary.json holds; bytes and parameters are counted from the buffers."""
        metrics = read_metrics(self.directory.path / METRICS_FILE)
        losses = [line["loss"] for line in metrics if "loss" in line]
        held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
        return {
            "model": self.config.model_name_or_path,
            "base": self.model.base.description,
            "adapter": str(self.directory.path / "adapter") if self.config.do_train else self.config.adapter,
            "steps": int(self.state.step),
            "epochs": self.datasets.train.epoch,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "seconds": self.watch.seconds,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "first_eval_loss": held_out[0] if held_out else None,
            "last_eval_loss": held_out[-1] if held_out else None,
            "step_shapes_compiled": len(self.train_step.programs),
            "planned_peak_bytes": self.train_step.planned_bytes or None,
            # Of the whole process: loading, evaluation and answers count too.
            "measured_peak_bytes": device_peak(jax.local_devices()[0]),
            **memory(self.model, self.state, self.optimizer),
        }


def memory(model: Model, state: TrainState, optimizer: PagedOptimizer) -> dict[str, Any]:
    """Parameters, bits a parameter and bytes by class, counted from the buffers that training holds.

    The classes: those of `inventory`; adapters as the model reads them; the optimizer's state, float32 masters included
    where the adapters are 16-bit, on device and host.
    """
    base = models.flatten(model.parts.frozen)
    quantized = sum(
        math.prod((*value.stack_shape, *value.shape)) for value in base.values() if isinstance(value, QuantizedTensor)
    )
    other = sum(value.size for value in base.values() if not isinstance(value, QuantizedTensor))
    trainable = sum(leaf.size for leaf in jax.tree.leaves(state.lora))
    sizes, on_host = inventory(base), optimizer.host_bytes(state.opt_state)
    bits = 8 * (sizes["base_packed"] + sizes["scales"]) / quantized if quantized else None
    return {
        "trainable_parameters": trainable,
        "total_parameters": quantized + other + trainable,
        "bits_per_quantized_parameter": bits,
        "bytes": {
            **sizes,
            "adapters": sum(leaf.nbytes for leaf in jax.tree.leaves(state.lora)),
            "optimizer_on_device": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) - on_host,
            "optimizer_on_host": on_host,
        },
    }


def _paging_line(traffic: TransferStats, host_bytes: int) -> dict[str, Any]:
    """What a line of metrics.jsonl says of paging since the line before; nothing where nothing paged."""
    line: dict[str, Any] = {"optimizer_on_host_bytes": host_bytes}
    for name in ("evicted_bytes", "returned_bytes", "paged_bytes"):
        line[name] = getattr(traffic, name)
    line["paging_seconds"] = traffic.seconds
    return {name: value for name, value in line.items() if value}


class _StopOnSignal:
    """While entered, the first SIGINT or SIGTERM asks for a stop after the current step; a second one acts at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_StopOnSignal":
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        logger.info("%s: saving after this step; send it again to stop at once", signal.Signals(number).name)
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
