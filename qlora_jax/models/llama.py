"""The LLaMA family: LLaMA 1/2/3, SmolLM2, TinyLlama, Mistral (Touvron et al. 2023; Jiang et al. 2023)."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.models.decoder import (
    LORA_GROUPS,
    SILU,
    DecoderConfig,
    DecoderLM,
    PreNormLayer,
    decoder_names,
    default_rotary,
    redundant_tensors,
    shared_fields,
)
from qlora_jax.models.family import GGUF, Family
from qlora_jax.models.hf_config import check_layer_types, decoder_fields
from qlora_jax.nn.attention import Attention
from qlora_jax.nn.linear import QLoRAConfig


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """A LLaMA-family model; one field says whether all of its attention's linears have biases, one of its MLP's."""

    attention_bias: bool = False
    mlp_bias: bool = False


def read_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Read config.json.

    Raises:
        UserError: a field is missing, unknown, or has a value this model does not implement; names the field.
    """
    mistral = (config.get("architectures") or [""])[0] == "MistralForCausalLM"
    if not mistral and config.get("sliding_window") is not None:
        raise UserError("config.json: sliding_window is supported for MistralForCausalLM only.")
    # transformers' LLaMA has no sliding window and its Mistral no biases.
    own = {"sliding_window"} if mistral else {"attention_bias", "mlp_bias"}
    absent = {"attention_bias": (False, None), "mlp_bias": (False, None)} if mistral else {"sliding_window": (None,)}
    fields = decoder_fields(
        {name: value for name, value in config.items() if name != "layer_types"},
        "MistralConfig" if mistral else "LlamaConfig",
        read=frozenset(own),
        neutral={**SILU, **absent},
    )
    check_layer_types({**config, "num_hidden_layers": fields["num_hidden_layers"]})
    window = fields.get("sliding_window")
    if set(config.get("layer_types") or []) - ({"sliding_attention"} if window else {"full_attention"}):
        raise UserError("config.json: layer_types that mix kinds of attention are not supported.")
    return LlamaConfig(
        **shared_fields(config, fields),
        attentions=(Attention(window=window),) * fields["num_hidden_layers"],
        rotary=default_rotary(config, fields),
        attention_bias=bool(fields.get("attention_bias")),
        mlp_bias=bool(fields.get("mlp_bias")),
    )


def make_model(config: LlamaConfig, qlora: QLoRAConfig) -> DecoderLM:
    """Declare the model without its weights."""
    bias = config.attention_bias
    layer = functools.partial(PreNormLayer, config, qlora, qkv_bias=bias, o_bias=bias, mlp_bias=config.mlp_bias)
    return DecoderLM(config, qlora, layer)


def _gguf_fields(config: Mapping[str, Any], metadata: Any, tensors: Collection[str]) -> dict[str, Any]:
    """Biases, which no metadata mention."""
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_gate.bias" in tensors}


FAMILY = Family(
    title="LLaMA, Mistral",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    config=read_config,
    model=make_model,
    names=lambda config: decoder_names(interleaved=True),
    lora_groups=LORA_GROUPS,
    gguf=GGUF("llama", "LlamaForCausalLM", "llama", derived=_gguf_fields),
    ignored=redundant_tensors,
)
