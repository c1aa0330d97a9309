"""State of a run when it begins or is resumed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax import data, models
from qlora_jax.errors import UserError
from qlora_jax.files import check_room
from qlora_jax.optimizers import PagedOptimizer
from qlora_jax.sharding import Devices
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.model import Model
from qlora_jax.training.results import read_summary
from qlora_jax.training.run_directory import RunDirectory
from qlora_jax.training.schedule import make_optimizer
from qlora_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Counters:
    """Totals of a run so far.

    Attributes:
        tokens: tokens that were not padding.
        trained_tokens: summed weight of the objective, for next-token prediction the trained tokens.
        seconds: time spent, by all the processes that the run took.
    """

    tokens: int = 0
    trained_tokens: int | float = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class RunState:
    """Everything that a checkpoint brings back, but for the data iterator, which is moved in place.

    Attributes:
        state: adapters and optimizer state, on the devices.
        step: steps done.
        counters: totals up to there.
    """

    state: TrainState
    step: int = 0
    counters: Counters = Counters()


def position(batches: data.Batches, counters: Counters) -> dict[str, Any]:
    """Return what a checkpoint holds beside the state, as JSON values."""
    return {"data": batches.state(), **dataclasses.asdict(counters)}


def initial_state(config: TrainConfig, model: Model, optimizer: PagedOptimizer, devices: Devices) -> RunState:
    """Make the state before the first step: fresh adapters, or those of `adapter`."""
    lora = model.start
    if lora is None:
        lora = models.initialize(model.parts.lora, jax.random.key(config.seed))
    state = TrainState.create(devices.place(lora), optimizer)
    # Placed before the first step: a step compiled for other shardings would be compiled twice.
    return RunState(dataclasses.replace(state, step=jax.device_put(state.step, devices.whole)))


def restored_state(
    config: TrainConfig, directory: RunDirectory, optimizer: PagedOptimizer, batches: data.Batches, devices: Devices
) -> RunState:
    """Read the newest checkpoint that is intact, and move `batches` to where it was."""
    abstract = TrainState(*optimizer.abstract(), jax.ShapeDtypeStruct((), jnp.int32))
    step, saved, where = directory.restore_newest(abstract, strict=config.strict_resume)
    lora, opt_state = optimizer.scatter(saved.lora, saved.opt_state, devices.shardings(abstract.lora))
    batches.restore(where["data"])
    return RunState(TrainState(lora, opt_state, jax.device_put(saved.step, devices.whole)), step, _counters(where))


def _counters(where: Mapping[str, Any]) -> Counters:
    return Counters(**{field.name: where[field.name] for field in dataclasses.fields(Counters)})


def check_free_space(config: TrainConfig, trained: nnx.State) -> None:
    """Refuse an `output_dir`, which must exist, on whose disk not even one checkpoint has room.

    Nothing is said where `overwrite_output_dir` is still to free some.

    Args:
        config: of the run.
        trained: what it trains, float32; shapes will do.

    Raises:
        UserError: names what is needed and what is there.
    """
    if not config.do_train or config.overwrite_output_dir:
        return
    # Adapters twice: in PEFT's format too.
    needed = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trained))
    needed += make_optimizer(config, 1, trained, dtype=jnp.float32).state_bytes
    check_room(Path(config.output_dir), needed, f"the disk of `output_dir={config.output_dir}`", "a checkpoint")


def refuse_finished(config: TrainConfig, total_steps: int) -> None:
    """Raise UserError if the run in `output_dir` is finished, or longer than this one, or if its summary is damaged."""
    directory = RunDirectory(Path(config.output_dir))
    step = 0 if config.overwrite_output_dir else max(directory.checkpoints(), default=0)
    if step > total_steps or (step and step == total_steps and read_summary(directory.path) is not None):
        raise UserError(
            f"`output_dir={config.output_dir}` holds a finished run of {step} steps; give another `output_dir`, or "
            "`overwrite_output_dir` to delete it."
        )
