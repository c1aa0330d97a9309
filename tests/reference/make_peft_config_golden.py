"""Write the fields of PEFT's LoraConfig, and which linears of a small model PEFT adapts for some of their values.

    python make_peft_config_golden.py --output ../golden/peft_config.json

writes `peft` (its version), `fields` {name of a field of adapter_config.json: its default}, `config` (config.json of
the model) and `cases`: [{`fields` of the LoraConfig, `adapted`: {name of a linear: [rank, scale of B A]}, or `refused`:
True if PEFT raises an error}].
"""

import argparse
import json
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

CASES = (
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["self_attn.v_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear", "exclude_modules": ["k_proj"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": "q_proj"},
    {"target_modules": r"model\.layers\.\d+\.self_attn\..*"},
    {"target_modules": r"model\.layers\.[01]\.mlp\.(gate|up)_proj"},
    {"target_modules": r".*_proj", "exclude_modules": r".*\.(k_proj|mlp\..*)"},
    {"target_modules": r"(?i).*\.Q_PROJ"},
    {"target_modules": r".*\.(?=q|k).*_proj"},
    {"target_modules": r".*\.q_pro"},
    {"target_modules": r".*(q_proj|lm_head)"},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": "lm_head"},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"^model.layers.1.self_attn.q_proj": 2}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 3}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"proj": 2, "self_attn": 3}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.[02]\..*": 2}, "alpha_pattern": {"[qv]_.*": 1}},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj|v_proj": 2}, "use_rslora": True},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"^self_attn\.q_proj": 2, r".*v_proj$": 3}},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {r"layers\.(1|2)\.self_attn\.[qk]_proj": 5}},
)  # fmt: skip


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
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
    )
    config.architectures = ["LlamaForCausalLM"]
    cases = [{"fields": fields, **adapt(config, fields)} for fields in CASES]
    golden = {
        "peft": peft.__version__,
        "fields": dict(sorted(LoraConfig().to_dict().items())),
        "config": json.loads(config.to_json_string()),
        "cases": cases,
    }
    args.output.write_text(json.dumps(golden, indent=1, default=vars) + "\n", encoding="utf-8")
    print(len(golden["fields"]), "fields;", [len(case.get("adapted", ())) for case in cases])


def adapt(config: LlamaConfig, fields: dict) -> dict:
    """Let PEFT adapt the model; linears with their ranks and scales."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **fields))
    except ValueError:
        return {"refused": True}
    found = {
        name.removeprefix("base_model.model."): [module.r["default"], module.scaling["default"]]
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }
    return {"adapted": found}


if __name__ == "__main__":
    main()
