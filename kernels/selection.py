"""Which implementation runs: asked for by name, or chosen for the GPU that the program is compiled for."""

from typing import Any

import jax
from jax.extend import backend

from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS, Chip, chip_of
from qlora_jax.kernels import roofline
from qlora_jax.kernels.mosaic import launch
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
    device = target_device()
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        return None
    return chip_of(device) or (CHIPS[_LIKE[capability]] if capability in _LIKE else None)


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


def resolve(implementation: str, x: jax.Array, w: Weight, *, transposed: bool) -> str:
    """The implementation that computes one product: "xla", "fused" or "dequantize".

    "auto" falls back to "xla" where the kernels cannot run. An implementation asked for by name fails there, but
    float32 activations are always multiplied by XLA: the kernels' tensor cores have no such precision.

    Raises:
        UserError: as `check`, or a weight that the kernels cannot take; says why.
    """
    if implementation == "xla":
        return "xla"
    check(implementation)
    chip = target_chip()
    why_not = launch.why_not(w, x.dtype)
    if chip is None or why_not is not None:
        if implementation != "auto" and x.dtype in launch.DTYPES:
            raise UserError(f"Kernel {implementation!r} cannot multiply here: {why_not}. Choose auto or xla.")
        return "xla"
    if implementation != "auto":
        return implementation
    n, k = w.shape
    return roofline.choose(chip, x.size // x.shape[-1], n, k, transposed=transposed)
