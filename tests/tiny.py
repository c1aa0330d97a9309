"""Tiny models for tests: weights made from a seed, stacked as the model wants them."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax import models
from qlora_jax.layers import LoRAConfig, Precision
from qlora_jax.quantization import QuantizationConfig, quantize

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(Path(__file__).parent / "reference"))

from random_weights import random_weights  # noqa: E402

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN = QuantizationConfig(quant_type="none")


def stacked_tensors(
    config: Mapping[str, Any], weights: Mapping[str, np.ndarray], quantization: QuantizationConfig, dtype: Any
) -> dict[tuple[str, ...], Any]:
    """{path: array or QuantizedTensor} of a model, from Hugging Face-named weights: the slow, obvious way."""
    layers: dict[tuple[str, ...], list[Any]] = {}
    for spec in models.base_tensors(config):
        value: Any = jnp.asarray(weights[spec.name], jnp.float32 if spec.kind == "norm" else dtype)
        if spec.quantized and quantization.quant_type != "none":
            value = quantize(
                value,
                quant_type=quantization.quant_type,
                block_size=quantization.block_size,
                double_quant=quantization.double_quant,
            )
        layers.setdefault(spec.path, []).append(value)
    return {
        path: values[0] if path[0] != "layers" else jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
        for path, values in layers.items()
    }


def build(
    config: Mapping[str, Any] = CONFIG,
    *,
    seed: int = 0,
    quantization: QuantizationConfig = PLAIN,
    dtype: Any = jnp.float32,
    rank: int = 4,
    dropout: float = 0.0,
    modules: str | None = "all",
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, lora, frozen) of a random model; `modules` None means without adapters."""
    weights = random_weights([(spec.name, spec.shape) for spec in models.base_tensors(config)], seed)
    lora_config = None
    if modules is not None:
        lora_config = LoRAConfig(rank, 2.0 * rank, dropout, models.lora_modules(config, modules))
    precision = Precision(quantization, dtype, lora_config)
    graphdef, lora, frozen = models.split_model(models.abstract_model(config, precision))
    frozen = models.fill_base(frozen, stacked_tensors(config, weights, quantization, dtype))
    return graphdef, models.init_lora(lora, jax.random.key(seed)), frozen


def logits(
    graphdef: nnx.GraphDef, lora: nnx.State, frozen: nnx.State, input_ids: np.ndarray, **kwargs: Any
) -> jax.Array:
    """float32 logits [B, S, V], positions 0, 1, ... unless given."""

    def run(lora: nnx.State, frozen: nnx.State, input_ids: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
        model = nnx.merge(graphdef, lora, frozen)
        arrays = {"positions": jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape), **arrays}
        return model.logits(model(input_ids, **arrays)[0])

    return jax.jit(run)(lora, frozen, jnp.asarray(input_ids), kwargs)
