"""From a configuration to a model and a training step, without weights: what a run trains, and what a plan compiles."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

from qlora_jax import models
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.quantization import MixedQuantization, Quantization, QuantizationConfig
from qlora_jax.sharding import REPLICATED, Devices, ShardingRules
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import Objective, Sums, objective_of
from qlora_jax.training.schedule import make_optimizer
from qlora_jax.training.step import TrainStep, make_eval_step, make_train_step

logger = logging.getLogger(__name__)


def make_devices(config: TrainConfig) -> Devices:
    """Put all devices on one axis, `data`, over which a run's tensors are cut by its rules."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return Devices(mesh, sharding_rules(config))


def sharding_rules(config: TrainConfig) -> ShardingRules:
    """Return how a run's tensors are cut over the devices: rows of a batch are, weights are whole on each."""
    return REPLICATED


def compute_dtype(config: TrainConfig, platform: str | None = None) -> Any:
    """Return the dtype of `bf16`; by default bfloat16 on accelerators and float32 on CPUs.

    Few CPUs multiply bfloat16 (AVX-512 BF16, AMX); on those bfloat16 is about half as fast again (BENCHMARKS.md).
    `platform` is JAX's name of what runs the program; by default, of what this process runs on.
    """
    if config.bf16 is None:
        return default_dtype(platform)
    return jnp.bfloat16 if config.bf16 else jnp.float32


def default_dtype(platform: str | None = None) -> Any:
    """Return the dtype of computation where nothing says it; argument as for `compute_dtype`."""
    return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16


def quantization_of(config: TrainConfig, model_config: models.DecoderConfig) -> Quantization:
    """Return the storage of linear weights that `bits`, `quant_type`, `block_size` and `double_quant` describe.

    With `bits` "auto", linears that the checkpoint stores quantised stay as they are.
    """
    quant_type = {"auto": config.quant_type, 4: config.quant_type, 8: "int8", 16: "none"}[config.bits]
    asked = QuantizationConfig(quant_type, config.block_size, config.double_quant)
    kept = model_config.stored if config.bits == "auto" else ()
    return MixedQuantization(asked, kept) if kept else asked


def stores_4_bits(config: TrainConfig, model_config: models.DecoderConfig) -> bool:
    """Tell if every linear is stored in 4 bits, which the fused kernels need."""
    storage = quantization_of(config, model_config)
    kinds = [storage, *(each for _, each in model_config.stored)] if config.bits == "auto" else [storage]
    each = [kind.default if isinstance(kind, MixedQuantization) else kind for kind in kinds]
    return all(kind.quant_type != "none" and kind.format.bits == 4 for kind in each)


