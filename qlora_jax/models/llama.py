"""The LLaMA family: LLaMA 1/2/3, SmolLM2, TinyLlama, Mistral (Touvron et al. 2023; Jiang et al. 2023).

One file holds the whole model. Layers are stacked on a leading axis L and scanned, so that compile time does not grow
with depth; each layer's weights are dequantised where they are used and nowhere else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.errors import UserError
from qlora_jax.models.common import TensorSpec, flatten, layer_of, split_model, split_stacks
from qlora_jax.nn import long_sequence
from qlora_jax.nn.attention import attend, attend_xla
from qlora_jax.nn.linear import QLoRAConfig, QLoRALinear, RMSNorm, frozen_array
from qlora_jax.nn.remat import LAYER_INPUT, Remat, rematerialised
from qlora_jax.nn.rotary import RotaryConfig, apply_rotary, rotary_tables

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
LINEARS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}

# Fields of config.json that do not change what the model computes.
_INERT = {
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures", "attn_implementation",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "is_llama_config", "label2id", "length_penalty", "max_length", "max_sequence_length",
    "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache",
}  # fmt: skip
# Fields that would change it, and the only values under which they do not.
_NEUTRAL = {
    "attention_dropout": (0, 0.0, None),
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
}
_READ = {
    "attention_bias", "head_dim", "hidden_size", "intermediate_size", "layer_types", "max_position_embeddings",
    "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings",
    "vocab_size",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of one LLaMA-family model; field names follow Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rotary: RotaryConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read a Hugging Face config dict.

        Raises:
            UserError: a field is missing, unknown, or has a value this model does not implement; names the field.
        """
        for field in sorted(set(config) - _INERT - _READ - set(_NEUTRAL)):
            raise UserError(f"config.json: field {field!r} is not supported for the LLaMA family.")
        for field, allowed in _NEUTRAL.items():
            if field in config and config[field] not in allowed:
                hint = " (give a 16-bit checkpoint; it is quantised here)" if field == "quantization_config" else ""
                raise UserError(f"config.json: {field} = {config[field]!r} is not supported{hint}.")
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(config.get(field), int) or config[field] < 1:
                raise UserError(f"config.json: {field} must be a positive integer, not {config.get(field)!r}.")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        mistral = (config.get("architectures") or [""])[0] == "MistralForCausalLM"
        # The two architectures disagree about what an absent field means.
        kv_heads = config.get("num_key_value_heads") or (
            8 if mistral and "num_key_value_heads" not in config else heads
        )
        head_dim = config.get("head_dim") or hidden // heads
        if heads % kv_heads:
            raise UserError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        if not config.get("head_dim") and hidden % heads:
            raise UserError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
        window = config.get("sliding_window", 4096) if mistral else None
        if not mistral and config.get("sliding_window") is not None:
            raise UserError("config.json: sliding_window is supported for MistralForCausalLM only.")
        layer_types = set(config.get("layer_types") or [])
        if layer_types - ({"sliding_attention"} if window else {"full_attention"}):
            raise UserError("config.json: layer_types that mix kinds of attention are not supported.")
        if mistral and (config.get("attention_bias") or config.get("mlp_bias")):
            raise UserError("config.json: attention_bias and mlp_bias are not supported for MistralForCausalLM.")
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rotary=RotaryConfig.from_hf(config, head_dim),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            sliding_window=window,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    keys, values: [L, B, T, K, head_dim]; valid: bool [B, T], False for padding and for slots not written yet;
    length: int32 [], slots written. Every row writes the same slot: prompts are padded on the left.
    """

    keys: Any
    values: Any
    valid: Any
    length: Any

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, capacity: int, dtype: Any) -> "KVCache":
        """Room for `capacity` tokens a row."""
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        return cls(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros((batch, capacity), bool),
            jnp.zeros((), jnp.int32),
        )


# One key for each linear of a layer, q, k, v, o, gate, up, down; None for no dropout.
DropoutKeys = tuple[Array | None, ...]


def _dropout_keys(key: Array | None) -> DropoutKeys:
    return (None,) * 7 if key is None else tuple(jax.random.split(key, 7))


class Attention(nnx.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, qlora: QLoRAConfig, stack: tuple[int, ...]):
        self.config = config
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

        def linear(name: str, n_in: int, n_out: int) -> QLoRALinear:
            return QLoRALinear(n_in, n_out, name=name, qlora=qlora, bias=config.attention_bias, stack=stack)

        self.q_proj = linear("q_proj", config.hidden_size, heads)
        self.k_proj = linear("k_proj", config.hidden_size, kv_heads)
        self.v_proj = linear("v_proj", config.hidden_size, kv_heads)
        self.o_proj = linear("o_proj", heads, config.hidden_size)

    def project(
        self, x: Float[Array, "B S D"], rotary: tuple[Array, Array], keys: DropoutKeys
    ) -> tuple[Float[Array, "B S H E"], Float[Array, "B S K E"], Float[Array, "B S K E"]]:
        """Queries, keys and values with their positions; `keys` are dropout keys, the first three for q, k, v."""
        batch, seq, _ = x.shape
        q = self.q_proj(x, keys[0]).reshape(batch, seq, -1, self.config.head_dim)
        k = self.k_proj(x, keys[1]).reshape(batch, seq, -1, self.config.head_dim)
        v = self.v_proj(x, keys[2]).reshape(batch, seq, -1, self.config.head_dim)
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v

    def attend_cached(
        self,
        q: Float[Array, "B S H E"],
        k: Float[Array, "B S K E"],
        v: Float[Array, "B S K E"],
        mask: Bool[Array, "B 1 S T"] | None,
        cache: tuple[Array, Array],
        place: tuple[Array, Array],
    ) -> tuple[Float[Array, "B S H E"], tuple[Array, Array]]:
        """Attend over `cache` = (keys, values), both [L, B, T, K, E], with k and v written at `place`.

        `place` is (layer, slot). All layers' caches are handed on, so that a loop over them writes them in place.
        """
        layer, slot = place
        start = (layer, 0, slot, 0, 0)
        written = (
            jax.lax.dynamic_update_slice(cache[0], k[None].astype(cache[0].dtype), start),
            jax.lax.dynamic_update_slice(cache[1], v[None].astype(cache[1].dtype), start),
        )
        k, v = (jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in written)
        # The mask may hide everything from a padded query, and one token a step leaves no scores to save.
        return attend_xla(q, k, v, mask, None), written


class MLP(nnx.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, qlora: QLoRAConfig, stack: tuple[int, ...]):
        def linear(name: str, n_in: int, n_out: int) -> QLoRALinear:
            return QLoRALinear(n_in, n_out, name=name, qlora=qlora, bias=config.mlp_bias, stack=stack)

        self.gate_proj = linear("gate_proj", config.hidden_size, config.intermediate_size)
        self.up_proj = linear("up_proj", config.hidden_size, config.intermediate_size)
        self.down_proj = linear("down_proj", config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B S D"], keys: DropoutKeys) -> Float[Array, "B S D"]:
        """Apply; `keys` are dropout keys for gate, up, down."""
        gate = jax.nn.silu(self.gate_proj(x, keys[0]))
        return self.down_proj(gate * self.up_proj(x, keys[1]), keys[2])


class Block(nnx.Module):
    """One transformer layer; declared with a leading axis L, called on one slice of it."""

    def __init__(self, config: LlamaConfig, qlora: QLoRAConfig, stack: tuple[int, ...]):
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, stack=stack)
        self.self_attn = Attention(config, qlora, stack)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, stack=stack)
        self.mlp = MLP(config, qlora, stack)

    def __call__(
        self,
        h: Float[Array, "B S D"],
        rotary: tuple[Array, Array],
        mask: Bool[Array, "B 1 S S"] | None,
        dropout_key: Array | None,
    ) -> Float[Array, "B S D"]:
        """Residual attention, then residual MLP."""
        keys = _dropout_keys(dropout_key)
        q, k, v = self.project(h, rotary, keys)
        return self.finish(h, attend(q, k, v, mask, self.window(mask)), keys)

    def decode(
        self,
        h: Float[Array, "B S D"],
        rotary: tuple[Array, Array],
        mask: Bool[Array, "B 1 S T"] | None,
        cache: tuple[Array, Array],
        place: tuple[Array, Array],
    ) -> tuple[Float[Array, "B S D"], tuple[Array, Array]]:
        """The same over a key-value cache (see `Attention.attend_cached`), which is returned with h's entries."""
        keys = _dropout_keys(None)
        q, k, v = self.project(h, rotary, keys)
        attended, written = self.self_attn.attend_cached(q, k, v, mask, cache, place)
        return self.finish(h, attended, keys), written

    def window(self, mask: Array | None) -> tuple[int, int] | None:
        """The sliding window as attention takes it; a mask has it already."""
        window = self.self_attn.config.sliding_window
        return None if mask is not None or window is None else (window - 1, 0)

    def project(
        self, h: Float[Array, "B S D"], rotary: tuple[Array, Array], keys: DropoutKeys
    ) -> tuple[Float[Array, "B S H E"], Float[Array, "B S K E"], Float[Array, "B S K E"]]:
        """What comes before attention: queries, keys and values."""
        return self.self_attn.project(self.input_layernorm(h), rotary, keys)

    def finish(
        self, h: Float[Array, "B S D"], attended: Float[Array, "B S H E"], keys: DropoutKeys
    ) -> Float[Array, "B S D"]:
        """What comes after attention: its output projection, added to h, and the MLP."""
        h = h + self.self_attn.o_proj(attended.reshape(*h.shape[:2], -1), keys[3])
        return h + self.mlp(self.post_attention_layernorm(h), keys[4:])


