"""Quantised weights: formats as data (`FORMATS`), NF4 and FP4 with double quantisation as in QLoRA, 8-bit ones."""

from qlora_jax.quantization.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from qlora_jax.quantization.blockwise import block_scales, dequantize, dequantize_on_host, lookup, quantize
from qlora_jax.quantization.codebooks import BLOCK_SIZES
from qlora_jax.quantization.formats import FORMATS, Format
from qlora_jax.quantization.gguf_blocks import from_gguf, to_gguf
from qlora_jax.quantization.grouped_int4 import from_awq, from_gptq
from qlora_jax.quantization.microscaling import from_mxfp4, from_nvfp4
from qlora_jax.quantization.mixed import MixedQuantization, Quantization
from qlora_jax.quantization.quantized_tensor import QuantizationConfig, QuantizedTensor, abstract_quantized

__all__ = [
    "BLOCK_SIZES",
    "FORMATS",
    "Format",
    "MixedQuantization",
    "Quantization",
    "QuantizationConfig",
    "QuantizedTensor",
    "abstract_quantized",
    "block_scales",
    "dequantize",
    "dequantize_on_host",
    "from_awq",
    "from_bitsandbytes",
    "from_gguf",
    "from_gptq",
    "from_mxfp4",
    "from_nvfp4",
    "lookup",
    "quantize",
    "to_bitsandbytes",
    "to_gguf",
]
