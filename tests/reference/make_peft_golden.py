"""Write a LoRA adapter with PEFT itself, and the logits of the adapted model in float32.

    python make_peft_golden.py --output-dir ../golden/peft_tiny

writes `adapter_config.json` and `adapter_model.safetensors` (as PEFT saves them; A and B random, non-zero) and
`golden.npz`: `config` (the base model's config.json as text), `seed` (of `random_weights`), `input_ids` int32 [B, S],
`base_logits` and `logits` float32 [B, S, V], without and with the adapter.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from random_weights import random_weights
from transformers import AutoModelForCausalLM, LlamaConfig

SEED = 77
ADAPTER_SEED = 78


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        dtype="float32",
    )
    config.architectures = ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    specs = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    with torch.no_grad():
        for name, value in random_weights(specs, SEED).items():
            model.get_parameter(name).copy_(torch.from_numpy(value))

    input_ids = np.random.default_rng(SEED).integers(0, config.vocab_size, (2, 16), dtype=np.int32)
    ids = torch.from_numpy(input_ids).long()
    model.eval()
    with torch.no_grad():
        base_logits = model(ids, use_cache=False).logits.numpy()

    lora = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora).eval()
    adapted.peft_config["default"].base_model_name_or_path = "tiny-random-llama"
    trainable = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    values = random_weights([(name, tuple(parameter.shape)) for name, parameter in trainable.items()], ADAPTER_SEED)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(torch.from_numpy(0.5 * values[name]))
        logits = adapted(input_ids=ids, use_cache=False).logits.numpy()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)  # also writes a model card, which is not needed
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(directory, name), args.output_dir / name)
    np.savez_compressed(
        args.output_dir / "golden.npz",
        config=np.array(json.dumps(json.loads(config.to_json_string()))),
        seed=np.array(SEED),
        input_ids=input_ids,
        base_logits=base_logits,
        logits=logits,
    )
    print("the adapter moves the logits by", np.abs(logits - base_logits).max())


if __name__ == "__main__":
    main()
