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
    ignored_tensors,
    shared_fields,
)
from qlora_jax.models.family import GGUF, Family
from qlora_jax.models.hf_config import decoder_fields
from qlora_jax.models.layer_types import attentions_of
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.nn.rotary import RotaryConfig

_READ = frozenset(("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"))
_NEUTRAL = {"hidden_act": ("silu", "swish", None), "use_mrope": (False, None)}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json; UserError names a field that is missing, unknown or not implemented."""
    fields = decoder_fields(config, "Qwen2Config", read=_READ, neutral=_NEUTRAL)
    return DecoderConfig(
        **shared_fields(config, fields),
        attentions=attentions_of(fields),
        rotary=(("default", RotaryConfig.from_hf(config, fields["head_dim"], fields["max_position_embeddings"])),),
    )


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
    ignored=ignored_tensors,
)
