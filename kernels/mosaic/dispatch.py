"""From a weight and any number of rows to a kernel, its tile sizes, and the padding that makes small shapes fit."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp

from qlora_jax.gpus import Chip
from qlora_jax.kernels.mosaic import dequantize as dequantize_kernel
from qlora_jax.kernels.mosaic import mma, small_m, tcgen05, tiles, wgmma
from qlora_jax.kernels.mosaic.kernel import GPU, Execution, Kernel
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight
from qlora_jax.kernels.product import Product
from qlora_jax.kernels.weights import StackedWeight, Weight
from qlora_jax.quantization import FORMATS, QuantizedTensor

DTYPES = (jnp.bfloat16, jnp.float16)
# The least N that every tile fits into.
_ROWS = 128
# In the order in which they are asked whether they support a product.
KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "small_m": cast(Kernel, small_m),
        "wgmma": cast(Kernel, wgmma),
        "tcgen05": cast(Kernel, tcgen05),
        "mma": cast(Kernel, mma),
    }
)


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """The fused kernel of one product.

    Attributes:
        name: a name of `KERNELS`.
        config: the kernel's tile sizes.
    """

    name: str
    config: Any

    @property
    def kernel(self) -> Kernel:
        """The kernel's module."""
        return KERNELS[self.name]


def select_kernel(chip: Chip, product: Product) -> KernelChoice:
    """Return the first kernel that supports a product on `chip`, with its tile sizes for it."""
    name = next(name for name, kernel in KERNELS.items() if kernel.supports(chip, product))
    return KernelChoice(name, KERNELS[name].config_for(chip, product))


def unsupported_reason(w: Weight, dtype: Any) -> str | None:
    """Return why the kernels cannot take a weight and dtype of activations: the end of a sentence; None if they can."""
    if not isinstance(w, QuantizedTensor | StackedWeight):
        return "the weight is not quantized"
    if FORMATS[w.quant_type].bits != 4:
        return f"the weight is {w.quant_type}, not 4-bit"
    if dtype not in DTYPES:
        return f"the activations are {jnp.dtype(dtype).name}, not bfloat16 or float16"
    if len(w.shape) != 2 or w.shape[1] % tiles.GROUP:
        return f"the rows of the weight's shape {w.shape} are no whole groups of {tiles.GROUP} codes"
    return None


def pack(w: Weight) -> PackedWeight:
    """View a 4-bit weight for the kernels; small ones are padded with zero rows of codes."""
    if isinstance(w, StackedWeight):
        if w.shape[0] >= _ROWS and w.shape[0] % 8 == 0:
            return PackedWeight.of(w.stack, w.layer)
        w = w.take()  # one layer is padded, not all of them
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"not a quantized weight: {type(w).__name__}")
    return PackedWeight.of(w).with_rows(_ROWS)


def matmul(x: jax.Array, w: PackedWeight, *, transposed: bool, chip: Chip, execution: Execution = GPU) -> jax.Array:
    """Return x @ W^T [M, N], or x @ W [M, K] if `transposed`, with the fused kernel for `chip`.

    Args:
        x: [M, K] ([M, N] if transposed), bfloat16 or float16, M >= 1.
        w: of `pack`.
        transposed: multiply by W.
        chip: the GPU it will run on.
        execution: on that GPU, or interpreted.
    """
    m = x.shape[0]
    choice = select_kernel(chip, Product(m, *w.shape, transposed))
    x = choice.kernel.pad_activations(x, w, choice.config, transposed=transposed)
    y = choice.kernel.matmul(x, w, config=choice.config, transposed=transposed, execution=execution)
    return y[:m] if transposed else y[:m, : w.n_rows]


def dequantize(w: PackedWeight, dtype: Any, *, execution: Execution = GPU) -> jax.Array:
    """Return the weight [N, K] in bfloat16 or float16."""
    return dequantize_kernel.dequantize(w, dtype, execution=execution)[: w.n_rows]
