"""Qwen3 (Yang et al. 2025), dense: LLaMA's layer with an RMS norm over each head of queries and keys."""

import functools
from collections.abc import Mapping
from typing import Any

from qlora_jax.models.decoder import (
    LORA_GROUPS,
    DecoderConfig,
    DecoderLM,
    PreNormLayer,
    decoder_names,
    head_norm_names,
    read_windowed_config,
    redundant_tensors,
)
from qlora_jax.models.family import GGUF, Family
from qlora_jax.nn.linear import QLoRAConfig


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; UserError names a field that is missing, unknown or not implemented."""
    return read_windowed_config(config, "Qwen3Config", {"attention_bias": (False, None)})


def make_model(config: DecoderConfig, qlora: QLoRAConfig) -> DecoderLM:
    """Declare the model without its weights."""
    return DecoderLM(config, qlora, functools.partial(PreNormLayer, config, qlora, head_norm=True))


FAMILY = Family(
    title="Qwen3",
    architectures=("Qwen3ForCausalLM",),
    config=read_config,
    model=make_model,
    names=lambda config: decoder_names(*head_norm_names()),
    lora_groups=LORA_GROUPS,
    gguf=GGUF("qwen3", "Qwen3ForCausalLM", "qwen3"),
    ignored=redundant_tensors,
)
