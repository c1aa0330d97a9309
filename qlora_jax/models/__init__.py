"""Model families, found by the `architectures` field of a Hugging Face config.json."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.models import llama
from qlora_jax.models.common import (
    TensorSpec,
    fill_base,
    flatten,
    init_lora,
    select_lora_modules,
    split_model,
    unflatten_like,
)
from qlora_jax.models.llama import KVCache, Llama, LlamaConfig
from qlora_jax.models.presets import PRESETS
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.quantization import QuantizationConfig

__all__ = [
    "PRESETS",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "TensorSpec",
    "abstract_model",
    "base_tensors",
    "fill_base",
    "flatten",
    "ignored_tensors",
    "init_lora",
    "lora_modules",
    "model_config",
    "split_model",
    "unflatten_like",
]

# Hugging Face architecture -> the module that implements it (`Config.from_hf`, the model class, its tensors' names).
FAMILIES = {name: llama for name in llama.ARCHITECTURES}


def _family(config: Mapping[str, Any]) -> Any:
    architectures = config.get("architectures") or []
    if len(architectures) != 1:
        raise UserError(f"config.json: architectures must name one architecture, not {architectures!r}.")
    if architectures[0] not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"config.json: architecture {architectures[0]!r} is not supported; supported are {known}.")
    return FAMILIES[architectures[0]]


def model_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Typed configuration from a Hugging Face config dict; UserError names any field that is not supported."""
    return _family(config).CONFIG.from_hf(config)


def abstract_model(config: Mapping[str, Any], qlora: QLoRAConfig) -> Llama:
    """The model without its weights: every leaf of its variables is a `jax.ShapeDtypeStruct`."""
    return _family(config).MODEL(model_config(config), qlora)


def base_tensors(config: Mapping[str, Any]) -> list[TensorSpec]:
    """Every base tensor of the model, one per layer, in the order a checkpoint is read: embedding, layers, the rest."""
    bare = QLoRAConfig(quantization=QuantizationConfig(quant_type="none"))
    _, _, frozen = split_model(abstract_model(config, bare))
    return _family(config).tensor_specs(frozen)


def ignored_tensors(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Regular expressions of checkpoint tensors that may be present and carry nothing the model needs."""
    return _family(config).ignored_tensors(model_config(config))


def lora_modules(config: Mapping[str, Any], selection: str) -> tuple[str, ...]:
    """Names of the linears that `all`, `attention`, `mlp` or a comma-separated list of names selects.

    `all` is every linear but the head (QLoRA section 4: adapters on all layers are needed to match 16-bit tuning).

    Raises:
        UserError: a name that is no linear of this model.
    """
    return select_lora_modules(_family(config).LINEARS, selection)
