"""Storage of a model's linears where they differ: what a checkpoint brought is kept, the rest is quantised alike."""

import dataclasses

from qlora_jax.quantization.quantized_tensor import QuantizationConfig


@dataclasses.dataclass(frozen=True)
class MixedQuantization:
    """Storage of the linear layers of a base model, linear by linear.

    Attributes:
        default: of linears that are not named.
        linears: (name of a linear, such as "q_proj"; its storage in all layers).
    """

    default: QuantizationConfig
    linears: tuple[tuple[str, QuantizationConfig], ...] = ()

    def of(self, linear: str) -> QuantizationConfig:
        """Return the storage of a linear by its name."""
        return dict(self.linears).get(linear, self.default)


Quantization = QuantizationConfig | MixedQuantization
"""One storage for all linears, or one for each."""
