"""Attention for training: cuDNN's flash attention where a GPU has it, few copies of q, k and v anywhere."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

# Name of what a rematerialisation policy keeps to have attention computed once (see qlora_jax.nn.remat).
ATTENTION = "attention"
# Rows of one head that a flash-attention block works on, and blocks that keep the largest GPU busy several times over:
# a group of heads smaller than that would leave it idle.
_BLOCK_ROWS, _BUSY_BLOCKS = 128, 1024


def head_groups(tokens: int, heads: int, kv_heads: int) -> int:
    """Groups of heads that attend one after the other: as many as leave every group enough work for a large GPU."""
    divisors = (n for n in range(kv_heads, 0, -1) if kv_heads % n == 0)
    return next((n for n in divisors if tokens * (heads // n) >= _BLOCK_ROWS * _BUSY_BLOCKS), 1)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Static facts of one attention of a layer.

    Attributes:
        causal: a token sees itself and what comes before it; otherwise all tokens.
        window: keys that a query sees, itself included, on each side that it sees; None for all.
        rope: name of the rotary table that turns its queries and keys; None for none.
        scale: the scores are multiplied by it; None for head_dim ** -0.5.
        cross: keys and values come from an encoder's output, all of it: not causal, no window, no rotary table.
    """

    causal: bool = True
    window: int | None = None
    rope: str | None = "default"
    scale: float | None = None
    cross: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window}: a query sees at least itself.")
        if self.cross and (self.causal or self.window is not None or self.rope is not None):
            raise ValueError("cross-attention sees the whole encoder output: causal=False, no window, rope=None.")

    @property
    def local_window(self) -> tuple[int, int] | None:
        """Keys seen to the left and right of a query, as `jax.nn.dot_product_attention` takes them."""
        return None if self.window is None else (self.window - 1, 0 if self.causal else self.window - 1)

    def visible(self, queries: Int[Array, " S"], keys: Int[Array, " T"]) -> Bool[Array, "S T"]:
        """True where a query at one place may see a key at another."""
        distance = queries[:, None] - keys[None, :]
        seen = jnp.ones(distance.shape, bool)
        if self.causal:
            seen &= distance >= 0
        if self.window is not None:
            seen &= jnp.abs(distance) < self.window
        return seen


CAUSAL = Attention()


def segment_mask(
    facts: Attention, segment_ids: Int[Array, "B S"], key_segment_ids: Int[Array, "B T"] | None = None
) -> Bool[Array, "B 1 S T"]:
    """Mask of packed rows: within a segment, and where `facts` let a query look.

    Args:
        facts: of the attention.
        segment_ids: document of every token.
        key_segment_ids: document of every key, for cross-attention; by default the queries'.
    """
    keys = segment_ids if key_segment_ids is None else key_segment_ids
    mask = segment_ids[:, None, :, None] == keys[:, None, None, :]
    if facts.cross:
        return mask
    return mask & facts.visible(jnp.arange(segment_ids.shape[1]), jnp.arange(keys.shape[1]))


def attend(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    facts: Attention = CAUSAL,
    mask: Bool[Array, "B 1 S T"] | None = None,
) -> Float[Array, "B S H E"]:
    """Attend as `facts` say; or, given a mask, wherever that allows it (it must follow `facts` itself).

    Compiled for CUDA in 16 bits this is cuDNN's flash attention, which keeps no scores [B, H, S, T] in memory; anywhere
    else, and for what cuDNN cannot do, XLA's. Long sequences attend by groups of heads (`head_groups`): besides q, k,
    v, the output and its cotangent, only one group's arrays exist, and the gradients take the place of q, k and v.
    """
    with jax.named_scope("attention"):
        if _groups(q, k) == 1 and not _cudnn_can(q, k, v, facts, mask):
            return checkpoint_name(attend_xla(q, k, v, facts, mask), ATTENTION)
        return _attend(facts, q, k, v, mask)


def attend_xla(q: Array, k: Array, v: Array, facts: Attention, mask: Array | None) -> Array:
    """Attend by products and a softmax that XLA compiles; the scores exist."""
    # A mask has causality and window already.
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=facts.scale,
        is_causal=facts.causal and mask is None,
        local_window_size=facts.local_window if mask is None else None,
    )


def _attend_cudnn(q: Array, k: Array, v: Array, facts: Attention, mask: Array | None) -> Array:
    window = facts.local_window if mask is None else None
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=facts.scale,
        is_causal=facts.causal,
        local_window_size=window,
        implementation="cudnn",
    )


