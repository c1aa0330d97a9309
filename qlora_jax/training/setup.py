"""From flags to a model and a training step, without weights: what a run trains, and what a plan compiles."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax import models
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.optimizers import PagedOptimizer
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.schedule import make_optimizer
from qlora_jax.training.step import TrainStep, make_train_step

BATCH_ARRAYS = ("input_ids", "labels", "positions", "segment_ids")
"""int32 arrays of a batch that steps read, under the names of `qlora_jax.data.Batch`."""


def compute_dtype(config: TrainConfig, platform: str | None = None) -> Any:
    """The dtype --bf16 asks for; by default bfloat16 on accelerators and float32 on CPUs.

    Few CPUs multiply bfloat16 (AVX-512 BF16, AMX); on those --bf16 is about half as fast again (BENCHMARKS.md).
    `platform` is JAX's name of what runs the program; by default, of what this process runs on.
    """
    if config.bf16 is None:
        return jnp.float32 if (platform or jax.default_backend()) == "cpu" else jnp.bfloat16
    return jnp.bfloat16 if config.bf16 else jnp.float32


def quantization(config: TrainConfig) -> QuantizationConfig:
    """How --bits, --quant_type, --block_size and --double_quant store linear weights."""
    quant_type = {4: config.quant_type, 8: "int8", 16: "none"}[config.bits]
    return QuantizationConfig(quant_type, config.block_size, config.double_quant)


def adapters(config: TrainConfig, model_config: Mapping[str, Any]) -> tuple[LoRAConfig, dict[Any, Any] | None]:
    """The adapters that the flags ask for, and the tensors they start from: those of --adapter, or None for fresh ones.

    Raises:
        UserError: --lora_modules that the model does not have, or an --adapter that cannot be read.
    """
    if config.adapter is None:
        modules = models.lora_modules(model_config, config.lora_modules)
        return LoRAConfig(config.lora_r, config.lora_alpha, config.lora_dropout, modules), None
    tensors, saved = load_adapter(config.adapter)
    return LoRAConfig(saved.rank, saved.alpha, config.lora_dropout, tuple(saved.target_modules)), tensors


def declare_model(
    config: TrainConfig, model_config: Mapping[str, Any], lora: LoRAConfig, dtype: Any
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, adapters, base) of the model that the flags ask for, with abstract leaves."""
    qlora = QLoRAConfig(quantization(config), dtype, lora, config.kernel)
    return models.split_model(models.abstract_model(model_config, qlora))


def make_step(
    config: TrainConfig,
    graphdef: nnx.GraphDef,
    lora: nnx.State,
    total_steps: int,
    *,
    limit: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    platform: str | None = None,
) -> tuple[PagedOptimizer, TrainStep]:
    """The optimizer and the step of the flags.

    Args:
        config: the flags.
        graphdef: of the model.
        lora: its adapters, or their shapes.
        total_steps: of the run, for the learning rate's schedule.
        limit: bytes of device memory, for an optimizer that pages; None for no limit.
        mesh: of the devices that share the batch.
        platform: as for `compute_dtype`.
    """
    optimizer = make_optimizer(config, total_steps, lora, dtype=compute_dtype(config, platform), limit=limit)
    step = make_train_step(
        graphdef,
        optimizer,
        packed=config.packing,
        remat=config.remat_policy,
        dropout=config.lora_dropout > 0,
        seed=config.seed,
        max_grad_norm=config.max_grad_norm,
        mesh=mesh,
    )
    return optimizer, step
