"""QLoRA for JAX/XLA: frozen 4-bit base weights, LoRA adapters as the only trainable parameters.

    q = qlora_jax.quantize(weight)  # NF4, blocks of 64, double quantisation: the bytes bitsandbytes would write
    y = qlora_jax.matmul(x, q)  # x @ W^T, differentiable in x

    config = qlora_jax.TrainConfig(model_name_or_path="path/to/model", dataset="data.jsonl", output_dir="output")
    result = qlora_jax.finetune(config)  # what scripts/finetune.py runs

The names in `__all__` are the public interface. Each is imported when it is first used: `import qlora_jax` alone loads
neither JAX nor transformers.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_jax.checkpoints.hub import resolve_model
    from qlora_jax.checkpoints.loading import load_base
    from qlora_jax.checkpoints.peft import load_adapter, save_adapter
    from qlora_jax.checkpoints.tokenizer import load_tokenizer
    from qlora_jax.finetuning import finetune
    from qlora_jax.generation import generate
    from qlora_jax.kernels import matmul
    from qlora_jax.quantization import QuantizationConfig, QuantizedTensor, dequantize, quantize
    from qlora_jax.training.config import TrainConfig

    __version__: str
else:
    _MODULES = {
        "QuantizationConfig": "quantization",
        "QuantizedTensor": "quantization",
        "TrainConfig": "training.config",
        "dequantize": "quantization",
        "finetune": "finetuning",
        "generate": "generation",
        "load_adapter": "checkpoints.peft",
        "load_base": "checkpoints.loading",
        "load_tokenizer": "checkpoints.tokenizer",
        "matmul": "kernels",
        "quantize": "quantization",
        "resolve_model": "checkpoints.hub",
        "save_adapter": "checkpoints.peft",
    }

    # Hidden from type checkers, which would take a module with __getattr__ to have every attribute.
    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            value = version("qlora-jax")
        elif name in _MODULES:
            from importlib import import_module

            value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "QuantizationConfig",
    "QuantizedTensor",
    "TrainConfig",
    "__version__",
    "dequantize",
    "finetune",
    "generate",
    "load_adapter",
    "load_base",
    "load_tokenizer",
    "matmul",
    "quantize",
    "resolve_model",
    "save_adapter",
]
