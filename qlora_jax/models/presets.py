"""Configurations of well-known models, so that a plan needs neither weights nor a network.

Each is what Hugging Face's config.json of that model says, without the fields that change no shape and no result.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **more,
    }


_LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

PRESETS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        # LLaMA (Touvron et al. 2023), the models of the QLoRA paper.
        "llama-7b": _llama(4096, 11008, 32, 32),
        "llama-13b": _llama(5120, 13824, 40, 40),
        "llama-33b": _llama(6656, 17920, 60, 52),
        "llama-65b": _llama(8192, 22016, 80, 64, rms_norm_eps=1e-5),
        "llama-2-70b": _llama(
            8192, 28672, 80, 64, num_key_value_heads=8, max_position_embeddings=4096, rms_norm_eps=1e-5
        ),
        "llama-3.1-8b": _llama(4096, 14336, 32, 32, **_LLAMA_3),
        "llama-3.3-70b": _llama(8192, 28672, 80, 64, **_LLAMA_3),
        "smollm2-135m": _llama(
            576, 1536, 30, 9, vocab_size=49152, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
            rope_theta=100000.0, tie_word_embeddings=True,
        ),
    }
)  # fmt: skip
"""Short name -> contents of config.json."""
