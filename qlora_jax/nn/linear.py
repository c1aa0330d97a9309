"""Building blocks of the models: frozen base weights, LoRA-adapted linear layers, RMS norm.

Every module is built *abstractly*: its variables hold `jax.ShapeDtypeStruct` leaves, so that a model of any size exists
before a byte of its weights does. Loading, planning and restoring all fill or read that one declaration.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax import kernels
from qlora_jax.errors import UserError
from qlora_jax.quantization import QuantizationConfig, abstract_quantized

# Name of the activations that are worth keeping for the backward pass when memory allows: each cost a matrix product.
SAVED = "saved"


class Frozen(nnx.Variable):
    """A base-model tensor: read by the forward pass, never trained.

    Deliberately *not* an `nnx.Param`: no filter for parameters may ever catch a base weight. Its value is an array or a
    `QuantizedTensor`. Metadata `kind` is one of linear, embedding, head, norm, bias.
    """


class LoRAParam(nnx.Variable):
    """A trainable adapter matrix. The only variable type gradients and the optimizer see.

    Declared float32, which is what is saved. While it trains its value may be a 16-bit working copy of that, or a
    `GradientSlot` around either.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientSlot:
    """An adapter matrix with a place for its float32 gradient, whatever its own dtype.

    JAX gives a gradient the dtype of what it is taken with respect to; with respect to a 16-bit working copy, every
    sum over micro-batches would be rounded to 16 bits. Differentiate with respect to `slot` instead.

    Attributes:
        matrix: [*stack, rows, columns], any floating dtype.
        slot: float32 of that shape; its gradient is the matrix's. Its values are never read.
    """

    matrix: Any
    slot: Any


@jax.custom_vjp
def _read(matrix: Array, slot: Array) -> Array:
    """`matrix` in float32; its cotangent goes to `slot`."""
    return matrix.astype(slot.dtype)


_read.defvjp(lambda matrix, slot: (_read(matrix, slot), None), lambda _, cotangent: (None, cotangent))


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021), on every linear but the head by default (QLoRA section 4).

    Attributes:
        rank: R, the inner dimension of the two adapter matrices.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability of dropping an element of the adapter's input while training.
        modules: names of the linears that get an adapter, e.g. ("q_proj", "v_proj").
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    modules: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class QLoRAConfig:
    """How a model is stored and computed.

    Attributes:
        quantization: how linear weights are stored.
        dtype: compute dtype, and the storage dtype of what is not quantised (norms stay float32).
        lora: adapters, or None for the bare base model.
        kernel: which implementation of the 4-bit ops runs, see `qlora_jax.kernels.matmul`.
    """

    quantization: QuantizationConfig = dataclasses.field(default_factory=QuantizationConfig)
    dtype: Any = jnp.bfloat16
    lora: LoRAConfig | None = None
    kernel: str = "auto"


def frozen_array(shape: tuple[int, ...], dtype: Any, kind: str) -> Frozen:
    """Declare an unquantised base tensor."""
    return Frozen(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), kind=kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def low_rank(
    scaling: float, x: Float[Array, "... in"], a: Float[Array, "R in"], b: Float[Array, "out R"]
) -> Float[Array, "... out"]:
    """The adapter's half of QLoRA equation 5: scaling * x A^T B^T, in x's dtype, summed in float32.

    Its derivative is written out because only this order never transposes an array as wide as x or y: automatic
    differentiation asks for dy^T, which costs more than the products themselves on a CPU.
    """
    return _low_rank_forward(scaling, x, a, b)[0]


def _dot(lhs: Array, rhs: Array, contract: tuple[int, int], dtype: Any) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(lhs, rhs, dims, preferred_element_type=jnp.float32).astype(dtype)


def _low_rank_forward(scaling: float, x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    rows = x.reshape(-1, x.shape[-1])
    # The scale goes on the R-wide side, which has the fewest elements.
    low = (_dot(rows, a.astype(x.dtype), (1, 1), jnp.float32) * scaling).astype(x.dtype)
    low = checkpoint_name(low, SAVED)
    y = _dot(low, b.astype(x.dtype), (1, 1), x.dtype)
    return y.reshape(*x.shape[:-1], b.shape[0]), (x, low, a, b)


def _low_rank_backward(scaling: float, residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    x, low, a, b = residuals
    rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    db = _dot(low, dy, (0, 0), b.dtype).T
    d_low = (_dot(dy, b.astype(dy.dtype), (1, 0), jnp.float32) * scaling).astype(dy.dtype)
    da = _dot(d_low, rows, (0, 0), a.dtype)
    dx = _dot(d_low, a.astype(dy.dtype), (1, 0), x.dtype)
    return dx.reshape(x.shape), da, db


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _adapter(param: LoRAParam) -> Array:
    value = param.get_value()
    return _read(value.matrix, value.slot) if isinstance(value, GradientSlot) else value


class QLoRALinear(nnx.Module):
    """y = x W^T + b + (alpha / R) dropout(x) A^T B^T, with W frozen and usually 4-bit (QLoRA equation 5).

    Shapes (with `stack` the leading layer axis, removed by `lax.scan` before the call): weight [*stack, out, in] as in
    torch, lora_a [*stack, R, in], lora_b [*stack, out, R]. Adapters are computed in x's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        qlora: QLoRAConfig,
        bias: bool = False,
        stack: tuple[int, ...] = (),
    ):
        self.kernel = qlora.kernel
        quantization = qlora.quantization
        shape = (out_features, in_features)
        if quantization.quant_type == "none":
            self.weight = frozen_array((*stack, *shape), qlora.dtype, "linear")
        else:
            if quantization.quant_type != "int8" and in_features % quantization.block_size:
                raise UserError(
                    f"block_size {quantization.block_size} does not divide the {in_features} inputs of {name}; "
                    f"choose a power of two that does."
                )
            abstract = abstract_quantized(
                shape,
                quant_type=quantization.quant_type,
                block_size=quantization.block_size,
                double_quant=quantization.double_quant,
                dtype=jnp.dtype(qlora.dtype).name,
                stack=stack,
            )
            self.weight = Frozen(abstract, kind="linear")
        self.bias = frozen_array((*stack, out_features), qlora.dtype, "bias") if bias else None

        lora = qlora.lora if qlora.lora is not None and name in qlora.lora.modules else None
        self.scaling, self.dropout = (lora.scaling, lora.dropout) if lora else (0.0, 0.0)

        def adapter(rows: int, columns: int) -> LoRAParam:
            return LoRAParam(jax.ShapeDtypeStruct((*stack, rows, columns), jnp.float32))

        self.lora_a = adapter(lora.rank, in_features) if lora else None
        self.lora_b = adapter(out_features, lora.rank) if lora else None

    def __call__(self, x: Float[Array, "... in"], dropout_key: Array | None = None) -> Float[Array, "... out"]:
        """Apply to x [..., in]; `dropout_key` None means no dropout (evaluation)."""
        y = kernels.matmul(x, self.weight.get_value(), implementation=self.kernel)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(y.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            if self.dropout > 0 and dropout_key is not None:
                keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
            y = y + low_rank(self.scaling, x, _adapter(self.lora_a), _adapter(self.lora_b))
        return checkpoint_name(y, SAVED)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), computed in float32 whatever x's dtype."""

    def __init__(self, features: int, *, eps: float, stack: tuple[int, ...] = ()):
        self.eps = eps
        self.weight = frozen_array((*stack, features), jnp.float32, "norm")

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return (h * self.weight.get_value()).astype(x.dtype)
