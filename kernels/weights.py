"""A reference to one layer of a stack of weights, without a slice."""

import dataclasses
from typing import Any

import jax

from qlora_jax.quantization import QuantizedTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedWeight:
    """Weight `layer` of a stack of L quantized [N, K] weights.

    A scan over layers hands slices to its body, and the operands of a kernel must exist in memory: every layer's codes
    would be copied to be read once. So the body closes over the stack and the kernel finds the layer in it.

    Attributes:
        stack: QuantizedTensor with stack_shape (L,).
        layer: int32 scalar, 0 <= layer < L.
    """

    stack: QuantizedTensor
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) of one weight."""
        return self.stack.shape

    @property
    def quant_type(self) -> str:
        """Storage format of the stack."""
        return self.stack.quant_type

    @property
    def block_size(self) -> int:
        """Weights of the stack that share a scale."""
        return self.stack.block_size

    @property
    def double_quant(self) -> bool:
        """True if the scales of the stack are quantized."""
        return self.stack.double_quant

    def take(self) -> QuantizedTensor:
        """Return the weight by itself; compiled, a slice of each buffer."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False), self.stack)


Weight = QuantizedTensor | StackedWeight | jax.Array
