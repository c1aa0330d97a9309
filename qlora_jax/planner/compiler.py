"""The programs of a training step compiled for a GPU that need not be there, in a process of its own.

A compiler that aborts takes its process with it, and a process compiles Pallas kernels for one architecture only:
`Compiler` keeps a child that compiles one request after another, `compile_step` is what the child does.
"""

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
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax import gpus, models
from qlora_jax.data import abstract_batch
from qlora_jax.errors import UserError
from qlora_jax.optimizers import PagedOptimizer
from qlora_jax.planner import (
    Allowance,
    Phase,
    Program,
    StepCost,
    base_bytes,
    causal_fraction,
    count_products,
    tree_bytes,
)
from qlora_jax.training import losses, setup
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import objective_of
from qlora_jax.training.step import program_bytes

_PLATFORM = "gpu"
# -P: a checkout in the working directory is not the installed package.
_COMMAND = (sys.executable, "-P", "-m", __name__)
_LINEARS = frozenset(("base_packed", "scales", "unquantised_linear"))


class CompilationFailed(UserError):
    """The compiler could not take a step, or ended its process over it."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What compiling a training step for a GPU has shown.

    Attributes:
        phases: the programs of a step and what lies on the device while each runs.
        host: class -> bytes of pinned host memory.
        work: what a step must do at least.
        flash: attention is cuDNN's, which keeps no scores.
        cudnn: cuDNN is installed, without which it cannot be.
    """

    phases: tuple[Phase, ...]
    host: Mapping[str, int]
    work: StepCost
    flash: bool
    cudnn: bool

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CompiledStep":
        """What `dataclasses.asdict` made of one."""
        phases = tuple(map(Phase.from_json, value["phases"]))
        return cls(phases, value["host"], StepCost(**value["work"]), value["flash"], value["cudnn"])


def compile_step(config: TrainConfig, model_config: Mapping[str, Any], chip: gpus.Chip, length: int) -> CompiledStep:
    """Compile the training step of the flags for one GPU, in this process.

    Args:
        config: the flags; the micro-batch, the accumulation and all that shapes the step.
        model_config: contents of the model's config.json.
        chip: the GPU.
        length: tokens of a sequence.

    Raises:
        UserError: flags or a model that no run could use, or no compiler for GPUs, see `gpus.compile_for`.
    """
    lora_config = setup.find_adapters(config, model_config).config
    dtype = setup.compute_dtype(config, _PLATFORM)
    model = setup.declare_model(config, model_config, lora_config, dtype)
    lora, frozen = model.lora, model.frozen
    mesh = gpus.mesh(chip)
    limit = chip.memory_bytes - Allowance.of(chip).total
    step = setup.make_step(config, model, config.max_steps, limit=limit, mesh=mesh, platform=_PLATFORM)
    optimizer = step.optimizer
    shape = (config.gradient_accumulation_steps, config.per_device_train_batch_size, length)
    batch = abstract_batch(objective_of(config).fields, *shape)
    counter = jax.ShapeDtypeStruct((), jnp.int32)
    working = optimizer.abstract_lora()
    arguments = (*(_placed(tree, mesh) for tree in (working, frozen)), _placed(batch, mesh, None, "data"), counter)
    compiled = gpus.compile_for(chip, step.gradient_step, *arguments)
    gradients = tree_bytes(lora)

    needed = program_bytes(compiled)
    staying = optimizer.resident_chunks(needed)
    on_device = optimizer.resident_bytes(staying)
    paging = staying < len(optimizer.chunks)
    always = {
        **base_bytes(frozen),
        "adapters": tree_bytes(working),
        "optimizer_device": on_device,
        "batch": tree_bytes((batch, counter)),
    }
    gradient_program = Program.of("gradients", compiled, arguments)
    phases = [Phase(gradient_program, always, {"gradients": gradients})]
    # A chunk on its way is an argument of the update like one that stays; what it passes through is there besides.
    during = {**always, "gradients": gradients, "optimizer_passing": optimizer.paging_bytes if paging else 0}
    updates = [Phase(program, during) for program in _updates(optimizer, chip, mesh)]
    phases.append(max(updates, key=lambda phase: phase.device_bytes))
    host = {
        "optimizer_host": optimizer.state_bytes - on_device,
        "offloaded_activations": gradient_program.host_temporaries,
    }
    return CompiledStep(
        phases=tuple(phases),
        host=host,
        work=_work(config, model_config, shape, {**always, "gradients": gradients}, host),
        flash="__cudnn$fmha" in (compiled.as_text() or ""),
        cudnn=importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cudnn") is not None,
    )


