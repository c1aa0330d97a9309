"""The protocol of a kernel that multiplies with 4-bit weights, and what all of them share.

A new kernel is a module of its own, with a `Config`, and one line in `dispatch.KERNELS`. Its heuristics, its limits and
the constants that its time is predicted from live in that module.
"""

import dataclasses
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from qlora_jax.gpus import Chip
from qlora_jax.kernels.mosaic import warpgroup
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight, pad_contraction
from qlora_jax.kernels.product import Product


@dataclasses.dataclass(frozen=True)
class Execution:
    """The way a kernel is executed.

    Attributes:
        primitives: `warpgroup`, or `interpret` in Pallas' interpret mode.
        interpret: Pallas' interpret parameters; None to compile for a GPU.
    """

    primitives: ModuleType
    interpret: Any = None


GPU = Execution(warpgroup)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Constants of a fused kernel from which `kernels.roofline` predicts its time.

    Attributes:
        alu_per_weight: ALU instructions for each weight in the loop that dequantizes, the most of all architectures but
            sm_120a, where integers are not the limit (a test counts them in the machine code).
        tensor_fraction: share of the sheet's tensor throughput that the kernel reaches while it does not dequantize.
            An assumption.
        overlap: share of the shorter of dequantizing and multiplying that hides behind the longer one. An assumption.
        mma_sync: multiplies with mma.sync, also on chips whose tensor throughput is of another instruction.
    """

    alu_per_weight: float
    tensor_fraction: float
    overlap: float
    mma_sync: bool


@runtime_checkable
class Config(Protocol):
    """Tile sizes of a kernel.

    Attributes:
        block_m: rows of x that one dequantized tile of W is multiplied with.
        block_n: columns of the output of one CTA.
        block_k: contracted elements of one step.
        dequantizers: warpgroups that dequantize a tile of W together.
    """

    @property
    def block_m(self) -> int: ...  # noqa: D102
    @property
    def block_n(self) -> int: ...  # noqa: D102
    @property
    def block_k(self) -> int: ...  # noqa: D102
    @property
    def dequantizers(self) -> int: ...  # noqa: D102


@runtime_checkable
class Kernel(Protocol):
    """A module that multiplies x with a 4-bit weight, which it dequantizes tile by tile.

    Attributes:
        COST: for the prediction of its time.
    """

    COST: Cost

    def supports(self, chip: Chip, product: Product) -> bool:
        """Return True if the kernel runs on `chip`, can compute `product`, and is the best choice of those after it."""

    def config_for(self, chip: Chip, product: Product) -> Any:
        """Return the `Config` for a product that `supports` accepts."""

    def pad_activations(self, x: jax.Array, w: PackedWeight, config: Any, *, transposed: bool) -> jax.Array:
        """Return x as `matmul` takes it; `pad_to_tiles` for kernels that work on whole tiles."""

    def matmul(
        self, x: jax.Array, w: PackedWeight, *, config: Any, transposed: bool = False, execution: Execution = GPU
    ) -> jax.Array:
        """Return x @ W^T [M, N], or x @ W [M, K] if `transposed`, in x.dtype, summed in float32.

        Every tile that would reach over an edge is moved back inside, and so computes some elements a second time, to
        the same bits: nothing is masked and nothing of W is padded.

        Args:
            x: bfloat16 or float16 [M, K], M >= block_m; if transposed [M, N'], see `pad_to_tiles`.
            w: the weight, N a multiple of 8 and N >= block_n (block_k if transposed).
            config: tile sizes; K a multiple of block_k, or of block_n if transposed.
            transposed: multiply by W instead of W^T.
            execution: on a GPU, or interpreted.

        Raises:
            ValueError: x or the weight does not fit the tiles.
        """


def pad_to_tiles(x: jax.Array, w: PackedWeight, config: Config, *, transposed: bool) -> jax.Array:
    """Pad x to whole tiles.

    Args:
        x: [M, K] ([M, N] if transposed), M >= 1.
        w: the weight.
        config: tile sizes.
        transposed: x is multiplied by W.

    Returns:
        [M', K], or [M', ceil(N / block_k) * block_k] as `pad_contraction` makes it; M' >= block_m, and a multiple of 8
        where there is more than a tile, since TMA copies 8 rows at a time.
    """
    m = x.shape[0]
    rows = max(config.block_m, -(-m // 8) * 8)
    if rows > m:
        x = jnp.pad(x, ((0, rows - m), (0, 0)))
    if not transposed:
        return x
    n = w.shape[0]
    return pad_contraction(jnp.pad(x, ((0, 0), (0, n - x.shape[1]))), n, config.block_k)


def check_operands(x: jax.Array, w: PackedWeight, config: Config, *, transposed: bool, tma: bool) -> None:
    """Raise ValueError if x or the weight does not fit the tiles.

    Args:
        x: see `Kernel.matmul`.
        w: see `Kernel.matmul`.
        config: tile sizes.
        transposed: x is multiplied by W.
        tma: rows of x are copied by TMA, 8 at a time.
    """
    m, columns = x.shape
    n, k = w.shape
    least, whole = (config.block_k, config.block_n) if transposed else (config.block_n, config.block_k)
    if n % 8 or (tma and m % 8):
        raise ValueError(f"rows of x ({m}) and of the weight ({n}) must be multiples of 8")
    if m < config.block_m or n < least:
        raise ValueError(f"{m} rows of x and {n} of the weight are less than a tile of {config}")
    if k % whole:
        raise ValueError(f"{k} columns of the weight are not whole tiles of {config}")
    contracted = -(-(n if transposed else k) // config.block_k) * config.block_k
    if columns != contracted:
        raise ValueError(f"x {x.shape} needs {contracted} columns for W {w.shape} and {config}")
