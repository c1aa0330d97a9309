"""The training step: gradients of what is trained, one update of it by the paged optimizer, and its evaluation."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.choices import Remat
from qlora_jax.device_memory import PINNED_LIMIT_VARIABLE, ProgramMemory, pinned_limit
from qlora_jax.errors import UserError
from qlora_jax.kernels.xla import WIDE_VECTORS
from qlora_jax.nn.variables import GradientSlot
from qlora_jax.optimizers import PagedOptimizer, TransferStats
from qlora_jax.optimizers.paged import ChunkState
from qlora_jax.sharding import Devices, specs
from qlora_jax.training.config import StepConfig
from qlora_jax.training.objectives import NEXT_TOKEN, Objective, Sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes; the base model is not part of it.

    Attributes:
        lora: the trained variables that the model reads, in the optimizer's working dtype.
        opt_state: state of `PagedOptimizer`, a `ChunkState` a chunk, float32 masters included; or, in a checkpoint,
            what `PagedOptimizer.gather` makes of it.
        step: int32 [], updates done.
    """

    lora: nnx.State | Any
    opt_state: list[ChunkState] | Any
    step: Int[Array, ""] | Any

    @classmethod
    def create(cls, lora: nnx.State, optimizer: PagedOptimizer) -> "TrainState":
        """Make the state before the first step. `lora` is float32; with another working dtype, it is deleted."""
        return cls(*optimizer.init(lora), jnp.zeros((), jnp.int32))


class StepMetrics(NamedTuple):
    """Scalars that the gradient program returns beside the gradients.

    Attributes:
        loss: mean over the weight of all A*B rows.
        grad_norm: of the mean gradient, before clipping.
        weight: the divisor of all means.
        metrics: further means of the objective.
        scale: the clipped mean gradient is the gradient sums times this.
        finite: loss and gradient norm are finite.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    weight: Array
    metrics: dict[str, Array]
    scale: Float[Array, ""]
    finite: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """Result of a step beside the new state: arrays that may still be computed, and what paging moved."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    weight: Array
    metrics: dict[str, Array]
    transfers: TransferStats


@dataclasses.dataclass(frozen=True)
class _LocalSums:
    """`Objective.sums` of a batch on one device, from split states."""

    graphdef: nnx.GraphDef
    objective: Objective
    remat: Remat
    reference: nnx.GraphDef | None

    def __call__(
        self, lora: nnx.State, frozen: nnx.State, batch: Mapping[str, Array], dropout_key: Array | None
    ) -> Sums:
        model = nnx.merge(self.graphdef, lora, frozen)
        reference = None
        if self.objective.uses_reference:
            assert self.reference is not None
            # The same frozen weights: nothing is stored twice.
            reference = nnx.merge(self.reference, nnx.State({}), frozen)
        return self.objective.sums(model, batch, dropout_key=dropout_key, remat=self.remat, reference=reference)


def _on_every_device(sums: Callable[..., Any], devices: Devices | None, dims: int) -> Callable[..., Any]:
    """Map `sums(lora, frozen, batch, key)` over the devices' rows and add the results up over the batch's mesh axis.

    Every device runs the whole model: in a single program for all rows, XLA could not partition the calls of kernels
    and would send every row to every device.
    """
    if devices is None or devices.mesh.size == 1:
        return sums
    mesh, rules = devices.mesh, devices.rules

    def local(*arguments: Any) -> Any:
        return jax.lax.psum(sums(*arguments), rules.batch)

    def mapped(lora: nnx.State, frozen: nnx.State, batch: Any, key: Any) -> Any:
        in_specs = (specs(lora, rules), specs(frozen, rules), rules.batch_spec(dims), PartitionSpec())
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False)(
            lora, frozen, batch, key
        )

    return mapped


