"""Model families, found by the `architectures` field of a Hugging Face config.json.

`model_config` reads the contents of a config.json once; what it returns travels, and everything else here takes that.
"""

import dataclasses
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
from qlora_jax.models.family import GGUF, LAYER, Family, Name
from qlora_jax.models.presets import PRESETS
from qlora_jax.models.quantization_config import FIELD, Linear, stored_linears
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.quantization import QuantizationConfig

__all__ = [
    "FAMILIES",
    "GGUF",
    "PRESETS",
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


def model_config(contents: Mapping[str, Any]) -> DecoderConfig:
    """Read the contents of a config.json.

    Raises:
        UserError: it names no architecture, or one that is not implemented (lists those that are), or has a field that
            is not supported (names it).
    """
    architectures = contents.get("architectures") or []
    if not isinstance(architectures, list | tuple) or [type(name) for name in architectures] != [str]:
        raise UserError(f"config.json: architectures must name one architecture, not {architectures!r}.")
    if architectures[0] not in FAMILIES:
        raise UserError(
            f"config.json: architecture {architectures[0]!r} is not supported; supported are {', '.join(FAMILIES)}. "
            "docs/adding_a_model.md shows how to add one."
        )
    family = FAMILIES[architectures[0]]
    config: DecoderConfig = family.config({name: value for name, value in contents.items() if name != FIELD})
    if contents.get(FIELD) is None:
        return config
    return dataclasses.replace(config, stored=stored_linears(contents, _linears(config)))


def _linears(config: DecoderConfig) -> list[Linear]:
    """Linears of all layers, by every name that they may have in a checkpoint."""
    table = {name.ours: name for name in names(config)}
    found = []
    for spec in base_tensors(config):
        if spec.quantized:
            name = table[".".join(spec.path[:-1])]
            spellings = (each.replace(LAYER, str(spec.layer)) for each in (name.hf, name.peft))
            found.append(Linear(spec.linear, tuple(dict.fromkeys(spellings)), spec.shape[-1]))
    return found


def family_of(config: DecoderConfig) -> Family:
    """Return the family of a model."""
    return FAMILIES[config.architecture]


def abstract_model(config: DecoderConfig, qlora: QLoRAConfig) -> DecoderLM:
    """The model without its weights: every leaf of its variables is a `jax.ShapeDtypeStruct`."""
    model: Any = family_of(config).model(config, qlora)
    return model


def names(config: DecoderConfig) -> tuple[Name, ...]:
    """Names of the model's modules in every format."""
    return family_of(config).names(config)


def base_tensors(config: DecoderConfig) -> list[TensorSpec]:
    """Every base tensor of the model, one per layer, in the order a checkpoint is read: embedding, layers, the rest."""
    bare = QLoRAConfig(quantization=QuantizationConfig(quant_type="none"))
    frozen: nnx.State
    _, _, frozen = split_model(abstract_model(config, bare))
    return tensor_specs(frozen, names(config))


def ignored_tensors(config: DecoderConfig) -> tuple[str, ...]:
    """Regular expressions of checkpoint tensors that may be present and carry nothing the model needs."""
    family = family_of(config)
    return (*family.ignored(config), *family.skipped)


def lora_modules(config: DecoderConfig, selection: str) -> tuple[str, ...]:
    """Names of the linears that `all`, `attention`, `mlp` or a comma-separated list of names selects.

    `all` is every linear but the head (QLoRA section 4: adapters on all layers are needed to match 16-bit tuning).

    Raises:
        UserError: a name that is no linear of this model.
    """
    return select_lora_modules(family_of(config).lora_groups, selection)
