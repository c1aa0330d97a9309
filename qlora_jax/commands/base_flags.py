"""Flags of the commands that merge: the base of an adapter, and how training stored it."""

import dataclasses
from collections.abc import Set
from typing import TYPE_CHECKING, Any, Literal

from qlora_jax.cli import flag

if TYPE_CHECKING:
    from qlora_jax.checkpoints.base_weights import BaseStorage

_OPEN = ("auto", "nf4", "fp4", "int4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseFlags:
    """Flags of a base in training."""

    model: str | None = flag(None, "Base model, where it is not the one that the run names: path or hub id.")
    quant_type: Literal["auto", "nf4", "fp4", "int4", "q4_0", "q4_1", "q8_0", "int8", "none"] | None = flag(
        None, "How linear weights were stored in training (as convert has it); by default as the run says, else auto."
    )
    block_size: int = flag(64, "Weights that shared a scale (with --quant_type auto, nf4, fp4, int4).")
    double_quant: bool = flag(True, "Whether the scales were quantised too (with --quant_type auto, nf4, fp4, int4).")
    dtype: Literal["bfloat16", "float16", "float32"] = flag("bfloat16", "Type of weights that are not quantised.")

    @property
    def storage(self) -> "BaseStorage | None":
        """Storage in training; None for what the run says."""
        # Imported once the flags are known to be good: loading JAX takes seconds.
        from qlora_jax.checkpoints.base_weights import BaseStorage
        from qlora_jax.quantization import QuantizationConfig

        if self.quant_type is None:
            return None
        adopt = self.quant_type == "auto"
        kind = "nf4" if adopt else self.quant_type
        return BaseStorage(QuantizationConfig(kind, self.block_size, self.double_quant), adopt)


def base_refusals(values: Any, given: Set[str]) -> list[str]:
    """List a sentence for every one of these flags that has no effect beside the others."""
    if values.quant_type in _OPEN:
        return []
    beside = "without `quant_type`" if values.quant_type is None else f"with `quant_type={values.quant_type}`"
    return [
        f"`{name}` has no effect {beside}; leave it out." for name in sorted(given & {"block_size", "double_quant"})
    ]