def quantization_notes(config: TrainConfig, model_config: models.DecoderConfig) -> list[str]:
    """List a sentence for every field of quantisation that has no effect, as the checkpoint's weights are kept."""
    linears = {name for group in models.family_of(model_config).lora_groups.values() for name in group}
    if config.bits != "auto" or linears - {name for name, _ in model_config.stored}:
        return []
    kept = ", ".join(dict.fromkeys(str(storage) for _, storage in model_config.stored))
    return [
        f"`{name}={getattr(config, name)}` has no effect: the checkpoint's own {kept} is kept; `bits=4` quantises again"
        for name in ("quant_type", "block_size", "double_quant")
        if getattr(config, name) != getattr(TrainConfig, name)
    ]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters of a run.

    Attributes:
        config: rank, scale, dropout and adapted linears.
        tensors: {path: array} to start from, those of `adapter`; None for fresh ones.
    """

    config: LoRAConfig
    tensors: dict[Any, Any] | None


def find_adapters(config: TrainConfig, model_config: models.DecoderConfig) -> Adapters:
    """Resolve the adapters that a configuration asks for.

    Raises:
        UserError: `lora_modules` that the model does not have, or an `adapter` that cannot be read.
    """
    if config.adapter is None:
        modules = models.lora_modules(model_config, config.lora_modules)
        return Adapters(LoRAConfig(config.lora_r, config.lora_alpha, config.lora_dropout, modules), None)
    tensors, saved = load_adapter(config.adapter, model_config)
    warn_of_another_base(config.adapter, saved.base_model_name, config.model_name_or_path)
    modules = tuple(saved.target_modules)
    return Adapters(LoRAConfig(saved.rank, saved.alpha, config.lora_dropout, modules), tensors)


def warn_of_another_base(adapter: str, trained_on: str | None, given: str) -> None:
    """Say that an adapter was trained on another model than it is used with, if its file names one.

    Hub ids and paths are compared by their last part: one model has several places.
    """
    if trained_on and PurePath(trained_on).name.lower() != PurePath(given).name.lower():
        logger.warning("adapter %s was trained on %s, not on %s", adapter, trained_on, given)


@dataclasses.dataclass(frozen=True)
class ModelParts:
    """A model split for training.

    Attributes:
        graphdef: structure.
        lora: what is trained.
        frozen: the base.
        reference: structure of the same base without adapters, if the objective reads it.
        rules: how all of it is cut over a mesh.
    """

    graphdef: nnx.GraphDef
    lora: nnx.State
    frozen: nnx.State
    reference: nnx.GraphDef | None = None
    rules: ShardingRules = REPLICATED


def declare_model(config: TrainConfig, model_config: models.DecoderConfig, lora: LoRAConfig, dtype: Any) -> ModelParts:
    """Declare the model that a configuration asks for; every leaf is a `jax.ShapeDtypeStruct`."""
    rules = sharding_rules(config)
    qlora = QLoRAConfig(quantization_of(config, model_config), dtype, lora, config.kernel, rules)
    graphdef, trainable, frozen = models.split_model(models.abstract_model(model_config, qlora))
    reference = None
    if objective_of(config).uses_reference:
        bare = dataclasses.replace(qlora, lora=None)
        reference, _, _ = models.split_model(models.abstract_model(model_config, bare))
    return ModelParts(graphdef, trainable, frozen, reference, rules)


@dataclasses.dataclass(frozen=True)
class Declared:
    """The model and adapters of a run, before a weight of the base is read.

    Attributes:
        model_config: of the base, by its checkpoint.
        adapters: what it adapts, and what it starts from.
        parts: its model; every leaf is a `jax.ShapeDtypeStruct`.
    """

    model_config: models.DecoderConfig
    adapters: Adapters
    parts: ModelParts


def declare(config: TrainConfig, model_config: models.DecoderConfig, platform: str | None = None) -> Declared:
    """Resolve a run's adapters and declare its model; `platform` and errors as for `compute_dtype`, `find_adapters`."""
    adapters = find_adapters(config, model_config)
    parts = declare_model(config, model_config, adapters.config, compute_dtype(config, platform))
    return Declared(model_config, adapters, parts)


def make_step(
    config: TrainConfig,
    model: ModelParts,
    total_steps: int,
    *,
    limit: int | None = None,
    devices: Devices | None = None,
    platform: str | None = None,
) -> TrainStep:
    """Make the training step of a configuration, its optimizer included.

    Args:
        config: of the run.
        model: its values may be shapes; `frozen` is not read.
        total_steps: of the run, for the learning rate's schedule.
        limit: bytes of device memory, for an optimizer that pages; None for no limit.
        devices: that share the batch.
        platform: as for `compute_dtype`.
    """
    dtype = compute_dtype(config, platform)
    optimizer = make_optimizer(config, total_steps, model.lora, dtype=dtype, limit=limit)
    return make_train_step(
        model.graphdef,
        optimizer,
        config.step_config(),
        objective=objective_of(config),
        reference=model.reference,
        devices=devices,
    )


@dataclasses.dataclass(frozen=True)
class Programs:
    """Programs of a run.

    Attributes:
        train: one training step, its optimizer included.
        evaluate: evaluate(lora, frozen, batch) -> sums of the objective.
        objective: what both compute.
        devices: that share a batch, and how tensors are cut over them.
    """

    train: TrainStep
    evaluate: Callable[..., Sums]
    objective: Objective
    devices: Devices


def make_programs(
    config: TrainConfig, model: ModelParts, total_steps: int, *, limit: int | None, devices: Devices
) -> Programs:
    """Make the programs of a run; arguments are those of `make_step`."""
    objective = objective_of(config)
    return Programs(
        train=make_step(config, model, total_steps, limit=limit, devices=devices),
        evaluate=make_eval_step(model.graphdef, objective=objective, reference=model.reference, devices=devices),
        objective=objective,
        devices=devices,
    )
