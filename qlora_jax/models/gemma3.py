"""Gemma 3 (Kamath et al. 2025), its text part: norms around both halves of a layer, local and global attention."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from qlora_jax.errors import UserError
from qlora_jax.models.decoder import (
    LORA_GROUPS,
    DecoderConfig,
    DecoderLM,
    decoder_names,
    head_norm_names,
    in_layer,
    redundant_tensors,
    shared_fields,
)
from qlora_jax.models.family import GGUF, Family, Name
from qlora_jax.models.hf_config import INERT, decoder_fields
from qlora_jax.models.layer_types import attentions_of
from qlora_jax.nn.blocks import AttentionProjections, GatedMLP, Keys
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.nn.norms import RMSNorm
from qlora_jax.nn.rotary import RotaryConfig

_CONDITIONAL = "Gemma3ForConditionalGeneration"
_READ = frozenset((
    "layer_types", "query_pre_attn_scalar", "rope_local_base_freq", "sliding_window", "sliding_window_pattern",
    "_sliding_window_pattern",
))  # fmt: skip
_NEUTRAL = {
    "attention_bias": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "use_bidirectional_attention": (False, None),
}
# Fields beside the text part's, none of which concerns it.
_OUTER = frozenset((
    "boi_token_index", "eoi_token_index", "image_token_index", "image_token_id", "boi_token_id", "eoi_token_id",
    "mm_tokens_per_image", "vision_config", "text_config",
))  # fmt: skip
_ROPE_OF = {"sliding_attention": "local", "full_attention": "global"}


@dataclasses.dataclass(frozen=True)
class Gemma3Config(DecoderConfig):
    """A Gemma 3 text model; `conditional`: it is the text part of one that sees images too."""

    conditional: bool = False


def read_config(config: Mapping[str, Any]) -> Gemma3Config:
    """Read config.json; UserError names a field that is missing, unknown or not implemented."""
    conditional = (config.get("architectures") or [""])[0] == _CONDITIONAL
    text = config
    if conditional:
        nested = config.get("text_config")
        if not isinstance(nested, Mapping) or not nested:
            raise UserError("config.json: text_config must be an object with the text part's fields.")
        text = {"architectures": config["architectures"], **nested}
        if "tie_word_embeddings" in config:
            text["tie_word_embeddings"] = config["tie_word_embeddings"]
        for name in sorted(set(config) - set(_OUTER) - INERT - {"tie_word_embeddings"}):
            if name not in text or text[name] != config[name]:
                raise UserError(f"config.json: field {name!r} outside text_config is not supported for {_CONDITIONAL}.")
    fields = decoder_fields(text, "Gemma3TextConfig", read=_READ, neutral=_NEUTRAL)
    return Gemma3Config(
        **{**shared_fields({"eos_token_id": text.get("eos_token_id"), **config}, fields), "source": config},
        attentions=attentions_of(fields, scale=fields["query_pre_attn_scalar"] ** -0.5, ropes=_ROPE_OF),
        rotary=_rotary(text, fields),
        conditional=conditional,
    )


def _rotary(text: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[tuple[str, RotaryConfig], ...]:
    """The two tables; a scaling stretches the global one only."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(text.get(name), Mapping | None):
            raise UserError(f"config.json: {name} must be an object, not {text[name]!r}.")
    nested = text.get("rope_parameters") or {}
    for name in sorted(set(nested) - set(_ROPE_OF)):
        raise UserError(f"config.json: rope_parameters.{name} is not supported beside the types of attention.")
    by_type = {kind: nested.get(kind) for kind in _ROPE_OF}
    if nested and not all(by_type.values()):
        raise UserError("config.json: rope_parameters must have sliding_attention and full_attention.")
    if not nested:
        by_type["sliding_attention"] = {"rope_theta": text.get("rope_local_base_freq", 1e4)}
        by_type["full_attention"] = {
            **(text.get("rope_scaling") or {}),
            "rope_theta": text.get("rope_theta", 1e6),
        }

    def table(parameters: Any) -> RotaryConfig:
        return RotaryConfig.from_hf(
            {"rope_parameters": parameters}, fields["head_dim"], fields["max_position_embeddings"]
        )

    return tuple((_ROPE_OF[kind], table(parameters)) for kind, parameters in by_type.items())