class Embedding(nnx.Module):
    """Token embedding [V, D], frozen."""

    def __init__(self, config: LlamaConfig, qlora: QLoRAConfig, kind: str):
        self.weight = frozen_array((config.vocab_size, config.hidden_size), qlora.dtype, kind)


class Llama(nnx.Module):
    """A LLaMA-family causal language model with frozen base weights and optional adapters.

    Built without weights (see `qlora_jax.nn.linear`); fill it with `qlora_jax.models.fill_base` and `init_lora`.
    """

    def __init__(self, config: LlamaConfig, qlora: QLoRAConfig):
        self.config = config
        self.dtype = qlora.dtype
        self.embed_tokens = Embedding(config, qlora, "embedding")
        self.layers = Block(config, qlora, (config.num_hidden_layers,))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Embedding(config, qlora, "head")

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        cache: KVCache | None = None,
        valid: Bool[Array, "B S"] | None = None,
        dropout_key: Array | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Final hidden states [B, S, D] (multiply by `head` for logits) and the updated cache.

        Args:
            input_ids: token ids.
            positions: rotary positions; they restart at 0 in every packed document.
            segment_ids: document of each token in a packed row (0 = padding): attention stays inside a document. None
                means one document a row, padding (if any) on the right, where causality alone hides it.
            cache: keys and values so far; the tokens are appended to it.
            valid: with a cache, False for the padding on the left of a prompt.
            dropout_key: key for adapter dropout, or None for none.
            remat: what of a layer is kept for the backward pass, see `qlora_jax.nn.remat`. With any policy but `none`,
                long sequences pass through all but attention by tiles (`qlora_jax.nn.long_sequence`).
        """
        h = jnp.take(self.embed_tokens.weight.get_value(), input_ids, axis=0).astype(self.dtype)
        rotary = rotary_tables(self.config.rotary, positions)
        batch, seq = input_ids.shape
        mask = None
        if cache is not None:
            valid = jnp.ones((batch, seq), bool) if valid is None else valid
            seen = jax.lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
            mask = self._mask(cache.length + jnp.arange(seq), jnp.arange(seen.shape[1])) & seen[:, None, None, :]
        elif segment_ids is not None:
            same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            mask = self._mask(jnp.arange(seq), jnp.arange(seq)) & same

        graphdef, layers = nnx.split(self.layers)
        stacks, layers = split_stacks(layers)
        n_layers = self.config.num_hidden_layers

        def block_of(index: Array, layer: nnx.State) -> Block:
            return nnx.merge(graphdef, layer, layer_of(stacks, index))

        if cache is not None:
            start = cache.length

            def decode(carry: tuple[Array, Any], xs: tuple[Array, nnx.State]) -> tuple[tuple[Array, Any], None]:
                h, written = carry
                index, layer = xs
                return block_of(index, layer).decode(h, rotary, mask, written, (index, start)), None

            stored = (cache.keys, cache.values)
            (h, (keys, values)), _ = jax.lax.scan(decode, (h, stored), (jnp.arange(n_layers), layers))
            return self.norm(h), KVCache(keys, values, seen, cache.length + seq)

        layer_keys = None if dropout_key is None else jax.random.split(dropout_key, n_layers)
        if remat != "none" and long_sequence.tile_size(batch * seq) < batch * seq:
            h = self._layers_by_tiles(h, rotary, mask, layer_keys, remat)
            return self.norm(h), None

        def body(h: Array, xs: tuple[Array, nnx.State, Array | None]) -> tuple[Array, None]:
            index, layer, layer_key = xs
            return block_of(index, layer)(checkpoint_name(h, LAYER_INPUT), rotary, mask, layer_key), None

        h, _ = jax.lax.scan(rematerialised(body, remat), h, (jnp.arange(n_layers), layers, layer_keys))
        return self.norm(h), None

    def _layers_by_tiles(
        self,
        h: Float[Array, "B S D"],
        rotary: tuple[Array, Array],
        mask: Bool[Array, "B 1 S S"] | None,
        layer_keys: Array | None,
        remat: Remat,
    ) -> Float[Array, "B S D"]:
        """The layers on a long sequence, see `qlora_jax.nn.long_sequence`."""
        graphdef, lora, frozen = split_model(self.layers)
        stacks, frozen = split_stacks(frozen)

        def block(place: tuple[Array, Array], lora: nnx.State, sliced: Any, stacks: Any) -> tuple[Block, DropoutKeys]:
            frozen, layer_key = sliced
            layer, tile = place
            key = None if layer_key is None else jax.random.fold_in(layer_key, tile)
            return nnx.merge(graphdef, lora, frozen, layer_of(stacks, layer)), _dropout_keys(key)

        def before(
            place: tuple[Array, Array],
            lora: nnx.State,
            sliced: Any,
            stacks: nnx.State,
            cos: Array,
            sin: Array,
            h: Array,
        ) -> tuple[Array, Array, Array]:
            one, keys = block(place, lora, sliced, stacks)
            q, k, v = one.project(h[None], (cos[None], sin[None]), keys)
            return q[0], k[0], v[0]

        def after(
            place: tuple[Array, Array], lora: nnx.State, sliced: Any, stacks: nnx.State, h: Array, attended: Array
        ) -> Array:
            one, keys = block(place, lora, sliced, stacks)
            return one.finish(h[None], attended[None], keys)[0]

        layer = long_sequence.Layer(before, after, self.layers.window(mask))
        return long_sequence.run(layer, remat, lora, (frozen, layer_keys), stacks, rotary, mask, h)

    def _mask(self, queries: Int[Array, " S"], slots: Int[Array, " T"]) -> Bool[Array, "1 1 S T"]:
        """Causal, and within the sliding window if the config has one."""
        distance = queries[:, None] - slots[None, :]
        mask = distance >= 0
        if self.config.sliding_window is not None:
            mask &= distance < self.config.sliding_window
        return mask[None, None]

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output projection: the embedding itself where the two are tied."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight.get_value()

    def logits(self, h: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Logits in float32."""
        return jnp.einsum("bsd,vd->bsv", h, self.head.astype(h.dtype), preferred_element_type=jnp.float32)


