"""Reading of Hugging Face's config.json: strict about fields, with transformers' own defaults for absent ones."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from qlora_jax.environment import import_transformers
from qlora_jax.errors import UserError

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
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
}

# Fields that every decoder reads.
DECODER = frozenset({
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
})  # fmt: skip
_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
)  # fmt: skip
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
            hint = " (give a 16-bit checkpoint; it is quantised here)" if field == "quantization_config" else ""
            raise UserError(f"config.json: {field} = {config[field]!r} is not supported{hint}.")
    given = {name: value for name, value in config.items() if name in DECODER | read and name not in _ROPE}
    given = {name: value for name, value in given.items() if value is not None or name not in _NULLABLE}
    _check_positive(given)
    if not isinstance(given.get("rms_norm_eps", 1e-6), int | float):
        raise UserError(f"config.json: rms_norm_eps must be a number between 0 and 1, not {given['rms_norm_eps']!r}.")
    if given.get("head_dim", 2) % 2:
        raise UserError(f"config.json: head_dim {given['head_dim']} must be even: its halves are rotated.")
    pattern = given.get("sliding_window_pattern", 1)
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
        raise UserError(f"config.json: sliding_window_pattern must be a positive integer, not {pattern!r}.")
    check_layer_types(given)
    fields = {**_defaults(hf_class, json.dumps(given, sort_keys=True)), **given}
    _check_positive({name: fields[name] for name in _POSITIVE if name in fields})
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
    eps = fields["rms_norm_eps"]
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 < eps < 1:
        raise UserError(f"config.json: rms_norm_eps must be a number between 0 and 1, not {eps!r}.")
    original = config.get("original_max_position_embeddings")
    if original is not None and (not isinstance(original, int) or isinstance(original, bool) or original < 1):
        raise UserError(f"config.json: original_max_position_embeddings must be a positive integer, not {original!r}.")
    if not isinstance(fields["tie_word_embeddings"], bool):
        raise UserError(
            f"config.json: tie_word_embeddings must be true or false, not {fields['tie_word_embeddings']!r}."
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


def _check_positive(fields: Mapping[str, Any]) -> None:
    for field in _POSITIVE:
        value = fields.get(field)
        if field in fields and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"config.json: {field} must be a positive integer, not {value!r}.")


def check_layer_types(fields: Mapping[str, Any]) -> None:
    """Refuse a `layer_types` that does not name a known kind of attention for every layer."""
    types, layers = fields.get("layer_types"), fields.get("num_hidden_layers")
    if types is None:
        return
    if not isinstance(types, list) or (layers is not None and len(types) != layers):
        raise UserError(f"config.json: layer_types must name each of the {layers} layers.")
    unknown = sorted(set(map(str, types)) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(f"config.json: layer_types {unknown[0]!r} is not supported.")


@functools.lru_cache(maxsize=64)
def _defaults(hf_class: str, given: str) -> dict[str, Any]:
    fields = json.loads(given)
    try:
        return getattr(import_transformers(), hf_class)(**fields).to_dict()
    except Exception as error:  # its checks raise several types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"config.json: transformers' {hf_class} refuses it: {reason}.") from error
