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


_LLAMA_3: dict[str, Any] = {
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


def _llama_3(factor: float = 8.0, **more: Any) -> dict[str, Any]:
    return {**_LLAMA_3, "rope_scaling": {**_LLAMA_3["rope_scaling"], "factor": factor}, **more}


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """Qwen2.5; the three small sizes tie the head to the embedding, whose vocabulary is padded less."""
    tied = hidden < 3584
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936 if tied else 152064,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        **more,
    }


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": hidden < 4096,
    }


def _gemma3(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, small: bool = False, **more: Any
) -> dict[str, Any]:
    """Gemma 3's text part; the two small sizes have a shorter window and context, and no rotary scaling."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 262144 if small else 262208,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "max_position_embeddings": 32768 if small else 131072,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None if small else {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000.0,
        "sliding_window": 512 if small else 1024,
        "sliding_window_pattern": 6,
        **more,
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
        "llama-3-8b": _llama(
            4096, 14336, 32, 32, **{**_LLAMA_3, "max_position_embeddings": 8192, "rope_scaling": None}
        ),
        "llama-3.2-1b": _llama(2048, 8192, 16, 32, **_llama_3(32.0, tie_word_embeddings=True)),
        "llama-3.2-3b": _llama(3072, 8192, 28, 24, **_llama_3(32.0, tie_word_embeddings=True)),
        "llama-3.1-8b": _llama(4096, 14336, 32, 32, **_LLAMA_3),
        "llama-3.3-70b": _llama(8192, 28672, 80, 64, **_LLAMA_3),
        "mistral-7b": _llama(
            4096, 14336, 32, 32, architectures=["MistralForCausalLM"], model_type="mistral", vocab_size=32768,
            num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1000000.0,
            sliding_window=None,
        ),
        "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2),
        "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2),
        "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2),
        "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4),
        "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8),
        "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8),
        "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8),
        "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
        "qwen3-1.7b": _qwen3(2048, 6144, 28, 16),
        "qwen3-4b": _qwen3(2560, 9728, 36, 32),
        "qwen3-8b": _qwen3(4096, 12288, 36, 32),
        "qwen3-14b": _qwen3(5120, 17408, 40, 40),
        "qwen3-32b": _qwen3(5120, 25600, 64, 64),
        "gemma3-270m": _gemma3(640, 2048, 18, 4, 1, small=True),
        "gemma3-1b": _gemma3(1152, 6912, 26, 4, 1, small=True),
        "gemma3-4b": _gemma3(2560, 10240, 34, 8, 4),
        "gemma3-12b": _gemma3(3840, 15360, 48, 16, 8),
        "gemma3-27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
        "smollm2-135m": _llama(
            576, 1536, 30, 9, vocab_size=49152, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
            rope_theta=100000.0, tie_word_embeddings=True,
        ),
    }
)  # fmt: skip
"""Short name -> contents of config.json."""
