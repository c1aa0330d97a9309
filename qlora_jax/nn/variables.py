"""Kinds of variables: frozen base tensors, and what trains.

A variable is declared once, *abstractly*: its value is a `jax.ShapeDtypeStruct` (or a `QuantizedTensor` of them), its
metadata name the logical axes and, where it trains, the initialiser. Loading, sharding, planning and restoring all read
that one declaration, so that a model of any size exists before a byte of its weights does.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

Axes = tuple[str | None, ...]
"""Logical name of each axis of a tensor: layers, rows, vocabulary, rank, or None; see `qlora_jax.sharding`."""

Initializer = Callable[[Array, tuple[int, ...], Any], Array]
"""initializer(key, shape, dtype) -> array; a function of a module, so that two declarations of a model are equal."""


class Frozen(nnx.Variable):
    """A base-model tensor: read by the forward pass, never trained.

    Deliberately *not* an `nnx.Param`: no filter for parameters may ever catch a base weight. Its value is an array or a
    `QuantizedTensor`. Metadata: `kind`, one of linear, embedding, head, norm, bias; `axes`.
    """


class Trainable(nnx.Variable):
    """A variable that gradients and the optimizer see: an adapter matrix, or a head that trains in full.

    Declared float32, which is what is saved. While it trains its value may be a 16-bit working copy of that, or a
    `GradientSlot` around either. Metadata: `initializer`, `axes`.
    """


class LoRAParam(Trainable):
    """One matrix of a low-rank adapter."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientSlot:
    """A trained matrix with a place for its float32 gradient, whatever its own dtype.

    JAX gives a gradient the dtype of what it is taken with respect to; with respect to a 16-bit working copy, every
    sum over micro-batches would be rounded to 16 bits. Differentiate with respect to `slot` instead.

    Attributes:
        matrix: [*stack, rows, columns], any floating dtype.
        slot: float32 of that shape; its gradient is the matrix's. Its values are never read.
    """

    matrix: Any
    slot: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowAdapters:
    """A matrix of several adapters, one of them for each row of a batch; for generation.

    Attributes:
        matrices: [*stack, A, rows, columns].
        rows: int32 [*stack, B], adapter of each row of the batch.
        scalings: float32 [*stack, B], factor of each row's product.
    """

    matrices: Any
    rows: Any
    scalings: Any


@jax.custom_vjp
def _read(matrix: Array, slot: Array) -> Array:
    """`matrix` in float32; its cotangent goes to `slot`."""
    return matrix.astype(slot.dtype)


_read.defvjp(lambda matrix, slot: (_read(matrix, slot), None), lambda _, cotangent: (None, cotangent))


def frozen_array(shape: tuple[int, ...], dtype: Any, kind: str, axes: Axes) -> Frozen:
    """Declare an unquantised base tensor; `axes` names one logical axis for each of its dimensions."""
    if len(axes) != len(shape):
        raise ValueError(f"{len(shape)} dimensions {shape} need as many axes, not {axes}.")
    return Frozen(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), kind=kind, axes=axes)


def trained_value(variable: Trainable) -> Array:
    """Value of a trained variable as the forward pass reads it; a gradient goes to its slot where it has one."""
    value = variable.get_value()
    return _read(value.matrix, value.slot) if isinstance(value, GradientSlot) else value


def zeros(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Initialise with zeros."""
    return jnp.zeros(shape, dtype)


def kaiming_uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Initialise [..., out, in] uniformly within 1 / sqrt(in), as PEFT does A of an adapter.

    That is torch's Kaiming-uniform with a = sqrt(5), whose bound is sqrt(6 / ((1 + 5) in)).
    """
    bound = 1 / math.sqrt(shape[-1])
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)
