"""Which implementation runs: asked for by name, or chosen for the GPU that the program is compiled for."""

import dataclasses
from typing import Any

import jax
from jax.extend import backend

from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS, Chip, chip_of
from qlora_jax.kernels import roofline
from qlora_jax.kernels.choices import pinned_implementation
from qlora_jax.kernels.mosaic import launch
from qlora_jax.kernels.product import Product
from qlora_jax.kernels.weights import Weight

# Whose figures stand in for a GPU that is not in the table, by compute capability.
_LIKE = {"8.0": "a100", "8.6": "a6000", "8.9": "l40s", "9.0": "h100", "10.0": "b200", "12.0": "rtx5090"}


def target_device() -> Any:
    """The device that a program traced now is compiled for, as Pallas sees it: the default device or the mesh's."""
    default = backend.get_default_device()
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None or abstract.device_kind == default.device_kind:
        return default
    return abstract


def target_chip() -> Chip | None:
    """The GPU a program traced now is compiled for, or one like it; None if the kernels do not run there."""
    return chip_for(target_device())


def chip_for(device: Any) -> Chip | None:
    """The data sheet of a GPU, or of one like it under this one's title; None if the kernels do not run on a device."""
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        return None
    if chip := chip_of(device):
        return chip
    return dataclasses.replace(CHIPS[_LIKE[capability]], title=device.device_kind) if capability in _LIKE else None


def check(implementation: str) -> None:
    """Raise UserError, saying why, if an implementation asked for by name cannot run on the target device."""
    if implementation in ("auto", "xla"):
        return
    if target_chip() is None:
        device = target_device()
        name = getattr(device, "device_kind", device.platform)
        raise UserError(
            f"Kernel {implementation!r} needs a CUDA GPU of compute capability {', '.join(_LIKE)}, but this program "
            f"runs on {name!r}: choose auto or xla."
        )


def resolve(implementation: str, x: Any, w: Weight, *, transposed: bool) -> str:
    """The implementation that computes one product: "xla", "fused" or "unfused".

    "auto" falls back to "xla" where the kernels cannot run. An implementation asked for by name fails there, but
    float32 activations are always multiplied by XLA: the kernels' tensor cores have no such precision.

    Args:
        implementation: "auto" or a name.
        x: an array, abstract or not, [..., K] (or [..., N] if transposed).
        w: the weight, one or a stack.
        transposed: multiply by W instead of W^T.

    Raises:
        UserError: as `check`, or a weight that the kernels cannot take; says why.
    """
    return explain(implementation, x, w, transposed=transposed)[0]


def explain(implementation: str, x: Any, w: Weight, *, transposed: bool) -> tuple[str, str]:
    """What `resolve` returns, and why, as a few words for people."""
    if implementation == "xla":
        return "xla", "asked for"
    check(implementation)
    chip = target_chip()
    why_not = launch.why_not(w, x.dtype)
    if chip is None or why_not is not None:
        if implementation != "auto" and x.dtype in launch.DTYPES:
            raise UserError(f"Kernel {implementation!r} cannot multiply here: {why_not}. Choose auto or xla.")
        if chip is not None and why_not is not None:
            return "xla", why_not
        device = target_device()
        return "xla", f"this runs on {getattr(device, 'device_kind', device.platform)}"
    if implementation != "auto":
        return implementation, "asked for"
    n, k = w.shape
    product = Product(x.size // x.shape[-1], n, k, transposed)
    pinned, recorded = pinned_implementation(product)
    if recorded in ("fused", "unfused"):
        return recorded, "recorded choice"
    return roofline.explain(chip, product, timings=not pinned)
