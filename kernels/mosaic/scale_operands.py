"""The operands of a kernel that the scales of a weight are made from, by name."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from qlora_jax.kernels.mosaic.tiles import WeightFormat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleOperands:
    """Buffers of a stack of L [N, K] weights, or a kernel's refs of them; None what a format does not have.

    A kernel takes those that are there in this order.

    Attributes:
        stored: stored scales [L, N K / block_size].
        nested: scales of those, float32 [L, N K / block_size / 256 or more] (double quantization).
        offset: float32 [L] (double quantization).
        table: the dynamic map, float32 [1, 256] (double quantization).
        minimum: minima, as the scales.
        scale_map: float32 [L, 256] ("e4m3").
    """

    stored: Any
    nested: Any = None
    offset: Any = None
    table: Any = None
    minimum: Any = None
    scale_map: Any = None

    @classmethod
    def named(cls, operands: Iterable[Any], weight_format: WeightFormat) -> "ScaleOperands":
        """Name the operands that a kernel was given."""
        kind = weight_format.format
        has = {
            "stored": True,
            "nested": weight_format.double_quant,
            "offset": weight_format.double_quant,
            "table": weight_format.double_quant,
            "minimum": kind.minimum != "none",
            "scale_map": kind.scale == "e4m3",
        }
        return cls(**dict(zip((name for name, there in has.items() if there), operands, strict=True)))

    @property
    def operands(self) -> tuple[Any, ...]:
        """Those that are there, in order."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(operand for operand in fields if operand is not None)
