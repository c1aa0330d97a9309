"""Write the logits of tiny random LLaMA-family models, computed by transformers in float32.

    python make_llama_golden.py --output-dir ../golden

writes `llama_variants.json` (for every variant: the content of its config.json, the weights' seed, whether PyTorch saw
several rows) and `llama_variants.npz` (`<variant>/input_ids` int32 [B, S], `<variant>/positions` int32 [P],
`<variant>/logits` float32 [B, P, V], the logits at those positions). Weights come from `random_weights`.

Variants whose config has `rope_scaling` / `rope_theta` are written as transformers 4 and the models' authors wrote
them; the others are what transformers 5 saves (`rope_parameters`).
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from random_weights import random_weights
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

SEQUENCE = 64
VOCAB = 96
STORED_POSITIONS = 24

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def old_config(**fields: object) -> dict:
    """Build a config.json as transformers 4 wrote it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "llama",
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        **SIZES,
        **fields,
    }


def new_config(config_class: type = LlamaConfig, **fields: object) -> dict:
    """Build a config.json as transformers 5 writes it (defaults left out by its own rule)."""
    config = config_class(**{**SIZES, "dtype": "float32", **fields})
    config.architectures = ["LlamaForCausalLM" if config_class is LlamaConfig else "MistralForCausalLM"]
    return json.loads(config.to_json_string())


def rope(rope_type: str, theta: float = 10000.0, **fields: object) -> dict:
    """Build transformers 5's `rope_parameters`."""
    return {"rope_type": rope_type, "rope_theta": theta, **fields}


def variants() -> dict[str, dict]:
    """Name -> config.json of every variant."""
    return {
        # As huggyllama/llama-7b has it: no num_key_value_heads, no rope_theta, a field nobody reads.
        "llama1": old_config(
            max_sequence_length=128, pad_token_id=0, num_hidden_layers=3, transformers_version="4.28.0.dev0"
        ),
        "llama2_gqa": old_config(
            num_key_value_heads=2,
            pretraining_tp=1,
            rms_norm_eps=1e-05,
            rope_scaling=None,
            attention_bias=False,
            rope_theta=10000.0,
        ),
        "llama3_old": old_config(
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_theta=500000.0,
            rope_scaling={
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_type": "llama3",
            },
            attention_bias=False,
            mlp_bias=False,
            attention_dropout=0.0,
            bos_token_id=90,
            eos_token_id=[91, 92, 93],
            pretraining_tp=1,
            torch_dtype="bfloat16",
            transformers_version="4.43.0.dev0",
        ),
        "llama3": new_config(
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_parameters=rope(
                "llama3",
                5000.0,
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=48,
            ),
        ),
        "smollm2_tied": new_config(
            hidden_size=72,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            rope_parameters=rope("default", 100000.0),
        ),
        "tinyllama": new_config(
            num_attention_heads=8, num_key_value_heads=1, rms_norm_eps=1e-5, rope_parameters=rope("default")
        ),
        # `type` rather than `rope_type`, as in the long-context LLaMA-2 models of 2023.
        "linear_old": old_config(
            num_key_value_heads=4,
            rope_theta=10000.0,
            rope_scaling={"factor": 4.0, "type": "linear"},
        ),
        "linear": new_config(rope_parameters=rope("linear", factor=2.5)),
        "dynamic_below": new_config(rope_parameters=rope("dynamic", factor=4.0), max_position_embeddings=64),
        "dynamic_above": new_config(rope_parameters=rope("dynamic", factor=4.0), max_position_embeddings=24),
        "dynamic_above_old": old_config(
            num_key_value_heads=2,
            max_position_embeddings=40,
            rope_theta=10000.0,
            rope_scaling={"factor": 2.0, "type": "dynamic"},
        ),
        "yarn": new_config(
            rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32),
            max_position_embeddings=128,
        ),
        "yarn_explicit": new_config(
            hidden_size=96,
            rope_parameters=rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=16,
                attention_factor=1.4,
                beta_fast=4.0,
                beta_slow=0.5,
                truncate=False,
            ),
            max_position_embeddings=128,
        ),
        "yarn_mscale": new_config(
            rope_parameters=rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=8.0,
                mscale=1.0,
                mscale_all_dim=0.5,
            ),
            max_position_embeddings=128,
        ),
        "yarn_old": old_config(
            num_key_value_heads=2,
            max_position_embeddings=32,
            rope_theta=10000.0,
            rope_scaling={"factor": 2.0, "type": "yarn", "original_max_position_embeddings": 32},
        ),
        "mistral_window": new_config(
            MistralConfig, num_key_value_heads=2, sliding_window=12, rope_parameters=rope("default")
        ),
        # As Mistral-7B-v0.3 has it, with Nemo's head_dim.
        "mistral_old": old_config(
            architectures=["MistralForCausalLM"],
            attention_dropout=0.0,
            head_dim=24,
            model_type="mistral",
            num_key_value_heads=2,
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            sliding_window=None,
            torch_dtype="bfloat16",
            transformers_version="4.42.0.dev0",
        ),
        "attention_bias": new_config(attention_bias=True, num_key_value_heads=2),
        "mlp_bias": new_config(mlp_bias=True),
        "head_dim": new_config(head_dim=32, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    }


def logits(config: dict, seed: int, input_ids: np.ndarray) -> np.ndarray:
    """float32 logits [B, S, V] by transformers, eager attention."""
    with (
        tempfile.TemporaryDirectory() as directory
    ):  # read as a user's config.json is; transformers edits dicts in place
        Path(directory, "config.json").write_text(json.dumps(config))
        hf_config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="eager").eval()
    specs = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    with torch.no_grad():
        for name, value in random_weights(specs, seed).items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
        return model(torch.from_numpy(input_ids).long(), use_cache=False).logits.numpy()


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()

    arrays, described = {}, {}
    for index, (name, config) in enumerate(variants().items()):
        seed = 1000 + index
        rng = np.random.default_rng(seed)
        input_ids = rng.integers(0, VOCAB, (2, SEQUENCE), dtype=np.int32)
        positions = np.sort(rng.choice(SEQUENCE - 2, STORED_POSITIONS - 2, replace=False))
        positions = np.concatenate([positions, [SEQUENCE - 2, SEQUENCE - 1]]).astype(np.int32)
        result = logits(config, seed, input_ids)
        assert np.isfinite(result).all(), name
        arrays[f"{name}/input_ids"] = input_ids
        arrays[f"{name}/positions"] = positions
        arrays[f"{name}/logits"] = result[:, positions]
        described[name] = {"seed": seed, "config": config}
        print(f"{name:20} logits rms {result.std():.3f} max {np.abs(result).max():.3f}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output_dir / "llama_variants.npz", **arrays)
    (args.output_dir / "llama_variants.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main()
