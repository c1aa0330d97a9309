"""MXFP4's and NVFP4's tensors as a QuantizedTensor: E2M1 codes whose blocks share a scale of 8 bits.

    MXFP4  gpt-oss: `_blocks` uint8 [..., K / 32, 16], element 2 j in the low nibble of byte j; `_scales` uint8
           [..., K / 32], e8m0                                  w = e2m1[code] * 2^(scale - 127)
    NVFP4  `weight_packed` (compressed-tensors) or `weight` (modelopt) uint8 [N, K / 2], element 2 j low; `weight_scale`
           e4m3 [N, K / 16]; one float32 a weight: compressed-tensors divides by its `weight_global_scale`, modelopt
           multiplies with its `weight_scale_2`                 w = e2m1[code] * (scale / global) or (scale * global)

Sources: transformers, integrations/mxfp4.py; compressed-tensors, compressors/quantized_compressors/fp4_quantized.py and
quantization/lifecycle/forward.py; NVIDIA modelopt, torch/quantization/qtensor/nvfp4_tensor.py.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization.codebooks import e4m3_map
from qlora_jax.quantization.formats import FORMATS
from qlora_jax.quantization.quantized_tensor import QuantizedTensor

# Codes that are swapped at a time: with what is made of them they fit a core's cache.
_CHUNK_BYTES = 1 << 17


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray, *, dtype: Any = "bfloat16") -> QuantizedTensor:
    """Return the [N, K] weight of `_blocks` uint8 [N, K / 32, 16] and `_scales` uint8 [N, K / 32], lossless.

    Raises:
        UserError: shapes or dtypes that do not fit each other, or a scale of NaN.
    """
    if blocks.ndim != 3 or blocks.shape[2] != 16 or scales.shape != blocks.shape[:2]:
        raise UserError(f"MXFP4 blocks {list(blocks.shape)} do not fit scales {list(scales.shape)}.")
    absmax = _bytes_of(scales, jnp.float8_e8m0fnu)
    if (absmax == 255).any():
        raise UserError("MXFP4 scales hold NaN.")
    rows, groups = scales.shape
    codes = _swapped(blocks)
    return QuantizedTensor(codes, absmax, None, None, (rows, groups * 32), "mxfp4", 32, jnp.dtype(dtype).name)


def from_nvfp4(
    packed: np.ndarray,
    scales: np.ndarray,
    global_scale: Any,
    *,
    convention: Literal["divide", "multiply"],
    dtype: Any = "bfloat16",
) -> QuantizedTensor:
    """Return the [N, K] weight of codes uint8 [N, K / 2] and block scales [N, K / 16], lossless.

    Args:
        packed: codes, two a byte, the even element low.
        scales: e4m3 (or its bytes, uint8) [N, K / 16].
        global_scale: one float32 of the weight.
        convention: the block scales are divided by it (compressed-tensors) or multiplied with it (modelopt).
        dtype: what `dequantize` should return by default.

    Raises:
        UserError: shapes or dtypes that do not fit each other, or a scale that is not finite.
    """
    block = FORMATS["nvfp4"].block_size or 0
    if packed.ndim != 2 or packed.shape[1] * 2 % block or scales.shape != (len(packed), packed.shape[1] * 2 // block):
        raise UserError(f"NVFP4 codes {list(packed.shape)} do not fit scales {list(scales.shape)}.")
    absmax = _bytes_of(scales, jnp.float8_e4m3fn)
    factor = np.asarray(global_scale, np.float32).reshape(-1)
    if factor.size != 1:
        raise UserError(f"NVFP4 has one global scale a weight, not {factor.size}.")
    with np.errstate(all="ignore"):
        table = e4m3_map() / factor[0] if convention == "divide" else e4m3_map() * factor[0]
    if not np.isfinite(table)[absmax].all():
        raise UserError("NVFP4 scales are not finite.")
    shape = (packed.shape[0], packed.shape[1] * 2)
    # Entries that are not used may be NaN, and stay out of sums.
    table = np.nan_to_num(table, nan=0.0, posinf=0.0, neginf=0.0)
    return QuantizedTensor(
        _swapped(packed), absmax, None, None, shape, "nvfp4", block, jnp.dtype(dtype).name, scale_map=table
    )


def _bytes_of(scales: np.ndarray, dtype: Any) -> np.ndarray:
    """Return scales of 8 bits, or their bytes, as flat bytes."""
    if scales.dtype not in (np.uint8, dtype):
        raise UserError(f"scales must be {jnp.dtype(dtype).name} or its bytes, not {scales.dtype.name}.")
    return np.ascontiguousarray(scales).view(np.uint8).reshape(-1)


def _swapped(packed: np.ndarray) -> np.ndarray:
    """Exchange the nibbles of every byte, flat: the even element high, as bitsandbytes has it."""
    if packed.dtype != np.uint8:
        raise UserError(f"packed codes must be uint8, not {packed.dtype.name}.")
    flat = np.ascontiguousarray(packed).reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, flat.size, _CHUNK_BYTES):
        part = flat[start : start + _CHUNK_BYTES]
        np.bitwise_or(part << 4, part >> 4, out=out[start : start + _CHUNK_BYTES])
    return out
