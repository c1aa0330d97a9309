"""The training step: gradients of the adapters, one update of them by the paged optimizer, and their evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qlora_jax.nn.linear import GradientSlot
from qlora_jax.nn.remat import Remat
from qlora_jax.optimizers import PagedOptimizer
from qlora_jax.training.losses import next_token_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes. The base model is not part of it.

    lora: the adapters that the model reads, in the optimizer's working dtype; opt_state: what `PagedOptimizer` keeps
    of them, float32 masters included; step: int32 [], updates done.
    """

    lora: Any
    opt_state: Any
    step: Any

    @classmethod
    def create(cls, lora: nnx.State, optimizer: PagedOptimizer) -> "TrainState":
        """The state before the first step. `lora` is float32; where another working dtype is kept, it is deleted."""
        return cls(*optimizer.init(lora), jnp.zeros((), jnp.int32))


def _loss_sum(
    lora: nnx.State,
    frozen: nnx.State,
    batch: dict[str, Array],
    dropout_key: Array | None,
    *,
    graphdef: nnx.GraphDef,
    packed: bool,
    remat: Remat,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(summed loss, trained tokens) of a batch [B, S] on one device."""
    model = nnx.merge(graphdef, lora, frozen)
    # An unpacked row is one document padded on the right: causality alone keeps it from the padding.
    segment_ids = batch["segment_ids"] if packed else None
    hidden, _ = model(
        batch["input_ids"], batch["positions"], segment_ids=segment_ids, dropout_key=dropout_key, remat=remat
    )
    return next_token_loss(hidden, model.head, batch["labels"])


def _on_every_device(
    sums: Callable[..., Any], mesh: jax.sharding.Mesh | None, rows: PartitionSpec
) -> Callable[..., Any]:
    """`sums(lora, frozen, batch, key)` of all rows: run on every device's own, added up over the axis `data`.

    Every device runs the whole model: written as one program for all rows, XLA could not divide the kernels' calls and
    would send every row to every device.
    """
    if mesh is None or mesh.size == 1:
        return sums
    whole = PartitionSpec()

    def local(*arguments: Any) -> Any:
        return jax.lax.psum(sums(*arguments), "data")

    return jax.shard_map(
        local, mesh=mesh, in_specs=(whole, whole, rows, whole), out_specs=(whole, whole), check_vma=False
    )


# For whichever platform a program is compiled.
_COMPILER_OPTIONS: dict[str, str | bool | int | float] = {
    # XLA keeps to 256-bit vectors on CPUs that have 512 bits; decoding 4-bit weights gains more than clocks lose (2 to
    # 5 % of a step on a Zen 5). CPUs without them take the widest they have.
    "xla_cpu_prefer_vector_width": 512,
    # Without it a GPU waits for every tile that comes from host memory, instead of working on the one before.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}


def make_gradient_step(
    graphdef: nnx.GraphDef,
    *,
    packed: bool = False,
    remat: Remat = "none",
    dropout: bool = False,
    seed: int = 0,
    max_grad_norm: float = 0.0,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[nnx.State, nnx.State, dict[str, Array], Array], tuple[nnx.State, dict[str, Array]]]:
    """A jitted `gradients(lora, frozen, batch, step)` -> (gradient sums, metrics), the larger half of a training step.

    Args:
        graphdef: of the model, from `split_model`.
        packed: rows hold several documents, told apart by `segment_ids`.
        remat: what of a layer is kept for the backward pass, see `qlora_jax.nn.remat`.
        dropout: draw dropout masks, keyed by (seed, step, micro-batch, device): a resumed run draws the same ones.
        seed: of the dropout.
        max_grad_norm: clip the mean gradient to this global norm (Pascanu et al. 2013); 0 for no clipping.
        mesh: with axis `data`, over which B is split.

    The batch holds input_ids, labels, positions, segment_ids, each int32 [A, B, S]: A micro-batches of B sequences.
    Gradients are those of the loss summed over all trained tokens, float32 in the shapes of `lora` whatever its dtype;
    the micro-batches add to them in place. Metrics, all scalars: loss (mean over the trained tokens of all A*B
    sequences, in nats), grad_norm (of the mean gradient, before clipping), trained_tokens, scale (the clipped mean
    gradient is the sums times this), finite (whether loss and gradient are).
    """

    def sums(
        lora: nnx.State, frozen: nnx.State, batch: dict[str, Array], key: Array | None
    ) -> tuple[nnx.State, tuple[Array, Array]]:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), lora)
        totals = jax.tree.map(jax.new_ref, zeros)

        def micro(index: Array | int, one: dict[str, Array]) -> tuple[Array, Array]:
            micro_key = None if key is None else jax.random.fold_in(key, index)
            if micro_key is not None and mesh is not None and mesh.size > 1:
                micro_key = jax.random.fold_in(micro_key, jax.lax.axis_index("data"))

            def loss_sum(slots: nnx.State) -> tuple[Array, Array]:
                adapters = jax.tree.map(GradientSlot, lora, slots)
                return _loss_sum(adapters, frozen, one, micro_key, graphdef=graphdef, packed=packed, remat=remat)

            loss, backward, count = jax.vjp(loss_sum, zeros, has_aux=True)
            # Each layer's gradient is added where the total lies: no second tree of gradients exists.
            backward.with_refs(totals)(jnp.ones_like(loss))  # type: ignore[attr-defined]  # of the function it declares
            return loss, count

        if batch["input_ids"].shape[0] == 1:
            loss, count = micro(0, jax.tree.map(lambda a: a[0], batch))
        else:

            def accumulate(carry: tuple[Array, Array], xs: Any) -> tuple[tuple[Array, Array], None]:
                loss, count = micro(*xs)
                return (carry[0] + loss, carry[1] + count), None

            start = (jnp.zeros(()), jnp.zeros((), jnp.int32))
            indices = jnp.arange(batch["input_ids"].shape[0])
            (loss, count), _ = jax.lax.scan(accumulate, start, (indices, batch))
        return jax.tree.map(jax.freeze, totals), (loss, count)

    def gradients(
        lora: nnx.State, frozen: nnx.State, batch: dict[str, Array], step: Array
    ) -> tuple[nnx.State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), step) if dropout else None
        grads, (loss, count) = _on_every_device(sums, mesh, PartitionSpec(None, "data"))(lora, frozen, batch, key)
        scale = 1.0 / jnp.maximum(count, 1)
        grad_norm = optax.tree.norm(grads) * scale
        metrics = {
            "loss": loss * scale,
            "grad_norm": grad_norm,
            "trained_tokens": count,
            "scale": scale,
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        if max_grad_norm:
            metrics["scale"] = jnp.where(grad_norm < max_grad_norm, scale, scale * (max_grad_norm / grad_norm))
        return grads, metrics

    return jax.jit(gradients, compiler_options=_COMPILER_OPTIONS)


class TrainStep:
    """One training step: `state, metrics = step(state, frozen, batch)`; `state` is donated. See `make_train_step`."""

    def __init__(self, gradient_step: Any, optimizer: PagedOptimizer):
        self.gradient_step, self.optimizer = gradient_step, optimizer
        self.programs: dict[tuple[int, ...], jax.stages.Compiled] = {}
        self.planned_bytes = 0  # most that any step so far should have had on the device, by the compiler's count

    def program(self, lora: Any, frozen: Any, batch: dict[str, Any], step: Any) -> jax.stages.Compiled:
        """The gradient program for a batch's shape [A, B, S], compiled once; arguments may be abstract."""
        shape = batch["input_ids"].shape
        if shape not in self.programs:
            self.programs[shape] = self.gradient_step.lower(lora, frozen, batch, step).compile()
        return self.programs[shape]

    def __call__(
        self, state: TrainState, frozen: nnx.State, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Do one step: room for the gradient program, gradients, update."""
        program = self.program(state.lora, frozen, batch, state.step)
        needed = program_bytes(program)
        resident = self.optimizer.resident_chunks(needed)
        self.planned_bytes = max(self.planned_bytes, needed + self.optimizer.resident_bytes(resident))
        opt_state, made_room = self.optimizer.evict(state.opt_state, resident)
        grads, metrics = program(state.lora, frozen, batch, state.step)
        lora, opt_state, moved = self.optimizer.update(
            state.lora, grads, opt_state, metrics["scale"], metrics["finite"], resident
        )
        shown = {name: metrics[name] for name in ("loss", "grad_norm", "trained_tokens")}
        return TrainState(lora, opt_state, state.step + 1), {**shown, "traffic": made_room + moved}


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: PagedOptimizer,
    *,
    packed: bool = False,
    remat: Remat = "none",
    dropout: bool = False,
    seed: int = 0,
    max_grad_norm: float = 0.0,
    mesh: jax.sharding.Mesh | None = None,
) -> TrainStep:
    """A `step(state, frozen, batch) -> (state, metrics)`: `make_gradient_step`, then the optimizer chunk by chunk.

    The other arguments and the batch are those of `make_gradient_step`: the loss is the mean over all trained tokens of
    the A*B sequences, so that accumulating equals one large batch. Metrics: loss (nats a token), grad_norm (before
    clipping), trained_tokens, and traffic (`qlora_jax.optimizers.TransferStats`). If loss or gradient is
    not finite the state comes back unchanged but for `step`: the last good adapters survive.
    """
    gradient_step = make_gradient_step(
        graphdef, packed=packed, remat=remat, dropout=dropout, seed=seed, max_grad_norm=max_grad_norm, mesh=mesh
    )
    return TrainStep(gradient_step, optimizer)


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Device bytes that exist while a program runs: arguments, outputs and temporaries, by XLA's buffer assignment."""
    memory: Any = compiled.memory_analysis()  # backends without one say None; those of CPU and GPU have one
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def make_eval_step(
    graphdef: nnx.GraphDef, *, packed: bool = False, mesh: jax.sharding.Mesh | None = None
) -> Callable[[nnx.State, nnx.State, dict[str, Array]], tuple[Array, Array]]:
    """A jitted `step(lora, frozen, batch)` -> (summed loss, trained tokens) of a batch of int32 [B, S] arrays."""

    def sums(lora: nnx.State, frozen: nnx.State, batch: dict[str, Array], key: None) -> tuple[Array, Array]:
        # Nothing is kept without a backward pass; `full` lets long rows pass by tiles.
        return _loss_sum(lora, frozen, batch, key, graphdef=graphdef, packed=packed, remat="full")

    def step(lora: nnx.State, frozen: nnx.State, batch: dict[str, Array]) -> tuple[Array, Array]:
        return _on_every_device(sums, mesh, PartitionSpec("data"))(lora, frozen, batch, None)

    return jax.jit(step, compiler_options=_COMPILER_OPTIONS)