def _updates(optimizer: PagedOptimizer, chip: gpus.Chip, mesh: jax.sharding.Mesh) -> Iterator[Program]:
    """The programs of an update, one for each shape that a chunk can have."""
    seen = set()
    for chunk in optimizer.chunks:
        arguments = _placed(optimizer.abstract_update(chunk), mesh)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
        if shapes not in seen:
            seen.add(shapes)
            compiled = gpus.compile_for(chip, optimizer.update_program, *arguments, layers=chunk.layers)
            yield Program.of("optimizer update", compiled, arguments)


def _placed(tree: Any, mesh: jax.sharding.Mesh, *spec: str | None) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _work(
    config: TrainConfig,
    model_config: Mapping[str, Any],
    shape: tuple[int, int, int],
    resident: Mapping[str, int],
    host: Mapping[str, int],
) -> StepCost:
    """The least a step can do: its products counted in the XLA form, every byte it needs moved once a pass.

    Every token is taken to be trained on, and every attention score to be computed that causality and the sliding
    window show.
    """
    # In float32 attention is XLA's too, whatever is installed.
    portable = dataclasses.replace(config, kernel="xla", bf16=False, gradient_accumulation_steps=1)
    lora_config = setup.find_adapters(portable, model_config).config
    model = setup.declare_model(portable, model_config, lora_config, jnp.float32)
    step = setup.make_step(portable, model, config.max_steps)
    # Micro-batches are alike: one is traced.
    accumulated, *one = shape
    batch = abstract_batch(objective_of(portable).fields, 1, *one)
    lora = step.optimizer.abstract_lora()
    traced = step.gradient_step.trace(lora, model.frozen, batch, jax.ShapeDtypeStruct((), jnp.int32))
    rows = math.prod(one)
    # The only loop without a stated number of iterations: chunks of trained tokens.
    shapes = models.model_config(model_config)
    products = count_products(traced.jaxpr, trips=rows / min(losses.default_chunk(shapes.vocab_size), rows))
    visible = causal_fraction(shape[2], shapes.sliding_window)

    weights = sum(count for name, count in resident.items() if name in _LINEARS)
    passes = 2 if config.remat_policy == "none" else 3
    head = resident.get("unquantised_head", resident["unquantised_embedding"])
    state = resident["optimizer_device"] + host["optimizer_host"]
    return StepCost(
        tokens=math.prod(shape),
        flops=accumulated * (products.plain + visible * products.batched),
        device_bytes=accumulated * (passes * (weights + resident["adapters"]) + head + resident["gradients"])
        + 2 * state
        + resident["adapters"],
        host_bytes=accumulated * host["offloaded_activations"] + host["optimizer_host"],
    )


class Compiler:
    """A child process that compiles training steps for one GPU; a context manager.

    The child is started by the first request, and again after one it did not survive.
    """

    def __init__(self, chip: gpus.Chip):
        self.chip = chip
        self._child: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")

    def __enter__(self) -> "Compiler":
        """Nothing is started yet."""
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

    def __call__(self, config: TrainConfig, model_config: Mapping[str, Any], length: int) -> CompiledStep:
        """What `compile_step` returns for this GPU.

        Raises:
            UserError: what it raises; CompilationFailed if the compiler refused the program or ended its process.
        """
        child = self._started()
        request = {"config": dataclasses.asdict(config), "model": model_config, "gpu": self.chip.name, "length": length}
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
                f"{self.chip.name}; try another --kernel, or report this."
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
            # On the CPU, so that a GPU that is here is left alone. A cached executable has no memory analysis.
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
        # What LLVM and XLA say last is usually a stack; what they died of is marked.
        told = [line for line in lines if "LLVM ERROR" in line or "Check fail" in line] or lines
        return ": ".join([ended, *told[-1:]])[:400]


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        config = TrainConfig(**request["config"])
        measured = compile_step(config, request["model"], gpus.chip_named(request["gpu"]), request["length"])
    except UserError as error:
        return {"error": str(error)}
    except (RuntimeError, ValueError, OverflowError, NotImplementedError) as error:
        return {"failed": (str(error).splitlines() or [""])[0][:400] or type(error).__name__}
    return dataclasses.asdict(measured)


def _serve() -> None:
    """Answer requests, one JSON object a line, until standard input ends."""
    # Whatever else is printed here must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
