"""The programs of a training step compiled for a GPU that need not be there, in a process of its own.

A compiler that aborts takes its process with it, and a process compiles Pallas kernels for one architecture only:
`Compiler` keeps a child that compiles one request after another, `compile_step` is what the child does.
"""

import collections
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax import gpus, models
from qlora_jax.data import Batch, abstract_batch
from qlora_jax.errors import UserError
from qlora_jax.nn.attention import cudnn_obstacle, head_groups
from qlora_jax.planner import (
    Allowance,
    BaseBytes,
    MatmulFlops,
    Phase,
    Program,
    StepCost,
    count_products,
    tree_bytes,
    visible_fraction,
)
from qlora_jax.planner.scopes import temporaries_by_scope
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.sharding import Devices
from qlora_jax.training import losses, setup
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import objective_of
from qlora_jax.training.step import TrainStep

_PLATFORM = "gpu"
# -P: a checkout in the working directory is not the installed package.
_COMMAND = (sys.executable, "-P", "-m", __name__)


class CompilationFailed(UserError):
    """The compiler refused a step, or its process ended."""


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """Attentions of a model that are alike, as they compile for a GPU.

    Attributes:
        layers: layers that have one.
        window: keys that a query sees; None for all.
        scores: shape of the scores [B, H, S, S] of as many heads as attend at a time; where cuDNN cannot do the
            attention, they exist in float32.
        obstacle: reason why it cannot; None if it can.
    """

    layers: int
    window: int | None
    scores: tuple[int, int, int, int]
    obstacle: str | None

    @property
    def score_bytes(self) -> int:
        """Bytes of the scores."""
        return 4 * math.prod(self.scores)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """Memory and least work of a training step compiled for a GPU.

    Attributes:
        phases: the programs of a step, with the device memory in use while each runs.
        host: class -> bytes of pinned host memory.
        work: least work of a step.
        attentions: what became of each kind of attention.
        cudnn: cuDNN is installed, without which it can do none.
    """

    phases: tuple[Phase, ...]
    host: Mapping[str, int]
    work: StepCost
    attentions: tuple[AttentionKind, ...]
    cudnn: bool

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CompiledStep":
        """Undo `dataclasses.asdict`."""
        attentions = (AttentionKind(**{**kind, "scores": tuple(kind["scores"])}) for kind in value["attentions"])
        return cls(
            phases=tuple(map(Phase.from_json, value["phases"])),
            host=value["host"],
            work=StepCost(**value["work"]),
            attentions=tuple(attentions),
            cudnn=value["cudnn"],
        )


