"""Adam and Lion with their moments in 8 bits, block by block, as in bitsandbytes (Dettmers et al. 2022)."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Shaped

from qlora_jax.quantization.codebooks import dynamic_map

BLOCK_SIZE = 256
MIN_8BIT_SIZE = 4096

# The smallest float32 that XLA does not flush to zero; its inverse is finite.
_TINY = np.finfo(np.float32).tiny


class Blockwise8bit(NamedTuple):
    """An array in 8 bits: entry i of the flattened array is ``map[codes[i]] * absmax[i // 256]``.

    `codes` is uint8 in the array's own shape; `absmax` is float32 [ceil(n / 256)], the largest magnitude in each block.
    """

    codes: Any
    absmax: Any


class ScaleByAdam8bitState(NamedTuple):
    """Updates made, int32 scalar; both moments, each a `Blockwise8bit`, or float32 where the matrix is small."""

    count: Any
    mu: Any
    nu: Any


class ScaleByLion8bitState(NamedTuple):
    """The moment, a `Blockwise8bit`, or float32 where the matrix is small."""

    mu: Any


@functools.cache
def _thresholds(signed: bool) -> np.ndarray:
    """Boundaries between codes, float32[255]: the code of a value is the number of boundaries below it.

    Half-way values go to the even code, as in bitsandbytes' CUDA kernels. These also keep a negative moment from
    becoming zero, for which there is a boundary at zero itself.
    """
    table = dynamic_map(signed)
    thresholds = (table[:-1] + table[1:]) / np.float32(2)
    thresholds[1::2] = np.nextafter(thresholds[1::2], np.float32(-1))
    if signed:
        thresholds[np.searchsorted(table, 0) - 1] = -_TINY
    return thresholds


def quantize_moment(values: Float[Array, "*shape"], *, signed: bool) -> Blockwise8bit:
    """Store finite float32 values in 8 bits.

    With `signed` the map has both signs; without, values must not be negative. A block of zeros has scale zero.
    """
    blocks = _to_blocks(values)
    absmax = jnp.abs(blocks).max(axis=1)
    scaled = blocks * (1 / jnp.maximum(absmax, _TINY))[:, None]
    # A binary search with codes of 8 bits: jnp.searchsorted's leaves several arrays of 32 bits in memory.
    thresholds = jnp.asarray(_thresholds(signed))
    codes = jnp.zeros(scaled.shape, jnp.uint8)
    for bit in (128, 64, 32, 16, 8, 4, 2, 1):
        threshold = thresholds.at[codes + np.uint8(bit - 1)].get(mode="promise_in_bounds")
        codes += jnp.where(scaled > threshold, np.uint8(bit), np.uint8(0))
    return Blockwise8bit(_from_blocks(codes, values.shape), absmax)


def dequantize_moment(moment: Blockwise8bit, *, signed: bool) -> Float[Array, "*shape"]:
    """Return the float32 values that `quantize_moment` stored."""
    values = jnp.asarray(dynamic_map(signed))[_to_blocks(moment.codes)] * moment.absmax[:, None]
    return _from_blocks(values, moment.codes.shape)


def _to_blocks(array: Shaped[Array, "*shape"]) -> Shaped[Array, "blocks 256"]:
    """Cut the flattened array into blocks, the last filled up with zeros."""
    return jnp.pad(array.reshape(-1), (0, -array.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)


def _from_blocks(blocks: Shaped[Array, "blocks 256"], shape: tuple[int, ...]) -> Shaped[Array, "*shape"]:
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)


def _zero_moment(parameter: Any) -> Any:
    if parameter.size < MIN_8BIT_SIZE:
        return jnp.zeros(parameter.shape, jnp.float32)
    blocks = -(-parameter.size // BLOCK_SIZE)
    return Blockwise8bit(jnp.zeros(parameter.shape, jnp.uint8), jnp.zeros(blocks, jnp.float32))


def _load(moment: Any, *, signed: bool) -> Any:
    return dequantize_moment(moment, signed=signed) if isinstance(moment, Blockwise8bit) else moment


def _store(values: Any, *, signed: bool) -> Any:
    return values if values.size < MIN_8BIT_SIZE else quantize_moment(values, signed=signed)


def _bias_correction(decay: float, count: Any) -> Any:
    """Return ``1 - decay**count`` to float32's precision, even if the power is close to 1."""
    return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's rescaling (`optax.scale_by_adam`) with both moments kept in 8 bits.

    As bitsandbytes' block-wise kernels: the step is taken with the new moments before they are stored, and `eps` is
    added to the bias-corrected root. Matrices of fewer than 4096 entries keep float32 moments. Where a gradient is not
    finite the update is not either (the CUDA kernel leaves such entries out).
    """

    def init(params: Any) -> ScaleByAdam8bitState:
        return ScaleByAdam8bitState(
            jnp.zeros([], jnp.int32), jax.tree.map(_zero_moment, params), jax.tree.map(_zero_moment, params)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByAdam8bitState]:
        del params
        count = optax.safe_increment(state.count)
        correction1, correction2 = _bias_correction(b1, count), jnp.sqrt(_bias_correction(b2, count))
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        mu = jax.tree.map(lambda g, m: b1 * _load(m, signed=True) + (1 - b1) * g, gradients, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * _load(v, signed=False) + (1 - b2) * g * g, gradients, state.nu)
        scaled = jax.tree.map(lambda m, v: m / correction1 / (jnp.sqrt(v) / correction2 + eps), mu, nu)
        stored = ScaleByAdam8bitState(
            count,
            jax.tree.map(functools.partial(_store, signed=True), mu),
            jax.tree.map(functools.partial(_store, signed=False), nu),
        )
        return scaled, stored

    return optax.GradientTransformation(init, update)


def scale_by_lion_8bit(b1: float, b2: float) -> optax.GradientTransformation:
    """Lion's sign (`optax.scale_by_lion`, Chen et al. 2023) with the moment kept in 8 bits.

    Matrices of fewer than 4096 entries keep a float32 moment.
    """

    def init(params: Any) -> ScaleByLion8bitState:
        return ScaleByLion8bitState(jax.tree.map(_zero_moment, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByLion8bitState]:
        del params
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        mu = jax.tree.map(lambda _, m: _load(m, signed=True), gradients, state.mu)
        signs = jax.tree.map(lambda g, m: jnp.sign(b1 * m + (1 - b1) * g), gradients, mu)
        mu = jax.tree.map(lambda g, m: _store(b2 * m + (1 - b2) * g, signed=True), gradients, mu)
        return signs, ScaleByLion8bitState(mu)

    return optax.GradientTransformation(init, update)
