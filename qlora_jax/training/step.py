"""The training step: one optimizer update of the adapters, and the evaluation of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qlora_jax.remat import Remat
from qlora_jax.training.losses import next_token_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes. The base model is not part of it.

    lora: adapter state, float32 leaves; opt_state: optax's state for exactly those; step: int32 [], updates done.
    """

    lora: Any
    opt_state: Any
    step: Any

    @classmethod
    def create(cls, lora: nnx.State, optimizer: optax.GradientTransformation) -> "TrainState":
        """The state before the first step."""
        return cls(lora, optimizer.init(lora), jnp.zeros((), jnp.int32))


def _loss_sum(
    lora: nnx.State,
    frozen: nnx.State,
    batch: dict[str, Array],
    dropout_key: Array | None,
    *,
    graphdef: nnx.GraphDef,
    packed: bool,
    remat: Remat,
    mesh: jax.sharding.Mesh | None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(summed loss, trained tokens) of a batch, split over the axis `data` of the mesh.

    Every device runs the whole model on its own rows: written as one program for all rows, XLA could not divide the
    kernels' calls and would send every row to every device.
    """
    if mesh is not None and mesh.size > 1:

        def local(
            lora: nnx.State, frozen: nnx.State, batch: dict[str, Array], dropout_key: Array | None
        ) -> tuple[Array, Array]:
            if dropout_key is not None:
                dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index("data"))
            here = _loss_sum(lora, frozen, batch, dropout_key, graphdef=graphdef, packed=packed, remat=remat, mesh=None)
            return jax.lax.psum(here, "data")

        whole, rows = PartitionSpec(), PartitionSpec("data")
        split = jax.shard_map(
            local, mesh=mesh, in_specs=(whole, whole, rows, whole), out_specs=(whole, whole), check_vma=False
        )
        return split(lora, frozen, batch, dropout_key)
    model = nnx.merge(graphdef, lora, frozen)
    # An unpacked row is one document padded on the right: causality alone keeps it from the padding.
    segment_ids = batch["segment_ids"] if packed else None
    hidden, _ = model(
        batch["input_ids"], batch["positions"], segment_ids=segment_ids, dropout_key=dropout_key, remat=remat
    )
    return next_token_loss(hidden, model.head, batch["labels"])


def _compiler_options() -> dict[str, str | bool | int | float] | None:
    # XLA keeps to 256-bit vectors on CPUs that have 512 bits; decoding 4-bit weights gains more than clocks lose (2 to
    # 5 % of a step on a Zen 5). CPUs without them take the widest they have.
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    packed: bool = False,
    remat: Remat = "none",
    dropout: bool = False,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[TrainState, nnx.State, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """A jitted `step(state, frozen, batch) -> (state, metrics)`; `state` is donated.

    Args:
        graphdef: of the model, from `split_model`.
        optimizer: an optax transformation of the adapters.
        packed: rows hold several documents, told apart by `segment_ids`.
        remat: what of a layer is kept for the backward pass, see `qlora_jax.remat`.
        dropout: draw dropout masks, keyed by (seed, step, micro-batch, device): a resumed run draws the same ones.
        seed: of the dropout.
        mesh: with axis `data`, over which B is split.

    The batch holds input_ids, labels, positions, segment_ids, each int32 [A, B, S]: A micro-batches of B sequences. The
    loss is the mean over all trained tokens of the A*B sequences, so that accumulating equals one large batch. Metrics:
    loss (nats a token), grad_norm (before clipping), trained_tokens. If loss or gradient is not finite the state
    comes back unchanged but for `step`: the last good adapters survive.
    """

    def step(state: TrainState, frozen: nnx.State, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
        # Gradients of the sum, divided once by the token count of the whole batch.
        value_and_grad = jax.value_and_grad(_loss_sum, has_aux=True)
        statics = {"graphdef": graphdef, "packed": packed, "remat": remat, "mesh": mesh}
        micro_batches = batch["input_ids"].shape[0]

        def micro(index: Array | int, one: dict[str, Array]) -> tuple[Array, Array, Any]:
            micro_key = None if key is None else jax.random.fold_in(key, index)
            (loss, count), grads = value_and_grad(state.lora, frozen, one, micro_key, **statics)
            return loss, count, grads

        if micro_batches == 1:
            loss, count, grads = micro(0, jax.tree.map(lambda a: a[0], batch))
        else:

            def accumulate(carry: Any, xs: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, micro(*xs)), None

            zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, state.lora))
            (loss, count, grads), _ = jax.lax.scan(accumulate, zeros, (jnp.arange(micro_batches), batch))
        scale = 1.0 / jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g * scale, grads)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        lora, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (lora, opt_state), (state.lora, state.opt_state)
        )
        metrics = {"loss": loss * scale, "grad_norm": grad_norm, "trained_tokens": count}
        return TrainState(lora, opt_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=_compiler_options())


def make_eval_step(
    graphdef: nnx.GraphDef, *, packed: bool = False, mesh: jax.sharding.Mesh | None = None
) -> Callable[[nnx.State, nnx.State, dict[str, Array]], tuple[Array, Array]]:
    """A jitted `step(lora, frozen, batch)` -> (summed loss, trained tokens) of a batch of int32 [B, S] arrays."""

    def step(lora: nnx.State, frozen: nnx.State, batch: dict[str, Array]) -> tuple[Array, Array]:
        return _loss_sum(lora, frozen, batch, None, graphdef=graphdef, packed=packed, remat="none", mesh=mesh)

    return jax.jit(step, compiler_options=_compiler_options())
