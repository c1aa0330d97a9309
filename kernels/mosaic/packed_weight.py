"""A 4-bit weight as the kernels take it: two-dimensional views of the stored buffers, and which layer of a stack."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.kernels.mosaic import tiles
from qlora_jax.kernels.mosaic.scale_operands import ScaleOperands
from qlora_jax.quantization import QuantizedTensor
from qlora_jax.quantization.codebooks import NESTED_BLOCK_SIZE, dynamic_map


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """Views of the buffers of a stack of L quantized [N, K] weights, and the layer to use. Nothing is copied.

    Attributes:
        codes: uint8 [L, N, K / 2].
        scales: what the scales are made from.
        layer: int32 [1].
        quant_type: a 4-bit type of `quantization.FORMATS`.
        block_size: elements of one scale.
        n_rows: N before `with_rows`.
    """

    codes: jax.Array
    scales: ScaleOperands
    layer: jax.Array
    quant_type: str
    block_size: int
    n_rows: int

    @classmethod
    def of(cls, w: QuantizedTensor, layer: Any = None) -> "PackedWeight":
        """View a weight, or a stack of them of which `layer` (an int32 scalar) is used."""
        n, k = w.shape
        stack = w.stack_shape or (1,)

        def view(buffer: Any, *shape: int) -> jax.Array:
            return jnp.asarray(buffer).reshape(*stack, *shape)

        scales = ScaleOperands(
            view(w.absmax, -1),
            nested=view(w.nested_absmax, -1) if w.double_quant else None,
            offset=view(w.offset) if w.double_quant else None,
            table=jnp.asarray(dynamic_map())[None] if w.double_quant else None,
            minimum=None if w.minimum is None else view(w.minimum, -1),
            scale_map=None if w.scale_map is None else view(w.scale_map, 256),
        )
        layer = jnp.zeros(1, jnp.int32) if layer is None else jnp.asarray(layer, jnp.int32).reshape(1)
        return cls(view(w.codes, n, k // 2), scales, layer, w.quant_type, w.block_size, n)

    def with_rows(self, least: int) -> "PackedWeight":
        """Pad with rows of zero codes to `least` rows, and to a multiple of 8, which TMA needs; self if both hold."""
        n, k = self.shape
        rows = max(least, -(-n // 8) * 8)
        if rows == n:
            return self

        def pad(buffer: Any, size: int) -> Any:
            if buffer is None:
                return None
            widths = [(0, 0)] * buffer.ndim
            widths[1] = (0, max(0, size - buffer.shape[1]))
            return jnp.pad(buffer, widths)

        # Rounded up: rows of padding may end within a block, whose scale every kernel reads.
        blocks = -(-rows * k // self.block_size)
        scales = dataclasses.replace(
            self.scales,
            stored=pad(self.scales.stored, blocks),
            nested=pad(self.scales.nested, -(-blocks // NESTED_BLOCK_SIZE)),
            minimum=pad(self.scales.minimum, blocks),
        )
        return dataclasses.replace(self, codes=pad(self.codes, rows), scales=scales)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[1], 2 * self.codes.shape[2]

    @property
    def double_quant(self) -> bool:
        """True if the scales are quantized."""
        return self.scales.nested is not None

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """Operands of a kernel: codes, scales, layer."""
        return (self.codes, *self.scales.operands, self.layer)

    def format(self, dtype: Any) -> tiles.WeightFormat:
        """Compile-time facts about the weight, dequantized to `dtype`."""
        return tiles.WeightFormat(self.quant_type, jnp.dtype(dtype), self.block_size, self.double_quant, self.shape[1])


def pad_contraction(dy: jax.Array, n: int, block: int) -> jax.Array:
    """Pad dy [M, N] to [M, ceil(N / block) * block] for a kernel whose last tile of W begins at N - block.

    Elements that this tile shares with the one before it are multiplied by zeros. dy itself if N is a multiple of
    `block`.
    """
    rest = n % block
    if not rest:
        return dy
    whole = dy[:, : n - rest]
    zeros = jnp.zeros((dy.shape[0], block - rest), dy.dtype)
    return jnp.concatenate([whole, zeros, dy[:, n - rest :]], axis=1)
