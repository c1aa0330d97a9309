"""Values of fields that several floors know; imports nothing, so that flags need no JAX."""

from typing import Literal

Remat = Literal["full", "save_attention", "offload", "none"]
"""Activations of a layer that are kept for the backward pass, see `qlora_jax.nn.remat`."""

Kernel = Literal["auto", "xla", "fused", "unfused", "dequantize"]
"""Implementations of the 4-bit operations, see `qlora_jax.kernels`."""

OnBadRow = Literal["error", "skip"]
"""Treatment of a row that cannot be used: refuse the data set, or leave the row out and count it."""

Bits = Literal["auto", 4, 8, 16]
"""Storage of the linear weights: as a checkpoint holds them or in 4 bits, in 4, in 8, or not quantised."""

QuantType = Literal["nf4", "fp4", "int4", "q4_0", "q4_1"]
"""4-bit types that weights are quantised to, see `qlora_jax.quantization.FORMATS`."""

OWN_BLOCKS = frozenset(("q4_0", "q4_1"))
"""Those of them with blocks and scales of their own, which `block_size` and `double_quant` do not change."""

BaseKind = Literal["dequantized", "original"]
"""The base that an adapter is merged into: its weights as training read them, or those they were quantised from."""

ExportTarget = Literal[
    "safetensors", "bitsandbytes", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_0", "gguf-q4_1", "gguf-lora"
]
"""Formats of an export."""

CacheDtype = Literal["auto", "bfloat16", "int8"]
"""Types that keys and values are kept in for tokens to come; auto: that of computation."""

EarlyStopping = Literal["true", "false", "never"]
"""Conditions that end a search with beams before its longest answer.

true: as many finished beams as are kept. false: the running ones are worse by their present length. never: by any."""
