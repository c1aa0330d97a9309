"""One layer of a stack of weights, named but not sliced out."""

import dataclasses
from typing import Any

import jax

from qlora_jax.quantization import QuantizedTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedWeight:
    """Weight `layer` of a stack of L quantised [N, K] weights.

    A scan over layers hands its body slices, and what a kernel takes must exist in memory: every layer's codes would be
    copied to be read once. So the body closes over the stack and the kernel finds the layer in it.

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
        """As the stack's."""
        return self.stack.quant_type

    def take(self) -> QuantizedTensor:
        """The weight by itself; compiled, a slice of each buffer."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False), self.stack)


Weight = QuantizedTensor | StackedWeight | jax.Array