def cudnn_obstacle(q: Any, k: Any, v: Any, facts: Attention, mask: Any) -> str | None:
    """Reason why cuDNN cannot do an attention, such as too wide a head or a mask of odd length; None if it can.

    The arguments are those of `attend`, or their shapes. Only tracing is tried.
    """
    if q.dtype.itemsize != 2:
        return f"{q.dtype} has not 16 bits."

    def gradient(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return jax.grad(lambda q: _attend_cudnn(q, k, v, facts, mask).astype(jnp.float32).sum())(q)

    try:
        jax.eval_shape(gradient, q, k, v, mask)
    except RuntimeError as error:
        return str(error)
    return None


def _cudnn_can(q: Array, k: Array, v: Array, facts: Attention, mask: Array | None) -> bool:
    return cudnn_obstacle(q, k, v, facts, mask) is None


def forward(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    facts: Attention,
    mask: Bool[Array, "B 1 S T"] | None,
) -> tuple[Float[Array, "B S H E"], Float[Array, "B H S"]]:
    """Attend, and return the statistics of the rows of scores that `backward` needs as well."""
    groups, (batch, seq, heads, _) = _groups(q, k), q.shape

    def on_cuda(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
        out, vjp = jax.vjp(lambda q, k, v: _attend_cudnn(q, k, v, facts, mask), q, k, v)
        return out, _statistics(vjp, out)

    def elsewhere(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
        # The backward pass recomputes the scores and asks for no statistics.
        return attend_xla(q, k, v, facts, mask), jnp.zeros((q.shape[0], q.shape[2], seq), jnp.float32)

    one = _on_platform(on_cuda, elsewhere, _cudnn_can(q, k, v, facts, mask))
    if groups == 1:
        return one(q, k, v, mask)

    def group(g: Array, done: tuple[Array, Array]) -> tuple[Array, Array]:
        out, statistics = done
        new, new_statistics = one(*(_heads(x, g, groups) for x in (q, k, v)), mask)
        return _with_heads(out, new, g), _with_heads(statistics, new_statistics, g, axis=1)

    empty = (jnp.zeros_like(q), jnp.zeros((batch, heads, seq), jnp.float32))
    return jax.lax.fori_loop(0, groups, group, empty)


def backward(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T K E"],
    facts: Attention,
    mask: Bool[Array, "B 1 S T"] | None,
    saved: tuple[Float[Array, "B S H E"], Float[Array, "B H S"]],
    d_out: Float[Array, "B S H E"],
) -> tuple[Float[Array, "B S H E"], Float[Array, "B T K E"], Float[Array, "B T K E"]]:
    """Gradients of q, k and v from what `forward` returned, `saved`, and the cotangent of its output."""
    out, statistics = saved
    groups = _groups(q, k)

    def on_cuda(
        q: Array, k: Array, v: Array, out: Array, statistics: Array, d_out: Array, mask: Array | None
    ) -> tuple[Array, Array, Array]:
        again, vjp = jax.vjp(lambda q, k, v: _attend_cudnn(q, k, v, facts, mask), q, k, v)
        return _restored(vjp, again, out, statistics)(d_out)

    def elsewhere(
        q: Array, k: Array, v: Array, out: Array, statistics: Array, d_out: Array, mask: Array | None
    ) -> tuple[Array, Array, Array]:
        return jax.vjp(lambda q, k, v: attend_xla(q, k, v, facts, mask), q, k, v)[1](d_out)

    one = _on_platform(on_cuda, elsewhere, _cudnn_can(q, k, v, facts, mask))
    if groups == 1:
        return one(q, k, v, out, statistics, d_out, mask)

    def group(g: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # What has been attended already holds gradients.
        mine = [_heads(x, g, groups) for x in (*carry, out)]
        new = one(*mine, _heads(statistics, g, groups, axis=1), _heads(d_out, g, groups), mask)
        dq, dk, dv = (_with_heads(x, dx, g) for x, dx in zip(carry, new, strict=True))
        return dq, dk, dv

    return jax.lax.fori_loop(0, groups, group, (q, k, v))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(facts: Attention, q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return forward(q, k, v, facts, mask)[0]


def _attend_forward(facts: Attention, q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, Any]:
    out, statistics = (checkpoint_name(x, ATTENTION) for x in forward(q, k, v, facts, mask))
    return out, (q, k, v, mask, out, statistics)


def _attend_backward(facts: Attention, residuals: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out, statistics = residuals
    return *backward(q, k, v, facts, mask, (out, statistics), d_out), None


_attend.defvjp(_attend_forward, _attend_backward)


def _groups(q: Array, k: Array) -> int:
    return head_groups(q.shape[0] * q.shape[1], q.shape[2], k.shape[2])


def _statistics(vjp: Any, out: Array) -> Array:
    """The log-sum-exp of every row of scores, [B, H, S], which cuDNN's forward pass keeps for its backward pass."""
    return next(x for x in vjp.opaque_residuals if _is_statistics(x, out))


def _is_statistics(x: Array, out: Array) -> bool:
    batch, seq, heads, _ = out.shape
    # A mask is kept too, as a bias [B, 1, S, S].
    return x.shape == (batch, heads, seq)


def _restored(vjp: Any, again: Array, out: Array, statistics: Array) -> Any:
    """`vjp` with the residuals of an earlier forward pass: the one it was made with is then not computed."""

    def restored(x: Array) -> Array:
        return out if x is again else statistics if _is_statistics(x, again) else x

    return vjp.replace(opaque_residuals=[restored(x) for x in vjp.opaque_residuals])


def _on_platform(on_cuda: Callable[..., Any], elsewhere: Callable[..., Any], cudnn: bool) -> Callable[..., Any]:
    if not cudnn:
        return elsewhere
    return functools.partial(jax.lax.platform_dependent, cuda=on_cuda, default=elsewhere)


def _heads(x: Array, group: Array, groups: int, axis: int = 2) -> Array:
    size = x.shape[axis] // groups
    return jax.lax.dynamic_slice_in_dim(x, group * size, size, axis)


def _with_heads(x: Array, new: Array, group: Array, axis: int = 2) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), group * new.shape[axis], axis)
