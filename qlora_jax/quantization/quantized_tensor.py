"""QuantizedTensor: a frozen weight as packed codes and scales, a pytree that jit, scan and shardings can carry."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization.codebooks import BLOCK_SIZES, NESTED_BLOCK_SIZE

QUANT_TYPES = ("nf4", "fp4", "int8")


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Storage of the linear layers of a base model.

    Attributes:
        quant_type: "nf4" or "fp4" (4 bits, block-wise), "int8" (8 bits, row-wise) or "none" (left as they are).
        block_size: elements that share one scale, a power of two in 32..4096; not used by "int8" and "none".
        double_quant: store those scales in 8 bits; not used by "int8" and "none".

    Raises:
        UserError: for any other value.
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if self.quant_type not in (*QUANT_TYPES, "none"):
            raise UserError(f"quant_type must be one of nf4, fp4, int8 or none, not {self.quant_type!r}.")
        check_block_size(self.block_size)


def check_block_size(block_size: int) -> None:
    """Raise UserError unless `block_size` is one that bitsandbytes knows."""
    if block_size not in BLOCK_SIZES:
        raise UserError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantised weight, or a stack of them, of logical shape ``[*stack, *shape]``.

    Only the buffers carry the stack dimensions, so a slice of a stack (by `jax.lax.scan` or `jax.tree.map`) is again a
    valid QuantizedTensor. With n the number of elements of `shape` and n_blocks = ceil(n / block_size):

    4 bits ("nf4", "fp4"), over the flattened row-major weight::

        codes          uint8   [*stack, ceil(n / 2)]         element 2i in the high nibble of byte i, 2i + 1 in the low
        absmax         uint8   [*stack, n_blocks]            with double quantisation, else float32
        nested_absmax  float32 [*stack, ceil(n_blocks / 256)] with double quantisation, else None
        offset         float32 [*stack]                      with double quantisation, else None

        scale[b] = dynamic_map[absmax[b]] * nested_absmax[b // 256] + offset        (or absmax[b])
        w[i]     = dtype(table[code[i]] * scale[i // block_size])                   both products in float32

    8 bits ("int8", block_size 0), row by row of a [N, K] weight::

        codes          int8    [*stack, N, K]
        absmax         float32 [*stack, N]

        w[i, j]  = dtype(codes[i, j] * absmax[i] * float32(1 / 127))                left to right in float32

    `table` and `dynamic_map` are constants (`qlora_jax.quantization.codebooks`), found by `quant_type` and not stored.
    The buffers are the bytes of a bitsandbytes checkpoint. `dtype` is the name of the original weight's dtype and what
    `dequantize` returns by default. Leaves may be numpy or JAX arrays, ShapeDtypeStructs or anything that a pytree
    transformation puts there, so nothing is checked on construction.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    quant_type: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def n_elements(self) -> int:
        """Elements of one weight, without the stack dimensions."""
        return math.prod(self.shape)

    @property
    def double_quant(self) -> bool:
        """True if the scales themselves are quantized."""
        return self.nested_absmax is not None

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading dimensions that stack weights of the same shape: () for a single weight."""
        own_dims = 2 if self.quant_type == "int8" else 1
        return tuple(self.codes.shape[: self.codes.ndim - own_dims])

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, counted from their shapes and dtypes."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits for one element, scales included."""
        return 8 * self.nbytes / (self.n_elements * math.prod(self.stack_shape))


def abstract_quantized(
    shape: tuple[int, ...],
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    dtype: Any = "bfloat16",
    stack: tuple[int, ...] = (),
) -> QuantizedTensor:
    """Return the QuantizedTensor that `quantize` would, with `jax.ShapeDtypeStruct` for buffers.

    Args:
        shape: shape of one weight; (N, K) for "int8".
        quant_type: "nf4", "fp4" or "int8".
        block_size: elements per scale (4-bit types).
        double_quant: whether the scales are quantised (4-bit types).
        dtype: dtype or dtype name of the original weight.
        stack: leading dimensions that stack such weights.

    Raises:
        UserError: unknown quant_type or block_size, or an int8 weight that is not a matrix.
    """
    shape, stack, dtype = tuple(shape), tuple(stack), jnp.dtype(dtype).name
    if quant_type == "int8":
        if len(shape) != 2:
            raise UserError(f"int8 quantisation is row-wise and needs a [N, K] weight, not one of shape {shape}.")
        codes = jax.ShapeDtypeStruct((*stack, *shape), jnp.int8)
        absmax = jax.ShapeDtypeStruct((*stack, shape[0]), jnp.float32)
        return QuantizedTensor(codes, absmax, None, None, shape, quant_type, 0, dtype)
    if quant_type not in QUANT_TYPES:
        raise UserError(f"quant_type must be one of {', '.join(QUANT_TYPES)}, not {quant_type!r}.")
    check_block_size(block_size)
    n = math.prod(shape)
    n_blocks = -(-n // block_size)
    codes = jax.ShapeDtypeStruct((*stack, -(-n // 2)), jnp.uint8)
    absmax = jax.ShapeDtypeStruct((*stack, n_blocks), jnp.uint8 if double_quant else jnp.float32)
    nested, offset = None, None
    if double_quant:
        nested = jax.ShapeDtypeStruct((*stack, -(-n_blocks // NESTED_BLOCK_SIZE)), jnp.float32)
        offset = jax.ShapeDtypeStruct(stack, jnp.float32)
    return QuantizedTensor(codes, absmax, nested, offset, shape, quant_type, block_size, dtype)
