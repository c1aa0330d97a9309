"""The operations on frozen weights that models call: one function an operation, implementations behind it.

`matmul` is differentiable with respect to its activations only: the weights are frozen. Its residual for the backward
pass is the weight as it is stored, neither activations nor a dequantized copy.

Implementations:

- "xla": dequantize and multiply, both by XLA. The reference; every platform, every weight, float32.
- "fused": kernels that dequantize 4-bit codes while they multiply. No 16-bit weight exists in memory. CUDA GPUs.
- "unfused": a kernel that dequantizes the whole weight, then XLA's product. CUDA GPUs. Formerly "dequantize", which is
  still understood.
- "auto": "xla" off-GPU and for weights and dtypes that the kernels do not support, else the one that
  `kernels.roofline` expects to be faster, or the one that is pinned, see `kernels.choices`.

For tests, "interpreted_fused" and "interpreted_unfused" run an A6000's kernels in Pallas' interpret mode, on any
platform.
"""

import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS
from qlora_jax.kernels import selection, xla
from qlora_jax.kernels.choices import Choice, choices_from_json, choices_to_json, describe, pinned
from qlora_jax.kernels.mosaic import dispatch, interpret
from qlora_jax.kernels.pallas import Fused, Unfused
from qlora_jax.kernels.product import Product
from qlora_jax.kernels.weights import StackedWeight, Weight
from qlora_jax.quantization import QuantizedTensor

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Product",
    "StackedWeight",
    "check_implementation",
    "choices_from_json",
    "choices_to_json",
    "dequantize",
    "describe",
    "matmul",
    "pinned",
    "resolve",
]

# Name -> matmul(x, w), matmul_transposed(dy, w) and dequantize(w, dtype).
IMPLEMENTATIONS: Mapping[str, Any] = MappingProxyType({"xla": xla, "fused": Fused(), "unfused": Unfused()})
_INTERPRETED: Mapping[str, Any] = MappingProxyType(
    {
        "interpreted_fused": Fused(CHIPS["a6000"], interpret.execution()),
        "interpreted_unfused": Unfused(interpret.execution()),
    }
)
_DEPRECATED = MappingProxyType({"dequantize": "unfused"})


def check_implementation(name: str) -> str:
    """Return the current spelling of an implementation's name.

    Raises:
        UserError: there is no such implementation, or it cannot run on the default device; gives the reason.
    """
    name = _DEPRECATED.get(name, name)
    if name != "auto" and name not in IMPLEMENTATIONS and name not in _INTERPRETED:
        raise UserError(f"Unknown kernel {name!r}; choose one of {', '.join(['auto', *IMPLEMENTATIONS])}.")
    selection.check(name)
    return name


def resolve(
    weights: Mapping[str, Any], rows: Iterable[int], dtype: Any, *, implementation: str = "auto"
) -> tuple[Choice, ...]:
    """Return the implementation of every product of some weights with activations, forward and backward.

    `describe` formats the result, `choices_to_json` makes it a record, `pinned` makes "auto" keep to it: see
    `kernels.choices` for how a run uses them.

    Args:
        weights: name -> quantized weight (N, K) or a stack of them, abstract or not; other values are left out.
        rows: numbers of rows M of the activations.
        dtype: of the activations.
        implementation: as for `matmul`.

    Raises:
        UserError: an implementation that is unknown or cannot run here, or a file of timings that cannot be used.
    """
    implementation = check_implementation(implementation)
    found: dict[Product, tuple[str, str]] = {}
    names: dict[Product, list[str]] = {}
    quantized = {name: w for name, w in weights.items() if isinstance(w, QuantizedTensor)}
    for m in dict.fromkeys(rows):
        for name, w in quantized.items():
            for transposed in (False, True):
                product = selection.product_with(w, m, transposed=transposed)
                x = jax.ShapeDtypeStruct((m, product.contracted), dtype)
                found[product] = selection.explain(implementation, x, w, transposed=transposed)
                names.setdefault(product, []).append(name)
    prefix = "auto: " if implementation == "auto" else ""
    return tuple(Choice(product, name, prefix + why, tuple(names[product])) for product, (name, why) in found.items())


def matmul(x: jax.Array, w: Weight, *, implementation: str = "auto") -> jax.Array:
    """Return ``x @ W^T`` for a frozen weight, [..., N] in x.dtype, summed in float32.

    Equal to ``x @ dequantize(w, x.dtype).T`` up to the order of the sums. The gradient with respect to x is ``dy @ W``
    from the same stored bytes; there is none with respect to w.

    Args:
        x: activations [..., K], float32, bfloat16 or float16.
        w: a quantized weight of shape (N, K), one of a stack, or a plain [N, K] array.
        implementation: "auto" or the name of one, see above.

    Raises:
        UserError: an implementation that is unknown or cannot run here.
        ValueError: shapes that do not fit.
    """
    implementation = check_implementation(implementation)
    if isinstance(w, QuantizedTensor) and w.stack_shape:
        raise ValueError(f"matmul needs one weight, not a stack of {w.stack_shape}: use StackedWeight, or slice it.")
    if len(w.shape) != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"matmul needs x [..., K] and a weight (N, K), not {x.shape} and {w.shape}.")
    return _matmul(implementation, x, w)


def _resolved(implementation: str, x: jax.Array, w: Any, *, transposed: bool) -> Any:
    name = selection.resolve(implementation, x, w, transposed=transposed)
    return _INTERPRETED.get(name) or IMPLEMENTATIONS[name]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(implementation: str, x: jax.Array, w: Any) -> jax.Array:
    with jax.named_scope("matmul"):
        return _resolved(implementation, x, w, transposed=False).matmul(x, w)


def _matmul_forward(implementation: str, x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    return _matmul(implementation, x, w), w


def _matmul_backward(implementation: str, w: Any, dy: jax.Array) -> tuple[jax.Array, None]:
    # None is a symbolic zero for every buffer of w: nothing is allocated.
    with jax.named_scope("matmul_transposed"):
        return _resolved(implementation, dy, w, transposed=True).matmul_transposed(dy, w), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def dequantize(w: Weight, dtype: Any, *, implementation: str = "auto") -> jax.Array:
    """Return a frozen weight, quantized or plain, as an array [*stack, *shape] of `dtype`.

    Args:
        w: a quantized weight, a stack of them, one of a stack, or a plain array.
        dtype: float32, bfloat16 or float16.
        implementation: as for `matmul`; "fused" and "unfused" are the same kernel, for one 4-bit [N, K] weight in a
            16-bit dtype.

    Raises:
        UserError: an implementation that is unknown or cannot run here.
    """
    implementation = check_implementation(implementation)
    chosen: Any = xla
    if isinstance(w, QuantizedTensor | StackedWeight) and implementation != "xla":
        single = isinstance(w, StackedWeight) or not w.stack_shape
        reason = dispatch.unsupported_reason(w, dtype) if single else "it is a stack of weights"
        if reason is None and (implementation != "auto" or selection.target_chip() is not None):
            chosen = _INTERPRETED.get(implementation) or IMPLEMENTATIONS["unfused"]
        elif implementation != "auto" and dtype in dispatch.DTYPES:
            raise UserError(f"Kernel {implementation!r} cannot dequantize here: {reason}. Choose auto or xla.")
    with jax.named_scope("dequantize"):
        return chosen.dequantize(w, dtype)