# Of every platform that a program may be compiled for.
_COMPILER_OPTIONS: dict[str, str | bool | int | float] = {
    **WIDE_VECTORS,
    # Without it a GPU waits for every tile that comes from host memory, instead of working on the one before.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}


def make_gradient_step(
    graphdef: nnx.GraphDef,
    config: StepConfig,
    *,
    objective: Objective = NEXT_TOKEN,
    reference: nnx.GraphDef | None = None,
    devices: Devices | None = None,
) -> Callable[[nnx.State, nnx.State, Mapping[str, Array], Array], tuple[nnx.State, StepMetrics]]:
    """Make a jitted `gradients(lora, frozen, batch, step)` -> (gradient sums, metrics), most of a training step.

    Args:
        graphdef: of the model, from `split_model`.
        config: settings of the step.
        objective: its sums are differentiated.
        reference: of the model without adapters, for an objective that reads it.
        devices: over which B is split, and how the weights are cut over them.

    The batch holds the objective's fields with a leading axis of micro-batches, e.g. int32 [A, B, S]. Gradients are
    those of the summed loss, float32 in the shapes of `lora` whatever its dtype; the micro-batches add to them in
    place.
    """
    local_sums = _LocalSums(graphdef, objective, config.remat, reference)
    micro_batches = config.micro_batches

    def sums(
        lora: nnx.State, frozen: nnx.State, batch: Mapping[str, Array], key: Array | None
    ) -> tuple[nnx.State, Sums]:
        with jax.named_scope("gradient_accumulation"):
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), lora)
            totals = jax.tree.map(jax.new_ref, zeros)

        def micro(index: Array | int, micro_batch: Mapping[str, Array]) -> Sums:
            micro_key = None if key is None else jax.random.fold_in(key, index)
            if micro_key is not None and devices is not None and devices.mesh.size > 1:
                micro_key = jax.random.fold_in(micro_key, jax.lax.axis_index(devices.rules.batch))

            def loss_sum(slots: nnx.State) -> tuple[Array, Sums]:
                adapters = jax.tree.map(GradientSlot, lora, slots)
                found = local_sums(adapters, frozen, micro_batch, micro_key)
                return found.loss, found

            loss, backward, found = jax.vjp(loss_sum, zeros, has_aux=True)
            # Each layer's gradient is added where the total lies: no second tree of gradients exists.
            backward.with_refs(totals)(jnp.ones_like(loss))  # type: ignore[attr-defined]  # of the function it declares
            return found

        if micro_batches == 1:
            found = micro(0, jax.tree.map(lambda array: array[0], batch))
        else:

            def accumulate(carry: Sums, xs: Any) -> tuple[Sums, None]:
                return jax.tree.map(jnp.add, carry, micro(*xs)), None

            first = jax.tree.map(lambda array: array[0], batch)
            shapes = jax.eval_shape(local_sums, lora, frozen, first, key)
            start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            found, _ = jax.lax.scan(accumulate, start, (jnp.arange(micro_batches), batch))
        with jax.named_scope("gradient_accumulation"):
            return jax.tree.map(jax.freeze, totals), found

    def gradients(
        lora: nnx.State, frozen: nnx.State, batch: Mapping[str, Array], step: Array
    ) -> tuple[nnx.State, StepMetrics]:
        _check_micro_batches(batch, micro_batches)
        key = jax.random.fold_in(jax.random.key(config.seed), step) if config.dropout else None
        grads, found = _on_every_device(sums, devices, 3)(lora, frozen, batch, key)
        unclipped = 1.0 / jnp.where(found.weight > 0, found.weight, 1)
        grad_norm = optax.tree.norm(grads) * unclipped
        scale = unclipped
        if config.max_grad_norm:
            clipped = unclipped * (config.max_grad_norm / grad_norm)
            scale = jnp.where(grad_norm < config.max_grad_norm, unclipped, clipped)
        return grads, StepMetrics(
            loss=found.loss * unclipped,
            grad_norm=grad_norm,
            weight=found.weight,
            metrics={name: value * unclipped for name, value in found.metrics.items()},
            scale=scale,
            finite=jnp.isfinite(found.loss) & jnp.isfinite(grad_norm),
        )

    return jax.jit(gradients, compiler_options=_COMPILER_OPTIONS)


def _check_micro_batches(batch: Mapping[str, Array], expected: int) -> None:
    for name, array in batch.items():
        if array.shape[0] != expected:
            raise ValueError(f"batch field {name} has {array.shape[0]} micro-batches; the step was made for {expected}")


