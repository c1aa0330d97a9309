"""Row-wise 8-bit quantisation (LLM.int8(), Dettmers et al. 2022), as bitsandbytes' Linear8bitLt stores weights.

Row-wise absmax over the input dimension rather than block-wise 8-bit, because it is what 8-bit checkpoints hold (CB
and SCB), and because one scale for a whole output row can be applied after the product, so that a later kernel can use
int8 matrix units. It costs 8 + 32 / K bits a parameter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CHUNK_ELEMENTS = 1 << 18
_INVERSE_127 = np.float32(1 / 127)


def quantize_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes int8[N, K], absmax float32[N]) of a float [N, K] weight: codes = round(w * (127 / absmax)).

    Byte-equal to bitsandbytes' `int8_vectorwise_quant` without outliers. Rows with NaN or infinity get a scale that is
    not finite; rows of zeros get zeros.
    """
    codes = np.empty(weight.shape, np.int8)
    absmax = np.empty(len(weight), np.float32)
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        values = weight[part].astype(np.float32)
        absmax[part] = np.abs(values).max(axis=1)
        with np.errstate(all="ignore"):
            scaled = np.rint(values * (np.float32(1) / absmax[part] * np.float32(127))[:, None])
            codes[part] = np.nan_to_num(scaled, nan=0).astype(np.int8)
    return codes, absmax


def dequantize_rows(codes: Any, absmax: Any) -> jax.Array:
    """Return float32 [*stack, N, K]: codes * absmax / 127, in bitsandbytes' order of roundings."""
    return jnp.asarray(codes).astype(jnp.float32) * jnp.asarray(absmax)[..., None] * _INVERSE_127
