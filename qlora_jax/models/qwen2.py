"""Qwen2 and Qwen2.5 (Yang et al. 2024): LLaMA's layer with biases on queries, keys and values."""

import functools
from collections.abc import Mapping
from typing import Any

from qlora_jax.models.decoder import (
    LORA_GROUPS,
    DecoderConfig,
    DecoderLM,
    PreNormLayer,
    decoder_names,
    read_windowed_config,
    redundant_tensors,
)
from qlora_jax.models.family import GGUF, Family
from qlora_jax.nn.linear import QLoRAConfig


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; UserError names a field that is missing, unknown or not implemented."""
    return read_windowed_config(config, "Qwen2Config", {"use_mrope": (False, None)})


def make_model(config: DecoderConfig, qlora: QLoRAConfig) -> DecoderLM:
    """Declare the model without its weights."""
    # No field of config.json says so.
    return DecoderLM(config, qlora, functools.partial(PreNormLayer, config, qlora, qkv_bias=True))


FAMILY = Family(
    title="Qwen2, Qwen2.5",
    architectures=("Qwen2ForCausalLM",),
    config=read_config,
    model=make_model,
    names=lambda config: decoder_names(),
    lora_groups=LORA_GROUPS,
    gguf=GGUF("qwen2", "Qwen2ForCausalLM", "qwen2"),
    ignored=redundant_tensors,
)
