"""The operations on frozen weights that models call: one function an operation, implementations behind it.

`matmul` is differentiable with respect to its activations only: the weights are frozen. What it keeps for the backward
pass is the weight as it is stored, neither activations nor a decoded copy.
"""

import functools
from typing import Any

import jax

from qlora_jax.errors import UserError
from qlora_jax.kernels import xla
from qlora_jax.quantization import QuantizedTensor
from qlora_jax.quantization import dequantize as _dequantize

__all__ = ["IMPLEMENTATIONS", "dequantize", "matmul"]

# Name -> module with matmul(x, w) and matmul_transposed(dy, w).
IMPLEMENTATIONS = {"xla": xla}


def matmul(x: jax.Array, w: QuantizedTensor | jax.Array, *, implementation: str = "auto") -> jax.Array:
    """Return ``x @ W^T`` for a frozen weight, [..., N] in x.dtype, summed in float32.

    Equal to ``x @ dequantize(w, x.dtype).T`` up to the order of the sums. The gradient with respect to x is ``dy @ W``
    from the same stored bytes; there is none with respect to w.

    Args:
        x: activations [..., K], float32, bfloat16 or float16.
        w: a quantised weight of shape (N, K), without stack dimensions, or a plain [N, K] array.
        implementation: "auto" (the fastest that can do it here) or the name of one.

    Raises:
        UserError: an implementation that is unknown or cannot run here.
        ValueError: shapes that do not fit.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise UserError(f"Unknown matmul implementation {implementation!r}; choose one of {known}.")
    if isinstance(w, QuantizedTensor) and w.stack_shape:
        raise ValueError(f"matmul needs one weight, not a stack of {w.stack_shape}; slice or scan it.")
    if len(w.shape) != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"matmul needs x [..., K] and a weight (N, K), not {x.shape} and {w.shape}.")
    return _matmul("xla" if implementation == "auto" else implementation, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation: str, x: jax.Array, w: Any) -> jax.Array:
    return IMPLEMENTATIONS[implementation].matmul(x, w)


def _matmul_forward(implementation: str, x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    return _matmul(implementation, x, w), w


def _matmul_backward(implementation: str, w: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    # None is a symbolic zero for every buffer of w: nothing is allocated.
    return IMPLEMENTATIONS[implementation].matmul_transposed(dy, w), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def dequantize(w: QuantizedTensor | jax.Array, dtype: Any) -> jax.Array:
    """Return a frozen weight, quantised or plain, as an array [*stack, *shape] of `dtype`."""
    return _dequantize(w, dtype) if isinstance(w, QuantizedTensor) else w.astype(dtype)
