"""Parts that decoder-only families share: configuration, the language model around a stack, names of tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.choices import CacheDtype, Remat
from qlora_jax.kernels.xla import contract
from qlora_jax.models.family import LAYER, Name
from qlora_jax.models.hf_config import decoder_fields, eos_token_ids
from qlora_jax.models.layer_types import attentions_of
from qlora_jax.nn.attention import Attention
from qlora_jax.nn.blocks import AttentionProjections, Embedding, GatedMLP, Keys
from qlora_jax.nn.kv_cache import Cache
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.nn.norms import RMSNorm
from qlora_jax.nn.rotary import RotaryConfig, rotary_tables
from qlora_jax.nn.stack import Context, Stack
from qlora_jax.quantization import QuantizationConfig

LORA_GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of one decoder-only model; field names follow Hugging Face's config.json.

    Attributes:
        architecture: Hugging Face's class, which tells the family, see `qlora_jax.models.family_of`.
        attentions: the attention of each layer.
        rotary: (name, table) of the rotary tables that attentions name.
        eos_token_ids: tokens that end a sequence.
        source: the contents of config.json that this was read from.
        stored: storage of the linears that the checkpoint holds quantised already, by name, see
            `qlora_jax.models.quantization_config`.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attentions: tuple[Attention, ...]
    rotary: tuple[tuple[str, RotaryConfig], ...]
    eos_token_ids: tuple[int, ...]
    source: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)
    stored: tuple[tuple[str, QuantizationConfig], ...] = dataclasses.field(default=(), compare=False)

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key and value heads, width of a head)."""
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def rotary_follows_length(self) -> bool:
        """True if what has been turned for some tokens must be turned anew for more of them."""
        return any(table.kind == "dynamic" for _, table in self.rotary)


