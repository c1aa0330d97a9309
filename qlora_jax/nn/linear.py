"""Linear layers whose weights are frozen, usually in 4 bits, with low-rank adapters that train."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qlora_jax import kernels
from qlora_jax.nn.variables import (
    Axes,
    Frozen,
    Initializer,
    LoRAParam,
    RowAdapters,
    frozen_array,
    kaiming_uniform,
    trained_value,
    zeros,
)
from qlora_jax.quantization import Quantization, QuantizationConfig, abstract_quantized
from qlora_jax.sharding import REPLICATED, ShardingRules

# Name of the activations that are worth keeping for the backward pass when memory allows: each cost a matrix product.
SAVED = "saved"


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
        """Factor of the low-rank product."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class QLoRAConfig:
    """Storage and computation of a model.

    Attributes:
        quantization: how linear weights are stored.
        dtype: compute dtype, and the storage dtype of what is not quantised (norms stay float32).
        lora: adapters, or None for the bare base model.
        kernel: which implementation of the 4-bit ops runs, see `qlora_jax.kernels.matmul`.
        rules: how its tensors are cut over a mesh of devices.
    """

    quantization: Quantization = dataclasses.field(default_factory=QuantizationConfig)
    dtype: Any = jnp.bfloat16
    lora: LoRAConfig | None = None
    kernel: str = "auto"
    rules: ShardingRules = REPLICATED


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


class QLoRALinear(nnx.Module):
    """y = x W^T + b + (alpha / R) dropout(x) A^T B^T, with W frozen and usually 4-bit (QLoRA equation 5).

    Shapes (with `stack` the leading layer axis, removed before the call): weight [*stack, out, in] as in torch, lora_a
    [*stack, R, in], lora_b [*stack, out, R]. Adapters are computed in x's dtype. `name` is the linear's name in a
    configuration of adapters, in profiles and in errors.
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
        self.name, self.kernel = name, qlora.kernel
        quantization = qlora.quantization.of(name)
        shape, layers = (out_features, in_features), ("layers",) * len(stack)
        if quantization.quant_type == "none":
            # Its rows have no logical axis: a layer gathers quantised weights only.
            self.weight = frozen_array((*stack, *shape), qlora.dtype, "linear", (*layers, None, None))
        else:
            quantization.check_rows(in_features, name)
            abstract = abstract_quantized(
                shape,
                quant_type=quantization.quant_type,
                block_size=quantization.block_size,
                double_quant=quantization.double_quant,
                dtype=jnp.dtype(qlora.dtype).name,
                stack=stack,
            )
            self.weight = Frozen(abstract, kind="linear", axes=(*layers, "rows", None))
        self.bias = frozen_array((*stack, out_features), qlora.dtype, "bias", (*layers, None)) if bias else None

        lora = qlora.lora if qlora.lora is not None and name in qlora.lora.modules else None
        self.scaling, self.dropout = (lora.scaling, lora.dropout) if lora else (0.0, 0.0)

        def matrix(rows: int, columns: int, initializer: Initializer, axes: Axes) -> LoRAParam:
            abstract = jax.ShapeDtypeStruct((*stack, rows, columns), jnp.float32)
            return LoRAParam(abstract, initializer=initializer, axes=(*layers, *axes))

        self.lora_a = matrix(lora.rank, in_features, kaiming_uniform, ("rank", None)) if lora else None
        # B = 0: a fresh adapter changes nothing.
        self.lora_b = matrix(out_features, lora.rank, zeros, (None, "rank")) if lora else None

    def __call__(self, x: Float[Array, "... in"], dropout_key: Array | None = None) -> Float[Array, "... out"]:
        """Apply to x [..., in]; `dropout_key` None means no dropout (evaluation)."""
        with jax.named_scope(self.name):
            y = kernels.matmul(x, self.weight.get_value(), implementation=self.kernel)
            if self.bias is not None:
                y = y + self.bias.get_value().astype(y.dtype)
            if self.lora_a is not None and self.lora_b is not None:
                with jax.named_scope("adapter"):
                    if self.dropout > 0 and dropout_key is not None:
                        keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
                        x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
                    y = y + self._adapted(x)
            return checkpoint_name(y, SAVED)

    def _adapted(self, x: Array) -> Array:
        assert self.lora_a is not None and self.lora_b is not None
        a, b = self.lora_a.get_value(), self.lora_b.get_value()
        if isinstance(a, RowAdapters):
            return _low_rank_of_rows(x, a, b)
        return low_rank(self.scaling, x, trained_value(self.lora_a), trained_value(self.lora_b))


def _low_rank_of_rows(x: Float[Array, "B S in"], a: RowAdapters, b: RowAdapters) -> Float[Array, "B S out"]:
    """The adapters' half of equation 5 where every row of the batch has its own; see `low_rank`.

    Of several rows the products are with all adapters, and those that are not a row's own count as zeros: every matrix
    is read once, and which rows a batch has beside one changes nothing for it.
    """
    down, up = a.matrices.astype(x.dtype), b.matrices.astype(x.dtype)
    if len(a.rows) == 1:
        down, up = (jax.lax.dynamic_slice_in_dim(each, a.rows[0], 1) for each in (down, up))
        own = a.scalings[:, None, None]
    else:
        mine = a.rows[:, None] == jnp.arange(len(down))
        own = jnp.where(mine, a.scalings[:, None], 0)[:, None, :, None]
    low = jnp.einsum("bsi,ari->bsar", x, down, preferred_element_type=jnp.float32)
    low = (low * own.reshape(len(x), 1, -1, 1)).astype(x.dtype)
    return jnp.einsum("bsar,aor->bso", low, up, preferred_element_type=jnp.float32).astype(x.dtype)
