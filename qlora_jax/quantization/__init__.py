"""Quantised weights: block-wise NF4 and FP4 with double quantisation as in QLoRA, row-wise int8 as in LLM.int8()."""

from qlora_jax.quantization.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from qlora_jax.quantization.blockwise import block_scales, dequantize, lookup, quantize
from qlora_jax.quantization.codebooks import BLOCK_SIZES
from qlora_jax.quantization.quantized_tensor import (
    QUANT_TYPES,
    QuantizationConfig,
    QuantizedTensor,
    abstract_quantized,
)

__all__ = [
    "BLOCK_SIZES",
    "QUANT_TYPES",
    "QuantizationConfig",
    "QuantizedTensor",
    "abstract_quantized",
    "block_scales",
    "dequantize",
    "from_bitsandbytes",
    "lookup",
    "quantize",
    "to_bitsandbytes",
]