class TrainStep:
    """One training step: `state, report = step(state, frozen, batch)`; `state` is donated. See `make_train_step`.

    Attributes:
        planned_bytes: most that any step so far should have had on the device, by the compiler's count.
    """

    def __init__(self, gradient_step: Any, optimizer: PagedOptimizer):
        self.gradient_step, self.optimizer = gradient_step, optimizer
        self.programs: dict[tuple[tuple[int, ...], ...], jax.stages.Compiled] = {}
        self.planned_bytes = 0

    def compiled(self, batch: Mapping[str, Any]) -> jax.stages.Compiled | None:
        """Return the gradient program for the shapes of a batch, if it has been compiled."""
        return self.programs.get(_shapes(batch))

    def program(self, lora: nnx.State, frozen: nnx.State, batch: Mapping[str, Any], step: Any) -> jax.stages.Compiled:
        """Return the gradient program for the shapes of a batch, compiled once; arguments may be abstract.

        Raises:
            UserError: the step needs more pinned host memory than there is.
        """
        found = self.compiled(batch)
        if found is None:
            found = self.gradient_step.lower(lora, frozen, batch, step).compile()
            self._check_host_memory(ProgramMemory.of(found))
            self.programs[_shapes(batch)] = found
        return found

    def _check_host_memory(self, program: ProgramMemory) -> None:
        """Refuse a step that would end in the allocator's or the system's out-of-memory error; CPUs pin nothing."""
        resident = self.optimizer.resident_bytes(self.optimizer.resident_chunks(program.peak))
        needed = program.host_temporaries + self.optimizer.state_bytes - resident
        needed, limit = needed * jax.local_device_count(), pinned_limit()
        if jax.default_backend() != "cpu" and needed > limit:
            raise UserError(
                f"a step takes {needed / 1e9:.1f} GB of pinned host memory and {limit / 1e9:.1f} GB may be pinned here "
                f"(by {PINNED_LIMIT_VARIABLE} and the host's memory); shorten the sequences, or keep less on the host "
                "with `remat=full` or `optim_placement=device`."
            )

    def __call__(
        self, state: TrainState, frozen: nnx.State, batch: Mapping[str, Array]
    ) -> tuple[TrainState, StepReport]:
        """Do one step: room for the gradient program, gradients, update."""
        program = self.program(state.lora, frozen, batch, state.step)
        needed = ProgramMemory.of(program).peak
        resident = self.optimizer.resident_chunks(needed)
        self.planned_bytes = max(self.planned_bytes, needed + self.optimizer.resident_bytes(resident))
        opt_state, made_room = self.optimizer.evict(state.opt_state, resident)
        grads, metrics = program(state.lora, frozen, batch, state.step)
        lora, opt_state, moved = self.optimizer.update(
            state.lora, grads, opt_state, metrics.scale, metrics.finite, resident
        )
        report = StepReport(metrics.loss, metrics.grad_norm, metrics.weight, metrics.metrics, made_room + moved)
        return TrainState(lora, opt_state, state.step + 1), report


def _shapes(batch: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(batch))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: PagedOptimizer,
    config: StepConfig,
    *,
    objective: Objective = NEXT_TOKEN,
    reference: nnx.GraphDef | None = None,
    devices: Devices | None = None,
) -> TrainStep:
    """Make a `step(state, frozen, batch) -> (state, report)`: `make_gradient_step`, then the optimizer by chunks.

    The other arguments and the batch are those of `make_gradient_step`: the loss is the mean over the weight of all
    A*B rows, so that accumulating equals one large batch. If loss or gradient is not finite, the state comes back
    unchanged but for `step`: the last good adapters survive.
    """
    return TrainStep(
        make_gradient_step(graphdef, config, objective=objective, reference=reference, devices=devices), optimizer
    )


def make_eval_step(
    graphdef: nnx.GraphDef,
    *,
    objective: Objective = NEXT_TOKEN,
    reference: nnx.GraphDef | None = None,
    devices: Devices | None = None,
) -> Callable[[nnx.State, nnx.State, Mapping[str, Array]], Sums]:
    """Make a jitted `step(lora, frozen, batch) -> Sums` of a batch of the objective's fields, e.g. int32 [B, S]."""
    # Nothing is kept without a backward pass; `full` lets long rows pass by tiles.
    sums = _LocalSums(graphdef, objective, "full", reference)

    def step(lora: nnx.State, frozen: nnx.State, batch: Mapping[str, Array]) -> Sums:
        return _on_every_device(sums, devices, 2)(lora, frozen, batch, None)

    return jax.jit(step, compiler_options=_COMPILER_OPTIONS)
