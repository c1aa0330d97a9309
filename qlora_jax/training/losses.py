"""Next-token cross-entropy without logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qlora_jax.data import IGNORED

# Most tokens whose logits exist at a time: enough for a full-speed product, few of a batch.
_CHUNK = 512
# Most logits at a time: 128 MiB in float32.
_CHUNK_LOGITS = 2**25
# Rows of the head that a CPU multiplies at a time when it sums over the vocabulary: 2 MiB at 1024 columns in bfloat16.
_VOCABULARY_BLOCK = 1024


def next_token_loss(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "V D"],
    labels: Int[Array, "B S"],
    *,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum the next-token cross-entropies, in nats, and count the trained tokens.

    The head is frozen, so the gradient of `hidden` is all that is differentiated; it is computed together with the
    loss, chunk by chunk, and no logits are kept or computed twice. Only tokens that are trained take part: they are
    gathered first, so a batch that is half prompt costs half.

    Args:
        hidden: final hidden states, any floating dtype.
        head: output projection; its product with `hidden` is summed in float32.
        labels: labels[:, i] is the target *at* token i, as Hugging Face aligns it, so it is predicted from
            hidden[:, i - 1]; IGNORED marks tokens that are not trained.
        chunk: tokens whose logits exist at a time; by default up to 512, fewer for a large vocabulary.
    """
    batch, seq, width = hidden.shape
    targets = jnp.roll(labels, -1, axis=1).at[:, -1].set(IGNORED).reshape(-1)
    rows = batch * seq
    chunk = min(chunk or default_chunk(head.shape[0]), rows)
    # Trained tokens first, in order; the tail up to a whole chunk is not trained.
    order = jnp.argsort(targets == IGNORED, stable=True)
    padded = -(-rows // chunk) * chunk
    order = jnp.concatenate([order, jnp.zeros(padded - rows, order.dtype)])
    count = jnp.sum(targets != IGNORED)
    targets = jnp.where(jnp.arange(padded) < count, targets[order], IGNORED)
    gathered = hidden.reshape(rows, width)[order]
    return _loss_of_rows(chunk, gathered, head.astype(hidden.dtype), targets, count), count


def default_chunk(vocabulary: int) -> int:
    """Return the number of tokens whose logits exist at a time, unless the batch has fewer."""
    return max(64, min(_CHUNK, _CHUNK_LOGITS // vocabulary // 64 * 64))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_of_rows(chunk: int, rows: Array, head: Array, targets: Array, count: Array) -> Array:
    """Sum the loss of the first `count` rows [T, D]; T is a multiple of `chunk`."""

    def add(i: Array, total: Array) -> Array:
        return total + _chunk_loss(*_slice(i, chunk, rows, targets), head)[0]

    return jax.lax.fori_loop(0, _chunks(count, chunk), add, jnp.zeros((), jnp.float32))


def _loss_forward(chunk: int, rows: Array, head: Array, targets: Array, count: Array) -> tuple[Array, Array]:
    def add(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, gradient = carry
        part, part_targets = _slice(i, chunk, rows, targets)
        loss, exponentials, normaliser, trained = _chunk_loss(part, part_targets, head)
        probabilities = exponentials / normaliser
        hit = jax.nn.one_hot(part_targets, head.shape[0], dtype=probabilities.dtype)
        d_logits = jnp.where(trained[:, None], probabilities - hit, 0).astype(rows.dtype)
        with jax.named_scope("head"):
            d_rows = jax.lax.platform_dependent(d_logits, head, cpu=_by_vocabulary_blocks, default=_product)
        d_rows = d_rows.astype(rows.dtype)
        return total + loss, jax.lax.dynamic_update_slice(gradient, d_rows, (i * chunk, 0))

    start = (jnp.zeros((), jnp.float32), jnp.zeros_like(rows))
    return jax.lax.fori_loop(0, _chunks(count, chunk), add, start)


def _loss_backward(chunk: int, gradient: Array, cotangent: Array) -> tuple[Array, None, None, None]:
    return (gradient * cotangent).astype(gradient.dtype), None, None, None


_loss_of_rows.defvjp(_loss_forward, _loss_backward)


def _product(d_logits: Array, head: Array) -> Array:
    return jnp.einsum("tv,vd->td", d_logits, head, preferred_element_type=jnp.float32)


def _by_vocabulary_blocks(d_logits: Array, head: Array) -> Array:
    # The same sum, a block of the vocabulary at a time: a CPU first rearranges the right-hand side of a product, and a
    # block of the head still lies in its cache when it is multiplied.
    blocks, rest = divmod(head.shape[0], _VOCABULARY_BLOCK)
    if not blocks:
        return _product(d_logits, head)

    def add(i: Array | int, total: Array, size: int = _VOCABULARY_BLOCK) -> Array:
        start = i * _VOCABULARY_BLOCK
        columns = jax.lax.dynamic_slice_in_dim(d_logits, start, size, axis=1)
        return total + _product(columns, jax.lax.dynamic_slice_in_dim(head, start, size))

    total = jnp.zeros((d_logits.shape[0], head.shape[1]), jnp.float32)
    total = jax.lax.fori_loop(0, blocks, add, total)
    return add(blocks, total, rest) if rest else total


def _chunks(count: Array, chunk: int) -> Array:
    return (count + chunk - 1) // chunk


def _slice(i: Array, chunk: int, rows: Array, targets: Array) -> tuple[Array, Array]:
    return (
        jax.lax.dynamic_slice_in_dim(rows, i * chunk, chunk),
        jax.lax.dynamic_slice_in_dim(targets, i * chunk, chunk),
    )


def _chunk_loss(rows: Array, targets: Array, head: Array) -> tuple[Array, Array, Array, Array]:
    """Return (summed loss, exp(logits - max) [T, V], its row sums [T, 1], mask of trained rows [T]), in float32."""
    with jax.named_scope("head"):
        logits = jnp.einsum("td,vd->tv", rows, head, preferred_element_type=jnp.float32)
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(shifted)
    normaliser = jnp.sum(exponentials, axis=-1, keepdims=True)
    trained = targets != IGNORED
    hit = jnp.take_along_axis(shifted, jnp.where(trained, targets, 0)[:, None], axis=-1)
    losses = (jnp.log(normaliser) - hit)[:, 0]
    return jnp.sum(jnp.where(trained, losses, 0.0)), exponentials, normaliser, trained
