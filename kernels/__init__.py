"""The operations on frozen weights that models call: one function an operation, implementations behind it.

`matmul` is differentiable with respect to its activations only: the weights are frozen. What it keeps for the backward
pass is the weight as it is stored, neither activations nor a decoded copy.

Implementations:

- "xla": decode and multiply, both by XLA. The reference; every platform, every weight, float32.
- "fused": kernels that decode 4-bit codes while they multiply. No 16-bit weight exists in memory. CUDA GPUs.
- "dequantize": a kernel that decodes the whole weight, then XLA's product. CUDA GPUs.
- "auto": "xla" off-GPU and for what the kernels cannot take, else what `kernels.roofline` expects to be faster.
"""

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

from qlora_jax.errors import UserError
from qlora_jax.kernels import dequantized, fused, selection, xla
from qlora_jax.kernels.mosaic import launch
from qlora_jax.kernels.weights import StackedWeight, Weight
from qlora_jax.quantization import QuantizedTensor
from qlora_jax.quantization import dequantize as _dequantize

__all__ = ["IMPLEMENTATIONS", "StackedWeight", "check_implementation", "dequantize", "describe", "matmul"]

# Name -> module with matmul(x, w) and matmul_transposed(dy, w).
IMPLEMENTATIONS: dict[str, ModuleType] = {"xla": xla, "fused": fused, "dequantize": dequantized}


def check_implementation(name: str) -> None:
    """Raise UserError unless an implementation exists and can run on the default device; says why it cannot."""
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise UserError(f"Unknown kernel {name!r}; choose one of {', '.join(['auto', *IMPLEMENTATIONS])}.")
    selection.check(name)


def describe(weights: Mapping[str, Any], m: int, dtype: Any, *, implementation: str = "auto") -> list[str]:
    """Say which implementation multiplies by each weight, forward and backward, and why: a few lines for people.

    Args:
        weights: name -> quantised weight (N, K) or a stack of them, abstract or not; other values are left out.
        m: rows of the activations.
        dtype: of the activations.
        implementation: as for `matmul`.

    Raises:
        UserError: an implementation that is unknown or cannot run here, or a file of timings that cannot be used.
    """
    check_implementation(implementation)
    choices: dict[tuple[str, str], dict[str, list[str]]] = {}
    total = 0
    for name, w in weights.items():
        if not isinstance(w, QuantizedTensor):
            continue
        total += 1
        for direction, width in (("forward", w.shape[1]), ("backward", w.shape[0])):
            x = jax.ShapeDtypeStruct((m, width), dtype)
            choice = selection.explain(implementation, x, w, transposed=direction == "backward")
            shape = f"{name} {w.shape[0]}x{w.shape[1]}"
            choices.setdefault(choice, {}).setdefault(shape, []).append(direction)
    lines = []
    for (chosen, why), shapes in choices.items():
        where = f"{total} of {total} linears, forward and backward,"
        if len(choices) > 1:
            where = "; ".join(
                f"{shape} {' and '.join(directions)}" if len(directions) < 2 else shape
                for shape, directions in shapes.items()
            )
        auto = f"auto: {why}" if implementation == "auto" else why
        lines.append(f"kernel: {chosen} ({auto}) for {where} at M={m}")
    return lines


def matmul(x: jax.Array, w: Weight, *, implementation: str = "auto") -> jax.Array:
    """Return ``x @ W^T`` for a frozen weight, [..., N] in x.dtype, summed in float32.

    Equal to ``x @ dequantize(w, x.dtype).T`` up to the order of the sums. The gradient with respect to x is ``dy @ W``
    from the same stored bytes; there is none with respect to w.

    Args:
        x: activations [..., K], float32, bfloat16 or float16.
        w: a quantised weight of shape (N, K), one of a stack, or a plain [N, K] array.
        implementation: "auto" or the name of one, see above.

    Raises:
        UserError: an implementation that is unknown or cannot run here.
        ValueError: shapes that do not fit.
    """
    check_implementation(implementation)
    if isinstance(w, QuantizedTensor) and w.stack_shape:
        raise ValueError(f"matmul needs one weight, not a stack of {w.stack_shape}: use StackedWeight, or slice it.")
    if len(w.shape) != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"matmul needs x [..., K] and a weight (N, K), not {x.shape} and {w.shape}.")
    return _matmul(implementation, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation: str, x: jax.Array, w: Any) -> jax.Array:
    return IMPLEMENTATIONS[selection.resolve(implementation, x, w, transposed=False)].matmul(x, w)


def _matmul_forward(implementation: str, x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    return _matmul(implementation, x, w), w


def _matmul_backward(implementation: str, w: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    # None is a symbolic zero for every buffer of w: nothing is allocated.
    module = IMPLEMENTATIONS[selection.resolve(implementation, dy, w, transposed=True)]
    return module.matmul_transposed(dy, w), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def dequantize(w: Weight, dtype: Any, *, implementation: str = "auto") -> jax.Array:
    """Return a frozen weight, quantised or plain, as an array [*stack, *shape] of `dtype`.

    Args:
        w: a quantised weight, a stack of them, one of a stack, or a plain array.
        dtype: float32, bfloat16 or float16.
        implementation: as for `matmul`; "fused" and "dequantize" are the same kernel, for one 4-bit [N, K] weight in a
            16-bit dtype.

    Raises:
        UserError: an implementation that is unknown or cannot run here.
    """
    check_implementation(implementation)
    if isinstance(w, QuantizedTensor | StackedWeight) and implementation != "xla":
        single = isinstance(w, StackedWeight) or not w.stack_shape
        why_not = launch.why_not(w, dtype) if single else "it is a stack of weights"
        if selection.target_chip() is not None and why_not is None:
            return launch.dequantize(launch.operands(w), dtype)
        if implementation != "auto" and dtype in launch.DTYPES:
            raise UserError(f"Kernel {implementation!r} cannot decode here: {why_not}. Choose auto or xla.")
    if isinstance(w, StackedWeight):
        w = w.take()
    return _dequantize(w, dtype) if isinstance(w, QuantizedTensor) else w.astype(dtype)