def shared_fields(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `DecoderConfig` that every family reads alike, all but `attentions` and `rotary`.

    Args:
        config: contents of config.json.
        fields: what `hf_config.decoder_fields` made of it, or of its text part.
    """
    names = {field.name for field in dataclasses.fields(DecoderConfig)} - {
        "architecture",
        "attentions",
        "rotary",
        "eos_token_ids",
        "source",
        "stored",
    }
    return {
        **{name: fields[name] for name in names},
        "architecture": config["architectures"][0],
        "rms_norm_eps": float(fields["rms_norm_eps"]),
        "eos_token_ids": eos_token_ids(config),
        "source": config,
    }


SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish", None)}
"""Activations of a feed-forward layer that `PreNormLayer` computes, as config.json may call them."""


def default_rotary(config: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[tuple[str, RotaryConfig], ...]:
    """Rotary tables of a family that has one for all layers; arguments as for `shared_fields`."""
    return (("default", RotaryConfig.from_hf(config, fields["head_dim"], fields["max_position_embeddings"])),)


def read_windowed_config(
    config: Mapping[str, Any], hf_class: str, neutral: Mapping[str, tuple[Any, ...]]
) -> DecoderConfig:
    """Read config.json of a decoder of `PreNormLayer`s, any of which may slide, and that has no field of its own.

    Args:
        config: contents of config.json.
        hf_class: transformers' configuration class, see `hf_config.decoder_fields`.
        neutral: fields that the family does not implement -> values under which that makes no difference.

    Raises:
        UserError: a field is missing, unknown or not implemented; names it.
    """
    read = frozenset(("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"))
    fields = decoder_fields(config, hf_class, read=read, neutral={**SILU, **neutral})
    return DecoderConfig(
        **shared_fields(config, fields), attentions=attentions_of(fields), rotary=default_rotary(config, fields)
    )


class PreNormLayer(nnx.Module):
    """LLaMA's layer: attention, then a gated MLP, each behind a norm and added to the residual stream.

    Declared with a leading axis of layers, called on one slice of it; see `qlora_jax.nn.stack.Layer`.

    Args:
        config: of the model.
        qlora: how linears are stored and computed.
        stack: leading layer axes.
        qkv_bias, o_bias, mlp_bias: linears that have biases.
        head_norm: RMS norm over each head of queries and keys.
    """

    def __init__(
        self,
        config: DecoderConfig,
        qlora: QLoRAConfig,
        stack: tuple[int, ...],
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        head_norm: bool = False,
    ):
        def norm(features: int) -> RMSNorm:
            return RMSNorm(features, eps=config.rms_norm_eps, stack=stack)

        self.input_layernorm = norm(config.hidden_size)
        self.self_attn = AttentionProjections(
            config.hidden_size,
            config.heads,
            qlora,
            stack,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            head_norm=norm if head_norm else None,
        )
        self.post_attention_layernorm = norm(config.hidden_size)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, jax.nn.silu, qlora, stack, bias=mlp_bias)

    def pre_attention(self, i: int, h: Array, rope: tuple[Array, Array] | None, keys: Keys) -> tuple[Array, ...]:
        """Queries, keys and values."""
        return self.self_attn.project(self.input_layernorm(h), rope, keys)

    def post_attention(self, i: int, h: Array, attended: Array, keys: Keys) -> Array:
        """Residual attention, then residual MLP."""
        h = h + self.self_attn.output(attended, keys)
        return h + self.mlp(self.post_attention_layernorm(h), keys)


class DecoderLM(nnx.Module):
    """A causal language model with frozen base weights and optional adapters.

    Built without weights (see `qlora_jax.nn.variables`); fill it with `qlora_jax.models.fill_base` and `initialize`.

    Args:
        config: of the model.
        qlora: how it is stored and computed.
        layer: layer(stack) -> the layers' module with those leading axes.
        embedding_scale: embeddings are multiplied by it.
        norm_offset: of the final norm, see `RMSNorm`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        qlora: QLoRAConfig,
        layer: Callable[[tuple[int, ...]], nnx.Module],
        *,
        embedding_scale: float | None = None,
        norm_offset: float = 0.0,
    ):
        self.config, self.dtype, self.rules = config, qlora.dtype, qlora.rules
        size = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(*size, qlora, "embedding", embedding_scale)
        self.layers = layer((config.num_hidden_layers,))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, offset=norm_offset)
        self.lm_head = None if config.tie_word_embeddings else Embedding(*size, qlora, "head")

    @property
    def stack(self) -> Stack:
        """The executor of the layers."""
        return Stack.of(self.config.attentions, self.rules)

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        cache: Cache | None = None,
        counts: Int[Array, " B"] | None = None,
        dropout_key: Array | None = None,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        """Final hidden states [B, S, D] (multiply by `head` for logits) and the updated cache.

        Args:
            input_ids: token ids.
            positions: rotary positions; they restart at 0 in every packed document.
            segment_ids: document of each token in a packed row (0 = padding): attention stays inside a document. None
                means one document a row, padding (if any) on the right, where causality alone hides it.
            cache: keys and values so far; the tokens are appended to it.
            counts: with a cache, tokens of each row; what follows them is padding. None for all.
            dropout_key: key for adapter dropout, or None for none.
            remat: what of a layer is kept for the backward pass, see `Stack.__call__`.
        """
        h = self.embed_tokens(input_ids, self.dtype)
        ctx = self.context(positions, segment_ids)
        if cache is not None and (segment_ids is not None or dropout_key is not None or remat != "none"):
            raise ValueError("A cache is for generation: no segment_ids, dropout_key or remat.")
        if cache is None and counts is not None:
            raise ValueError("Counts are of tokens that a cache is given.")
        if cache is None:
            h = self.stack(self.layers, h, ctx, remat=remat, dropout_key=dropout_key)
            return self.norm(h), None
        counts = jnp.full(input_ids.shape[0], input_ids.shape[1]) if counts is None else counts
        h, cache = self.stack.decode(self.layers, h, ctx, cache, counts)
        return self.norm(h), cache

    def context(self, positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"] | None = None) -> Context:
        """Return what all layers see of tokens; arguments as for `__call__`."""
        with jax.named_scope("rotary_tables"):
            rope = {name: rotary_tables(table, positions) for name, table in self.config.rotary}
        return Context(rope, segment_ids)

    def empty_cache(self, batch: int, capacity: int, *, dtype: CacheDtype = "auto", margin: int = 0) -> Cache:
        """Room for `capacity` tokens in each of `batch` rows; see `Stack.empty_cache`."""
        _, kv_heads, head_dim = self.config.heads
        kept = jnp.dtype(self.dtype if dtype == "auto" else dtype)
        return self.stack.empty_cache(batch, capacity, (kv_heads, head_dim), kept, margin=margin)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output projection: the embedding itself where the two are tied."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).table()

    def logits(self, h: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
        """Logits in float32."""
        with jax.named_scope("head"):
            return contract(h, self.head.astype(h.dtype), axis=1)


def decoder_names(*extra: Name, interleaved: bool = False, norm_layout: str = "as_is") -> tuple[Name, ...]:
    """Names of the modules that all decoders have, and `extra` ones.

    Args:
        extra: names that the family adds; one with the `ours` of a shared name replaces it.
        interleaved: llama.cpp stores the rows of q and k for interleaved rotary embedding.
        norm_layout: llama.cpp's change of norms, see `Name`.
    """
    heads = "interleaved_heads" if interleaved else "as_is"
    shared = (
        Name("embed_tokens", "model.embed_tokens", "token_embd"),
        in_layer("input_layernorm", "attn_norm", norm_layout),
        in_layer("self_attn.q_proj", "attn_q", heads),
        in_layer("self_attn.k_proj", "attn_k", heads),
        in_layer("self_attn.v_proj", "attn_v"),
        in_layer("self_attn.o_proj", "attn_output"),
        in_layer("post_attention_layernorm", "ffn_norm", norm_layout),
        in_layer("mlp.gate_proj", "ffn_gate"),
        in_layer("mlp.up_proj", "ffn_up"),
        in_layer("mlp.down_proj", "ffn_down"),
        Name("norm", "model.norm", "output_norm", norm_layout),
        Name("lm_head", "lm_head", "output"),
    )
    return tuple({name.ours: name for name in (*shared, *extra)}.values())


def in_layer(module: str, gguf: str, layout: str = "as_is") -> Name:
    """Name of a module of the layers, whose path is ours and Hugging Face's."""
    return Name(f"layers.{module}", f"model.layers.{LAYER}.{module}", f"blk.{LAYER}.{gguf}", layout)


def head_norm_names(layout: str = "as_is") -> tuple[Name, Name]:
    """Names of the norms over heads of queries and keys."""
    return in_layer("self_attn.q_norm", "attn_q_norm", layout), in_layer("self_attn.k_norm", "attn_k_norm", layout)


def redundant_tensors(config: DecoderConfig) -> tuple[str, ...]:
    """Inverse frequencies that old checkpoints carry, and the head's copy of a tied embedding."""
    return (r".*\.rotary_emb\.inv_freq", *((r"lm_head\.weight",) if config.tie_word_embeddings else ()))
