"""Reading of Hugging Face's config.json: strict about fields, with transformers' own defaults for absent ones."""

import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from pydantic import ConfigDict, Field, TypeAdapter

from qlora_jax.environment import import_transformers
from qlora_jax.errors import UserError
from qlora_jax.json_text import check_type

# Fields of config.json that do not change what any model here computes.
INERT = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures", "attn_implementation",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "is_llama_config", "label2id", "length_penalty", "max_length", "max_sequence_length",
    "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
})  # fmt: skip

# Fields that would change what is computed, and the only values under which they do not.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleaved": (False, None),
}

# Fields that every decoder reads.
DECODER = frozenset({
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
})  # fmt: skip

# Far beyond any model, so that a damaged number is refused before something is made in its size.
_Layers = Annotated[int, Field(ge=1, le=4096)]
_Width = Annotated[int, Field(ge=1, le=2**24)]
_Length = Annotated[int, Field(ge=1, lt=2**31)]
_Constant = Annotated[float, Field(ge=1e-6, le=1e9)]


class _Fields(TypedDict, total=False):
    """Types of the fields of config.json that a decoder may read."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    vocab_size: _Width
    hidden_size: _Width
    intermediate_size: _Width
    num_hidden_layers: _Layers
    num_attention_heads: _Width
    num_key_value_heads: _Width
    head_dim: Annotated[int, Field(ge=2, le=2**16, multiple_of=2)]  # its halves are rotated
    max_position_embeddings: _Length
    original_max_position_embeddings: _Length | None
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)]
    tie_word_embeddings: bool
    attention_bias: bool | None
    mlp_bias: bool | None
    layer_types: list[Literal["full_attention", "sliding_attention"]]
    max_window_layers: int | None
    sliding_window: _Length | None
    sliding_window_pattern: _Layers
    _sliding_window_pattern: _Layers
    use_sliding_window: bool | None
    query_pre_attn_scalar: _Constant
    rope_local_base_freq: Annotated[float, Field(gt=0, le=1e30)]


_FIELDS = TypeAdapter(_Fields)
# They may be null, which says that they follow from others.
_NULLABLE = frozenset(("num_key_value_heads", "head_dim", "layer_types"))


def decoder_fields(
    config: Mapping[str, Any],
    hf_class: str,
    *,
    read: frozenset[str] = frozenset(),
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
) -> dict[str, Any]:
    """Every field that a decoder reads, absent ones with the defaults of transformers' class.

    Args:
        config: contents of config.json, or its text part.
        hf_class: name of transformers' configuration class of the family, which knows what an absent field means.
        read: fields that the family reads beside `DECODER`.
        neutral: fields that the family does not implement -> values under which that makes no difference, beside
            `NEUTRAL`.

    Raises:
        UserError: a field is unknown, or has a value that is not implemented or no model could have; names it.
    """
    neutral = {**NEUTRAL, **(neutral or {})}
    for field in sorted(set(config) - INERT - DECODER - read - set(neutral)):
        raise UserError(f"config.json: field {field!r} is not supported for {architecture(config)}.")
    for field, allowed in neutral.items():
        if field in config and config[field] not in allowed:
            raise UserError(f"config.json: {field} = {config[field]!r} is not supported.")
    given = {name: value for name, value in config.items() if name in DECODER | read and name not in _ROPE}
    given = {name: value for name, value in given.items() if value is not None or name not in _NULLABLE}
    original = {"original_max_position_embeddings": config.get("original_max_position_embeddings")}
    check_type({**given, **original}, _FIELDS, "config.json: ")
    check_layer_types(given)
    fields = {**_defaults(hf_class, json.dumps(given, sort_keys=True)), **given}
    check_type({name: value for name, value in fields.items() if value is not None}, _FIELDS, "config.json: ")
    heads = fields["num_attention_heads"]
    if heads % fields["num_key_value_heads"]:
        raise UserError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{fields['num_key_value_heads']}."
        )
    if "head_dim" not in given and fields.get("head_dim") is None:
        fields["head_dim"] = fields["hidden_size"] // heads
    if (
        "head_dim" not in given
        and fields["head_dim"] * heads != fields["hidden_size"]
        and fields["hidden_size"] % heads
    ):
        raise UserError(
            f"config.json: hidden_size {fields['hidden_size']} is not a multiple of num_attention_heads {heads}."
        )
    return fields


# Read by `qlora_jax.nn.rotary`, which is stricter than transformers.
_ROPE = frozenset(("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"))


def architecture(config: Mapping[str, Any]) -> str:
    """Name of the model's class, for messages."""
    names = config.get("architectures") or [config.get("model_type", "this architecture")]
    return str(names[0])


def eos_token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end a sequence, by config.json."""
    stop = config.get("eos_token_id")
    ids = stop if isinstance(stop, list) else [] if stop is None else [stop]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            raise UserError(f"config.json: eos_token_id must be a token or a list of tokens, not {stop!r}.")
    return tuple(ids)


def check_layer_types(fields: Mapping[str, Any]) -> None:
    """Refuse a `layer_types` that does not name a known kind of attention for every layer."""
    types, layers = fields.get("layer_types"), fields.get("num_hidden_layers")
    if types is None:
        return
    check_type({"layer_types": types}, _FIELDS, "config.json: ")
    if layers is not None and len(types) != layers:
        raise UserError(f"config.json: layer_types must name each of the {layers} layers.")


@functools.lru_cache(maxsize=64)
def _defaults(hf_class: str, given: str) -> dict[str, Any]:
    fields = json.loads(given)
    try:
        return getattr(import_transformers(), hf_class)(**fields).to_dict()
    except Exception as error:  # its checks raise several types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"config.json: transformers' {hf_class} refuses it: {reason}.") from error
