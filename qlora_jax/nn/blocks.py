"""Parts of transformer layers that families share: embedding, attention projections, gated feed-forward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.nn.linear import QLoRAConfig, QLoRALinear
from qlora_jax.nn.rotary import apply_rotary
from qlora_jax.nn.variables import frozen_array

Keys = Callable[[str], Array | None]
"""Dropout keys by the name of a linear, see `qlora_jax.nn.stack.DropoutKeys`."""


class Embedding(nnx.Module):
    """Token embedding or output head [V, D], frozen.

    Args:
        vocab_size: V.
        features: D.
        qlora: gives the dtype.
        kind: embedding or head.
        scale: embeddings are multiplied by it, rounded to the weight's dtype; None for 1.
    """

    def __init__(self, vocab_size: int, features: int, qlora: QLoRAConfig, kind: str, scale: float | None = None):
        self.scale, self.vocab_size, self.mesh_axis = scale, vocab_size, qlora.rules.mesh_axis("vocabulary")
        self.weight = frozen_array((vocab_size, features), qlora.dtype, kind, ("vocabulary", None))

    def __call__(self, ids: Int[Array, "B S"], dtype: Any) -> Float[Array, "B S D"]:
        """Look up the rows of `ids`."""
        with jax.named_scope("embedding"):
            table = self.table()
            h = jnp.take(table, ids, axis=0).astype(dtype)
            return h if self.scale is None else h * jnp.asarray(self.scale, table.dtype).astype(dtype)

    def table(self) -> Float[Array, "V D"]:
        """All rows, gathered where a device holds some of them."""
        table = self.weight.get_value()
        if self.mesh_axis is None or table.shape[0] == self.vocab_size:
            return table
        return jax.lax.all_gather(table, self.mesh_axis, tiled=True)


class AttentionProjections(nnx.Module):
    """Queries, keys and values of grouped-query attention with rotary positions, and its output projection.

    Args:
        features: D, width of the residual stream.
        heads: (query heads, key and value heads, width of a head).
        qlora: how linears are stored and computed.
        stack: leading layer axes.
        qkv_bias: q_proj, k_proj and v_proj have biases.
        o_bias: o_proj has one.
        head_norm: head_norm(head_dim) -> norm over each head of q and of k, before the rotation; None for none.
    """

    def __init__(
        self,
        features: int,
        heads: tuple[int, int, int],
        qlora: QLoRAConfig,
        stack: tuple[int, ...],
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        head_norm: Callable[[int], nnx.Module] | None = None,
    ):
        n_heads, kv_heads, self.head_dim = heads

        def linear(name: str, n_in: int, n_out: int, bias: bool) -> QLoRALinear:
            return QLoRALinear(n_in, n_out, name=name, qlora=qlora, bias=bias, stack=stack)

        self.q_proj = linear("q_proj", features, n_heads * self.head_dim, qkv_bias)
        self.k_proj = linear("k_proj", features, kv_heads * self.head_dim, qkv_bias)
        self.v_proj = linear("v_proj", features, kv_heads * self.head_dim, qkv_bias)
        self.o_proj = linear("o_proj", n_heads * self.head_dim, features, o_bias)
        self.q_norm = None if head_norm is None else head_norm(self.head_dim)
        self.k_norm = None if head_norm is None else head_norm(self.head_dim)

    def project(
        self, x: Float[Array, "B S D"], rope: tuple[Array, Array] | None, keys: Keys
    ) -> tuple[Float[Array, "B S H E"], Float[Array, "B S K E"], Float[Array, "B S K E"]]:
        """Queries, keys and values, turned by `rope`."""
        q, k, v = (
            linear(x, keys(linear.name)).reshape(*x.shape[:2], -1, self.head_dim)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if rope is not None:
            with jax.named_scope("rotary"):
                q, k = apply_rotary(q, *rope), apply_rotary(k, *rope)
        return q, k, v

    def output(self, attended: Float[Array, "B S H E"], keys: Keys) -> Float[Array, "B S D"]:
        """Project what was attended."""
        return self.o_proj(attended.reshape(*attended.shape[:2], -1), keys("o_proj"))


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU, GeGLU (Shazeer 2020).

    Args:
        features: D.
        intermediate: F, the hidden width.
        activation: of the gate.
        qlora: how linears are stored and computed.
        stack: leading layer axes.
        bias: the linears have biases.
    """

    def __init__(
        self,
        features: int,
        intermediate: int,
        activation: Callable[[Array], Array],
        qlora: QLoRAConfig,
        stack: tuple[int, ...],
        *,
        bias: bool = False,
    ):
        self.activation = activation

        def linear(name: str, n_in: int, n_out: int) -> QLoRALinear:
            return QLoRALinear(n_in, n_out, name=name, qlora=qlora, bias=bias, stack=stack)

        self.gate_proj = linear("gate_proj", features, intermediate)
        self.up_proj = linear("up_proj", features, intermediate)
        self.down_proj = linear("down_proj", intermediate, features)

    def __call__(self, x: Float[Array, "B S D"], keys: Keys) -> Float[Array, "B S D"]:
        """Apply."""
        with jax.named_scope("mlp"):
            gate = self.activation(self.gate_proj(x, keys("gate_proj")))
            return self.down_proj(gate * self.up_proj(x, keys("up_proj")), keys("down_proj"))
