"""Quantised formats as data: what a code stands for, how many share a scale, and how that scale is stored.

Every block-wise format decodes a weight by one equation, in float32::

    w = table[code] * scale[block] + minimum[block]

The kernels tabulate its sixteen values for each block, so that a new 4-bit format is a row of `FORMATS` and a pair of
functions that put its checkpoints' tensors into a `QuantizedTensor` and back.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from qlora_jax.errors import UserError
from qlora_jax.quantization.codebooks import BLOCK_SIZES, TABLES

ScaleType = Literal["float32", "float16", "e8m0", "e4m3"]
MinimumType = Literal["none", "float16", "zero_point"]


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to store the weights of a linear.

    Attributes:
        name: the `quant_type` of weights stored so.
        bits: of a code, 4 or 8.
        block_size: elements of a row that share a scale; None if the weight says how many, 0 for whole rows.
        scale: stored type of a scale: "float32", which may be quantised once more; "float16"; "e8m0", a power of two of
            8 bits; "e4m3", a code of 8 bits that the weight has a table of 256 float32 scales for.
        minimum: added to every element of a block: "none"; "float16", stored as such; "zero_point", -zero * scale of a
            stored integer.
        quantizes: True if `quantize` can make this type; the others are only taken over from checkpoints.
    """

    name: str
    bits: int = 4
    block_size: int | None = None
    scale: ScaleType = "float32"
    minimum: MinimumType = "none"
    quantizes: bool = False

    def __post_init__(self) -> None:
        """Refuse a 4-bit format without a table."""
        if self.bits == 4 and self.name not in TABLES:
            raise ValueError(f"no table of 16 values is called {self.name!r}")

    @property
    def double_quant(self) -> bool:
        """True if scales may be quantised once more."""
        return self.bits == 4 and self.scale == "float32"

    def check_block_size(self, block_size: int) -> None:
        """Raise UserError unless weights of this format may have blocks of `block_size` elements."""
        if self.block_size is not None:
            if block_size != self.block_size:
                raise UserError(f"block_size of {self.name} is {self.block_size}, not {block_size}.")
        elif self.scale == "float32":
            if block_size not in BLOCK_SIZES:
                raise UserError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}.")
        elif block_size != 32 and (block_size < 64 or block_size % 64):
            raise UserError(f"block_size of {self.name} must be 32 or a multiple of 64, not {block_size}.")


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        row.name: row
        for row in (
            Format("nf4", quantizes=True),
            Format("fp4", quantizes=True),
            Format("int4", quantizes=True),
            Format("q4_0", block_size=32, scale="float16", quantizes=True),
            Format("q4_1", block_size=32, scale="float16", minimum="float16", quantizes=True),
            Format("uint4", scale="float16", minimum="zero_point"),
            Format("mxfp4", block_size=32, scale="e8m0"),
            Format("nvfp4", block_size=16, scale="e4m3"),
            Format("q8_0", bits=8, block_size=32, scale="float16", quantizes=True),
            Format("int8", bits=8, block_size=0, quantizes=True),
        )
    }
)
"""`quant_type` -> its format."""


def format_named(quant_type: str) -> Format:
    """Return a format by its name.

    Raises:
        UserError: there is none of that name.
    """
    if quant_type not in FORMATS:
        raise UserError(f"quant_type must be one of {', '.join(FORMATS)}, not {quant_type!r}.")
    return FORMATS[quant_type]