class Gemma3Layer(nnx.Module):
    """Attention and a gated MLP, each between two norms (1 + weight); queries and keys are normed by head."""

    def __init__(self, config: Gemma3Config, qlora: QLoRAConfig, stack: tuple[int, ...]):
        def norm(features: int) -> RMSNorm:
            return RMSNorm(features, eps=config.rms_norm_eps, offset=1.0, stack=stack)

        hidden = config.hidden_size
        gelu = functools.partial(jax.nn.gelu, approximate=True)
        self.input_layernorm = norm(hidden)
        self.self_attn = AttentionProjections(hidden, config.heads, qlora, stack, head_norm=norm)
        self.post_attention_layernorm = norm(hidden)
        self.pre_feedforward_layernorm = norm(hidden)
        self.mlp = GatedMLP(hidden, config.intermediate_size, gelu, qlora, stack)
        self.post_feedforward_layernorm = norm(hidden)

    def pre_attention(self, i: int, h: Array, rope: tuple[Array, Array] | None, keys: Keys) -> tuple[Array, ...]:
        """Queries, keys and values."""
        return self.self_attn.project(self.input_layernorm(h), rope, keys)

    def post_attention(self, i: int, h: Array, attended: Array, keys: Keys) -> Array:
        """Residual attention, then residual MLP."""
        h = h + self.post_attention_layernorm(self.self_attn.output(attended, keys))
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h), keys))


def make_model(config: Gemma3Config, qlora: QLoRAConfig) -> DecoderLM:
    """Declare the model without its weights."""
    layer = functools.partial(Gemma3Layer, config, qlora)
    return DecoderLM(config, qlora, layer, embedding_scale=math.sqrt(config.hidden_size), norm_offset=1.0)


def _names(config: Gemma3Config) -> tuple[Name, ...]:
    plus_one = "plus_one"
    table = decoder_names(
        *head_norm_names(plus_one),
        in_layer("post_attention_layernorm", "post_attention_norm", plus_one),
        in_layer("pre_feedforward_layernorm", "ffn_norm", plus_one),
        in_layer("post_feedforward_layernorm", "post_ffw_norm", plus_one),
        norm_layout=plus_one,
    )
    if not config.conditional:
        return table
    # Its files say language_model.model.layers, its modules are model.language_model.layers.
    return tuple(
        name._replace(hf=f"language_model.{name.hf}", peft_name=name.hf.replace("model.", "model.language_model.", 1))
        for name in table
    )


def _redundant(config: Gemma3Config) -> tuple[str, ...]:
    head = (r"language_model\.lm_head\.weight",) if config.tie_word_embeddings else ()
    return (*redundant_tensors(config), *head)


# Since transformers 4.52 its files are named as its modules are.
_NEWER_NAMES = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


def _gguf_fields(config: Mapping[str, Any], metadata: Callable[[str], Any], tensors: Collection[str]) -> dict[str, Any]:
    """Fields that llama.cpp takes for granted, as its src/models/gemma3.cpp does."""
    layers = config["num_hidden_layers"]
    # The largest model scales by hidden / heads, the others by the width of a head; no key says so.
    scale = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else config["head_dim"]
    pattern = metadata("attention.sliding_window_pattern")
    if not config.get("sliding_window"):
        sliding = [False] * layers
    elif isinstance(pattern, list):
        sliding = pattern
    else:
        period = 6 if pattern is None else pattern
        sliding = [not period or (layer + 1) % period > 0 for layer in range(layers)]
    kinds = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    return {"query_pre_attn_scalar": scale, "layer_types": kinds}


def _gguf_metadata(config: Gemma3Config) -> dict[str, Any]:
    """Window, pattern and table of the sliding layers; the pattern only where it is not the usual one."""
    windows = [attention.window for attention in config.attentions]
    window = next((window for window in windows if window is not None), None)
    written: dict[str, Any] = {} if window is None else {"attention.sliding_window": window}
    slides = [window is not None for window in windows]
    if window is not None and slides != [(layer + 1) % 6 > 0 for layer in range(len(slides))]:
        written["attention.sliding_window_pattern"] = slides
    return {**written, "rope.freq_base_swa": dict(config.rotary)["local"].theta}


FAMILY = Family(
    title="Gemma 3 (text)",
    architectures=("Gemma3ForCausalLM", _CONDITIONAL),
    config=read_config,
    model=make_model,
    names=_names,
    lora_groups=LORA_GROUPS,
    gguf=GGUF(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        fields={
            "attention.sliding_window": "sliding_window",
            "final_logit_softcapping": "final_logit_softcapping",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        reads=("attention.sliding_window_pattern",),
        derived=_gguf_fields,
        written=_gguf_metadata,
        rope="global",
    ),
    ignored=_redundant,
    skipped={r"(model\.)?(vision_tower|multi_modal_projector)\..*": "the vision tower and its projector"},
    other_parts=lambda config: config.conditional,
    aliases=lambda config: _NEWER_NAMES if config.conditional else {},
)
