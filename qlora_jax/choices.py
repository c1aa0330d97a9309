"""Values of fields that several floors know; imports nothing, so that flags need no JAX."""

from typing import Literal

Remat = Literal["full", "save_attention", "offload", "none"]
"""Activations of a layer that are kept for the backward pass, see `qlora_jax.nn.remat`."""

Kernel = Literal["auto", "xla", "fused", "unfused", "dequantize"]
"""Implementations of the 4-bit operations, see `qlora_jax.kernels`."""

OnBadRow = Literal["error", "skip"]
"""Treatment of a row that cannot be used: refuse the data set, or leave the row out and count it."""
