"""Selection of the implementation of a product: the one asked for by name, or the one for the program's GPU."""

from typing import Any

import jax
from jax.extend import backend

from qlora_jax.errors import UserError
from qlora_jax.gpus import REPRESENTATIVES, Chip, chip_like
from qlora_jax.kernels import roofline
from qlora_jax.kernels.choices import pinned_implementation
from qlora_jax.kernels.mosaic import dispatch
from qlora_jax.kernels.product import Product
from qlora_jax.kernels.weights import StackedWeight, Weight
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor

# Implementations that need no GPU.
ANYWHERE = ("auto", "xla", "interpreted_fused", "interpreted_unfused")


def target_device() -> Any:
    """Return the device that a program traced now is compiled for, as Pallas sees it: the default or the mesh's."""
    default = backend.get_default_device()
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None or abstract.device_kind == default.device_kind:
        return default
    return abstract


def target_chip() -> Chip | None:
    """Return the GPU that a program traced now is compiled for, or one like it; None where the kernels do not run."""
    return chip_like(target_device())


def check(implementation: str) -> None:
    """Raise UserError, with the reason, if an implementation asked for by name cannot run on the target device."""
    if implementation in ANYWHERE or target_chip() is not None:
        return
    raise UserError(
        f"Kernel {implementation!r} needs a CUDA GPU of compute capability {', '.join(REPRESENTATIVES)}, but this "
        f"program runs on {_device_name()!r}: choose auto or xla."
    )


def resolve(implementation: str, x: Any, w: Weight, *, transposed: bool) -> str:
    """Return the name of the implementation that computes one product, never "auto".

    "auto" falls back to "xla" where the kernels cannot run. An implementation asked for by name fails there, but
    float32 activations are always multiplied by XLA: the kernels' tensor cores have no such precision.

    Args:
        implementation: "auto" or a name.
        x: an array, abstract or not, [..., K] (or [..., N] if transposed).
        w: the weight, one or a stack.
        transposed: multiply by W instead of W^T.

    Raises:
        UserError: as `check`, or a weight that the kernels cannot take; with the reason.
    """
    return explain(implementation, x, w, transposed=transposed)[0]


def explain(implementation: str, x: Any, w: Weight, *, transposed: bool) -> tuple[str, str]:
    """Return the result of `resolve` and its reason, a few words for people."""
    if implementation == "xla":
        return "xla", "asked for"
    check(implementation)
    if reason := dispatch.unsupported_reason(w, x.dtype):
        if implementation != "auto" and x.dtype in dispatch.DTYPES:
            raise UserError(f"Kernel {implementation!r} cannot multiply here: {reason}. Choose auto or xla.")
        on_gpu = implementation != "auto" or target_chip() is not None
        return "xla", reason if on_gpu else f"this runs on {_device_name()}"
    if implementation != "auto":
        return implementation, "asked for"
    chip = target_chip()
    if chip is None:
        return "xla", f"this runs on {_device_name()}"
    assert isinstance(w, QuantizedTensor | StackedWeight)
    product = product_with(w, x.size // x.shape[-1], transposed=transposed)
    pinned, recorded = pinned_implementation(product)
    if recorded in ("fused", "unfused"):
        return recorded, "recorded choice"
    return roofline.explain(chip, product, timings=not pinned)


def product_with(w: QuantizedTensor | StackedWeight, m: int, *, transposed: bool) -> Product:
    """Return the product of `m` rows with a quantised weight, one or a stack."""
    n, k = w.shape
    return Product(m, n, k, transposed, QuantizationConfig(w.quant_type, w.block_size, w.double_quant))


def _device_name() -> str:
    device = target_device()
    return getattr(device, "device_kind", device.platform)
