"""QuantizedTensor: a frozen weight as packed codes and scales, a pytree that jit, scan and shardings can carry."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization.codebooks import NESTED_BLOCK_SIZE
from qlora_jax.quantization.formats import FORMATS, Format, format_named


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Storage of the linear layers of a base model.

    Attributes:
        quant_type: a name of `FORMATS`, or "none" (left as they are).
        block_size: elements that share one scale; of a format that has a size of its own it is always that.
        double_quant: store those scales in 8 bits; always False of a format whose scales cannot be.

    Raises:
        UserError: for any other value.
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        """Check the values, and fill in those that the format decides."""
        if self.quant_type == "none":
            return
        if self.quant_type not in FORMATS:
            raise UserError(f"quant_type must be one of {', '.join(FORMATS)} or none, not {self.quant_type!r}.")
        kind = self.format
        if kind.block_size is not None:
            object.__setattr__(self, "block_size", kind.block_size)
        if not kind.double_quant:
            object.__setattr__(self, "double_quant", False)
        kind.check_block_size(self.block_size)

    def of(self, linear: str) -> "QuantizationConfig":
        """Return the storage of a linear by its name: the same for all; see `MixedQuantization`."""
        return self

    def check_rows(self, inputs: int, name: str) -> None:
        """Raise UserError unless a linear's rows are whole blocks: one that ran over an end would tie two outputs.

        Args:
            inputs: elements of a row.
            name: of the linear, for the message.
        """
        if self.quant_type != "none" and self.block_size and inputs % self.block_size:
            raise UserError(
                f"`block_size={self.block_size}` does not divide the {inputs} inputs of {name}; choose a power of two "
                f"that does."
            )

    @property
    def format(self) -> Format:
        """The format; KeyError for "none"."""
        return FORMATS[self.quant_type]

    def __str__(self) -> str:
        """For people."""
        if self.quant_type == "none":
            return "16-bit weights"
        kind = self.format
        if kind.block_size is not None:
            return kind.name
        double = f" {'with' if self.double_quant else 'without'} double quantisation" if kind.double_quant else ""
        return f"{kind.name} in blocks of {self.block_size}{double}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantised weight, or a stack of them, of logical shape ``[*stack, *shape]``.

    Only the buffers carry the stack dimensions, so a slice of a stack (by `jax.lax.scan` or `jax.tree.map`) is again a
    valid QuantizedTensor. With n the number of elements of `shape` and n_blocks = ceil(n / block_size):

    4 bits, over the flattened row-major weight::

        codes          uint8   [*stack, ceil(n / 2)]         element 2i in the high nibble of byte i, 2i + 1 in the low
        absmax         float32 [*stack, n_blocks]            stored scales: uint8 with double quantisation and of "e8m0"
                                                             and "e4m3", float16 of such formats (`Format.scale`)
        nested_absmax  float32 [*stack, ceil(n_blocks / 256)] with double quantisation, else None
        offset         float32 [*stack]                      with double quantisation, else None
        minimum        float16 [*stack, n_blocks]            uint8 of zero points; None of a format without
        scale_map      float32 [*stack, 256]                 of "e4m3", else None

        scale[b] = absmax[b]                                                        "float32", "float16"
                   dynamic_map[absmax[b]] * nested_absmax[b // 256] + offset        with double quantisation
                   2^(absmax[b] - 127)                                              "e8m0"
                   scale_map[absmax[b]]                                             "e4m3"
        low[b]   = minimum[b], or -minimum[b] * scale[b] of zero points, or 0
        w[i]     = dtype(table[code[i]] * scale[i // block_size] + low[i // block_size])   in float32, left to right

    8 bits in blocks ("q8_0")::

        codes          int8    [*stack, n]
        absmax         float16 [*stack, n_blocks]

        w[i]     = dtype(codes[i] * absmax[i // block_size])                        in float32

    8 bits row by row of a [N, K] weight ("int8", block_size 0)::

        codes          int8    [*stack, N, K]
        absmax         float32 [*stack, N]

        w[i, j]  = dtype(codes[i, j] * absmax[i] * float32(1 / 127))                left to right in float32

    `table` and `dynamic_map` are constants (`qlora_jax.quantization.codebooks`), found by `quant_type` and not stored.
    Of "nf4", "fp4" and "int8" the buffers are the bytes of a bitsandbytes checkpoint. `dtype` is the name of the
    original weight's dtype and what `dequantize` returns by default. Leaves may be numpy or JAX arrays,
    ShapeDtypeStructs or anything that a pytree transformation puts there, so nothing is checked on construction.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    quant_type: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    minimum: Any = None
    scale_map: Any = None

    @property
    def format(self) -> Format:
        """Its row of `FORMATS`."""
        return FORMATS[self.quant_type]

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
        quant_type: a name of `FORMATS`.
        block_size: elements per scale, of a format that leaves it open.
        double_quant: whether the scales are quantised, of a format whose scales can be.
        dtype: dtype or dtype name of the original weight.
        stack: leading dimensions that stack such weights.

    Raises:
        UserError: unknown quant_type or block_size, or an int8 weight that is not a matrix.
    """
    shape, stack, dtype = tuple(shape), tuple(stack), jnp.dtype(dtype).name
    kind = format_named(quant_type)
    block_size = block_size if kind.block_size is None else kind.block_size
    kind.check_block_size(block_size)
    n = math.prod(shape)

    def buffer(dtype: Any, *own: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*stack, *own), dtype)

    if quant_type == "int8":
        if len(shape) != 2:
            raise UserError(f"int8 quantisation is row-wise and needs a [N, K] weight, not one of shape {shape}.")
        codes, absmax = buffer(jnp.int8, *shape), buffer(jnp.float32, shape[0])
        return QuantizedTensor(codes, absmax, None, None, shape, quant_type, 0, dtype)
    n_blocks = -(-n // block_size)
    codes = buffer(jnp.int8, n) if kind.bits == 8 else buffer(jnp.uint8, -(-n // 2))
    double_quant = double_quant and kind.double_quant
    stored = {"float32": jnp.uint8 if double_quant else jnp.float32, "float16": jnp.float16}
    return QuantizedTensor(
        codes,
        buffer(stored.get(kind.scale, jnp.uint8), n_blocks),
        buffer(jnp.float32, -(-n_blocks // NESTED_BLOCK_SIZE)) if double_quant else None,
        buffer(jnp.float32) if double_quant else None,
        shape,
        quant_type,
        block_size,
        dtype,
        minimum=buffer({"float16": jnp.float16, "zero_point": jnp.uint8}[kind.minimum], n_blocks)
        if kind.minimum != "none"
        else None,
        scale_map=buffer(jnp.float32, 256) if kind.scale == "e4m3" else None,
    )