def tensor_specs(frozen: nnx.State) -> list[TensorSpec]:
    """Names and shapes of the base tensors as Hugging Face stores them, read off the abstract unquantised state."""
    values = flatten(frozen)
    kinds = {tuple(map(str, path)): variable.get_metadata("kind") for path, variable in nnx.to_flat_state(frozen)}
    top, stacked = [], []
    for path, value in values.items():
        if path[0] == "layers":
            stacked.append((path, value))
        else:
            name = ".".join(path) if path[0] == "lm_head" else "model." + ".".join(path)
            top.append(TensorSpec(path, None, name, value.shape, kinds[path]))
    n_layers = stacked[0][1].shape[0]
    layers = [
        TensorSpec(path, layer, f"model.layers.{layer}." + ".".join(path[1:]), value.shape[1:], kinds[path])
        for layer in range(n_layers)
        for path, value in stacked
    ]
    first = [spec for spec in top if spec.kind == "embedding"]
    return first + layers + [spec for spec in top if spec.kind != "embedding"]


def ignored_tensors(config: LlamaConfig) -> tuple[str, ...]:
    """Inverse frequencies that old checkpoints carry, and the head's copy of a tied embedding."""
    return (r".*\.rotary_emb\.inv_freq", *((r"lm_head\.weight",) if config.tie_word_embeddings else ()))


CONFIG, MODEL = LlamaConfig, Llama
