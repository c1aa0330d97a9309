"""Model families, found by the `architectures` field of a Hugging Face config.json."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from qlora_jax.errors import UserError
from qlora_jax.models import gemma3, llama, qwen2, qwen3
from qlora_jax.models.common import (
    TensorSpec,
    fill_base,
    flatten,
    initialize,
    select_lora_modules,
    split_model,
    tensor_specs,
    unflatten_like,
)
from qlora_jax.models.decoder import DecoderConfig, DecoderLM
from qlora_jax.models.family import GGUF, Family, Name
from qlora_jax.models.presets import PRESETS
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.quantization import QuantizationConfig

__all__ = [
    "FAMILIES",
    "GGUF",
    "PRESETS",
    "Config",
    "DecoderConfig",
    "Family",
    "Name",
    "TensorSpec",
    "abstract_model",
    "base_tensors",
    "family_of",
    "fill_base",
    "flatten",
    "ignored_tensors",
    "initialize",
    "lora_modules",
    "model_config",
    "names",
    "split_model",
    "unflatten_like",
]

_FAMILIES = (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, gemma3.FAMILY)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {architecture: family for family in _FAMILIES for architecture in family.architectures}
)
"""Hugging Face architecture -> family."""

Config = DecoderConfig | Mapping[str, Any]
"""A typed configuration, or the contents of config.json that it is read from."""


def _source(config: Config) -> Mapping[str, Any]:
    return config.source if isinstance(config, DecoderConfig) else config


def family_of(config: Config) -> Family:
    """Return the family of a model.

    Raises:
        UserError: config.json names no architecture, or one that is not implemented; lists those that are.
    """
    architectures = _source(config).get("architectures") or []
    if not isinstance(architectures, list | tuple) or [type(name) for name in architectures] != [str]:
        raise UserError(f"config.json: architectures must name one architecture, not {architectures!r}.")
    if architectures[0] not in FAMILIES:
        raise UserError(
            f"config.json: architecture {architectures[0]!r} is not supported; supported are {', '.join(FAMILIES)}. "
            "docs/adding_a_model.md shows how to add one."
        )
    return FAMILIES[architectures[0]]


def model_config(config: Config) -> DecoderConfig:
    """Typed configuration from the contents of config.json; UserError names any field that is not supported."""
    return config if isinstance(config, DecoderConfig) else family_of(config).config(config)


def abstract_model(config: Config, qlora: QLoRAConfig) -> DecoderLM:
    """The model without its weights: every leaf of its variables is a `jax.ShapeDtypeStruct`."""
    model: Any = family_of(config).model(model_config(config), qlora)
    return model


def names(config: Config) -> tuple[Name, ...]:
    """Names of the model's modules in every format."""
    return family_of(config).names(model_config(config))


def base_tensors(config: Config) -> list[TensorSpec]:
    """Every base tensor of the model, one per layer, in the order a checkpoint is read: embedding, layers, the rest."""
    bare = QLoRAConfig(quantization=QuantizationConfig(quant_type="none"))
    frozen: nnx.State
    _, _, frozen = split_model(abstract_model(config, bare))
    return tensor_specs(frozen, names(config))


def ignored_tensors(config: Config) -> tuple[str, ...]:
    """Regular expressions of checkpoint tensors that may be present and carry nothing the model needs."""
    family = family_of(config)
    return (*family.ignored(model_config(config)), *family.skipped)


def lora_modules(config: Config, selection: str) -> tuple[str, ...]:
    """Names of the linears that `all`, `attention`, `mlp` or a comma-separated list of names selects.

    `all` is every linear but the head (QLoRA section 4: adapters on all layers are needed to match 16-bit tuning).

    Raises:
        UserError: a name that is no linear of this model.
    """
    return select_lora_modules(family_of(config).lora_groups, selection)