@dataclasses.dataclass(frozen=True)
class _Declared:
    """A training step and its arguments, without weights.

    Attributes:
        shape: of a batch, [A, B, S].
        model: adapters in float32 and base; abstract.
        working: adapters in the optimizer's working dtype; abstract.
        batch: arrays of a batch; abstract.
        step: the step with its optimizer.
        devices: a mesh of the GPU alone; None for this machine's CPU.
    """

    shape: tuple[int, int, int]
    model: setup.ModelParts
    working: nnx.State
    batch: Batch
    step: TrainStep
    devices: Devices | None

    counter = jax.ShapeDtypeStruct((), jnp.int32)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Arguments of the gradient program."""
        return self.working, self.model.frozen, self.batch, self.counter


@dataclasses.dataclass(frozen=True)
class _StepBytes:
    """Bytes of the arrays of a step.

    Attributes:
        base: the base model.
        adapters: adapters in the optimizer's working dtype.
        gradients: float32 sums of the gradients.
        batch: a batch and the number of the step.
        optimizer_device, optimizer_host: the optimizer's state, by place.
        offloaded: activations on the host.
    """

    base: BaseBytes
    adapters: int
    gradients: int
    batch: int
    optimizer_device: int
    optimizer_host: int
    offloaded: int

    @property
    def resident(self) -> dict[str, int]:
        """Class -> bytes on the device throughout a step."""
        return {
            **self.base.by_class,
            "adapters": self.adapters,
            "optimizer_device": self.optimizer_device,
            "batch": self.batch,
        }

    @property
    def host(self) -> dict[str, int]:
        """Class -> bytes of pinned host memory."""
        return {"optimizer_host": self.optimizer_host, "offloaded_activations": self.offloaded}


def compile_step(config: TrainConfig, model_config: models.DecoderConfig, chip: gpus.Chip, length: int) -> CompiledStep:
    """Compile the training step of a run for one GPU, in this process.

    Args:
        config: the run; its micro-batch, accumulation and all else that shapes the step count.
        model_config: the model's shapes and constants.
        chip: the GPU.
        length: tokens of a sequence.

    Raises:
        UserError: a configuration or a model that no run could use, or no compiler for GPUs, see `gpus.compile_for`.
    """
    declared = _declare(config, model_config, length, chip)
    with tempfile.TemporaryDirectory() as dumped:
        gradients = _gradients(declared, chip, dumped)
    optimizer = declared.step.optimizer
    staying = optimizer.resident_chunks(gradients.peak)
    on_device = optimizer.resident_bytes(staying)
    memory = _StepBytes(
        base=BaseBytes.of(declared.model.frozen),
        adapters=tree_bytes(declared.working),
        gradients=tree_bytes(declared.model.lora),
        batch=tree_bytes((declared.batch, declared.counter)),
        optimizer_device=on_device,
        optimizer_host=optimizer.state_bytes - on_device,
        offloaded=gradients.host_temporaries,
    )
    # A paged chunk counts as an argument of the update; its transfer buffers are extra.
    passing = optimizer.paging_bytes if staying < len(optimizer.chunks) else 0
    during = {**memory.resident, "gradients": memory.gradients, "optimizer_passing": passing}
    updates = [Phase(program, during) for program in _updates(declared, chip)]
    return CompiledStep(
        phases=(
            Phase(gradients, memory.resident, {"gradients": memory.gradients}),
            max(updates, key=lambda phase: phase.device_bytes),
        ),
        host=memory.host,
        work=_least_work(config, model_config, declared.shape, memory),
        attentions=_attentions(config, model_config, declared.shape, chip),
        cudnn=importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cudnn") is not None,
    )


def _declare(
    config: TrainConfig, model_config: models.DecoderConfig, length: int, chip: gpus.Chip | None = None
) -> _Declared:
    """Declare a run's step for a GPU; without one, for this machine's CPU."""
    platform = None if chip is None else _PLATFORM
    model = setup.declare(config, model_config, platform).parts
    devices = None if chip is None else Devices(gpus.mesh(chip), model.rules)
    step = setup.make_step(
        config,
        model,
        config.max_steps,
        limit=None if chip is None else chip.memory_bytes - Allowance.of(chip).total,
        devices=devices,
        platform=platform,
    )
    shape = (config.gradient_accumulation_steps, config.per_device_train_batch_size, length)
    batch = abstract_batch(objective_of(config).fields, *shape)
    return _Declared(shape, model, step.optimizer.abstract_lora(), batch, step, devices)


def _gradients(declared: _Declared, chip: gpus.Chip, dumped: str) -> Program:
    """Compile the gradient program; XLA writes its buffer assignment into the directory `dumped`."""
    working, frozen, batch, counter = declared.arguments
    devices = declared.devices
    assert devices is not None
    arguments = (
        _placed(working, devices.shardings(working)),
        _placed(frozen, devices.shardings(frozen)),
        _placed(batch, devices.batch_sharding(3)),
        counter,
    )
    options = {"xla_dump_to": dumped}
    compiled = gpus.compile_for(chip, declared.step.gradient_step, *arguments, compiler_options=options)
    scopes = temporaries_by_scope(Path(dumped), compiled.as_text() or "")
    return Program.checked("gradients", compiled, arguments, scopes)


def _attentions(
    config: TrainConfig, model_config: models.DecoderConfig, shape: tuple[int, int, int], chip: gpus.Chip
) -> tuple[AttentionKind, ...]:
    """Ask of every kind of attention of a model if cuDNN can do it on a GPU."""
    (_, rows, length), dtype = shape, setup.compute_dtype(config, _PLATFORM)
    heads, kv_heads, width = model_config.heads
    q, k = (jax.ShapeDtypeStruct((rows, length, n, width), dtype) for n in (heads, kv_heads))
    mask = jax.ShapeDtypeStruct((rows, 1, length, length), jnp.bool_) if config.packing else None
    scores = (rows, heads // head_groups(rows * length, heads, kv_heads), length, length)
    found = []
    for facts, layers in collections.Counter(model_config.attentions).items():
        with gpus.tracing_for(chip):
            obstacle = cudnn_obstacle(q, k, k, facts, mask)
        found.append(AttentionKind(layers, facts.window, scores, obstacle))
    return tuple(found)


def _updates(declared: _Declared, chip: gpus.Chip) -> Iterator[Program]:
    """Compile the programs of an update, one for each shape that a chunk can have."""
    assert declared.devices is not None
    optimizer, seen = declared.step.optimizer, set()
    shardings = jax.tree.leaves(declared.devices.shardings(declared.working))
    for chunk in optimizer.chunks:
        arguments = _placed(optimizer.abstract_update(chunk), shardings[chunk.leaf])
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
        if shapes not in seen:
            seen.add(shapes)
            compiled = gpus.compile_for(chip, optimizer.update_program, *arguments, layers=chunk.layers)
            yield Program.checked("optimizer update", compiled, arguments)


def _placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with a sharding: one for all, or a tree of them."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def placed(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, tree, shardings)


def _least_work(
    config: TrainConfig, model_config: models.DecoderConfig, shape: tuple[int, int, int], memory: _StepBytes
) -> StepCost:
    """Count the products of a step in its XLA form, and every byte that it needs once a pass.

    Every token is taken to be trained on, and every attention score that causality and the sliding window show to be
    computed.
    """
    accumulated, rows, length = shape
    products = _products_of_a_micro_batch(config, model_config, length)
    # XLA's products are as large for every attention; a mean over them is what they need.
    attentions = model_config.attentions
    visible = sum(visible_fraction(length, facts) for facts in attentions) / len(attentions)
    weights = _passes(config) * (memory.base.linears + memory.adapters) + memory.base.head
    state = memory.optimizer_device + memory.optimizer_host
    return StepCost(
        tokens=accumulated * rows * length,
        flops=accumulated * (products.plain + visible * products.batched),
        # A step reads and writes the optimizer's state, and writes the adapters.
        device_bytes=accumulated * (weights + memory.gradients) + 2 * state + memory.adapters,
        host_bytes=accumulated * memory.offloaded + memory.optimizer_host,
    )


def _passes(config: TrainConfig) -> int:
    """Passes over the layers in a micro-batch: forward, backward and, unless activations are kept, forward again."""
    return 2 if config.remat_policy == "none" else 3


def _products_of_a_micro_batch(config: TrainConfig, model_config: models.DecoderConfig, length: int) -> MatmulFlops:
    # In float32 attention is XLA's too, whatever is installed.
    portable = dataclasses.replace(config, kernel="xla", bf16=False, gradient_accumulation_steps=1)
    declared = _declare(portable, model_config, length)
    traced = declared.step.gradient_step.trace(
        declared.working, declared.model.frozen, declared.batch, declared.counter
    )
    # The only loop without a stated number of iterations: chunks of trained tokens.
    tokens = math.prod(declared.shape)
    chunk = min(losses.default_chunk(model_config.vocab_size), tokens)
    return count_products(traced.jaxpr, trips=tokens / chunk)


class Compiler:
    """A child process that compiles training steps for one GPU; a context manager.

    The child is started by the first request, and again after one it did not survive.
    """

    def __init__(self, chip: gpus.Chip):
        self.chip = chip
        self._child: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")

    def __enter__(self) -> "Compiler":
        """Return the compiler; nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self._end()
        self._errors.close()

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            with self._child, contextlib.suppress(BrokenPipeError):  # closes its pipes and waits for it
                pass
            self._child = None

    def __call__(self, config: TrainConfig, model_config: models.DecoderConfig, length: int) -> CompiledStep:
        """Do what `compile_step` does for this GPU, in the child.

        Raises:
            UserError: as `compile_step`; CompilationFailed if the compiler refused the program or ended its process.
        """
        child = self._started()
        request = {
            "config": dataclasses.asdict(config),
            "model": model_config.source,
            "stored": [(name, dataclasses.asdict(storage)) for name, storage in model_config.stored],
            "gpu": self.chip.name,
            "length": length,
        }
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            cause = self._cause(child)
            self._end()
            raise CompilationFailed(
                f"the compiler ended its process ({cause}) over the step of {length} tokens for "
                f"{self.chip.name}; try another kernel, or report this."
            )
        value = json.loads(answer)
        if "failed" in value:
            raise CompilationFailed(
                f"the step of {length} tokens does not compile for {self.chip.name}: {value['failed']}"
            )
        if "error" in value:
            raise UserError(value["error"])
        return CompiledStep.from_json(value)

    def _started(self) -> subprocess.Popen[str]:
        if self._child is None:
            # On the CPU, so that a GPU that is here is left alone. A program from a cache comes without its dump.
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_ENABLE_COMPILATION_CACHE": "false",
                "TF_CPP_MIN_LOG_LEVEL": "2",
            }
            self._errors.seek(0)
            self._errors.truncate()
            self._child = subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
            )
        return self._child

    def _cause(self, child: subprocess.Popen[str]) -> str:
        code = child.wait()
        ended = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        # The last lines of LLVM and XLA are usually a stack; the cause is marked.
        told = [line for line in lines if "LLVM ERROR" in line or "Check fail" in line] or lines
        return ": ".join([ended, *told[-1:]])[:400]


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        config = TrainConfig(**request["config"])
        stored = tuple((name, QuantizationConfig(**storage)) for name, storage in request["stored"])
        model_config = dataclasses.replace(models.model_config(request["model"]), stored=stored)
        compiled = compile_step(config, model_config, gpus.chip_named(request["gpu"]), request["length"])
    except UserError as error:
        return {"error": str(error)}
    except (RuntimeError, ValueError, OverflowError, NotImplementedError) as error:
        return {"failed": (str(error).splitlines() or [""])[0][:400] or type(error).__name__}
    return dataclasses.asdict(compiled)


def _serve() -> None:
    """Answer requests, one JSON object a line, until standard input ends."""
    # Whatever else is printed here must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
