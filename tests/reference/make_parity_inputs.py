"""Write the rows and the starting adapters of the parity run (in the project's environment; needs no PyTorch).

    python make_parity_inputs.py --model smollm2-hf-f32 --data chat.jsonl --output-dir parity

`--data`: one JSON object a line, `{"messages": [{"role": ..., "content": ...}, ...]}` ending with the assistant's turn,
or `{"input": ..., "output": ...}` (one user turn, one answer). Written: `rows.npz` with `input_ids` uint16
[steps, batch, length] (padded on the right), `lengths` and `source_lengths` uint16 [steps, batch] (tokens of the row;
tokens before the first trained one) and the settings of the adapters (`rank`, `alpha`, `adapter_seed`, `b_scale_*`, see
`random_weights.random_adapter`), and two PEFT adapters: `adapter-zero` (B zero, as PEFT initialises it) and
`adapter-random` (B random, so that A has a gradient from the first step on).
"""

import argparse
import json
from pathlib import Path

import numpy as np
from random_weights import random_adapter
from transformers import AutoConfig, AutoTokenizer

from qlora_jax.checkpoints.peft import AdapterConfig, save_adapter
from qlora_jax.models import model_config

RANK = 8
ALPHA = 16
ADAPTER_SEED = 5
B_SCALES = {"zero": 0.0, "random": 0.02}


def linears(config: object) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Stacked shapes (L, out, in) of every linear but the head of a LLaMA."""
    layers, hidden, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {
        ("self_attn", "q_proj"): (heads, hidden),
        ("self_attn", "k_proj"): (kv_heads, hidden),
        ("self_attn", "v_proj"): (kv_heads, hidden),
        ("self_attn", "o_proj"): (hidden, heads),
        ("mlp", "gate_proj"): (ffn, hidden),
        ("mlp", "up_proj"): (ffn, hidden),
        ("mlp", "down_proj"): (hidden, ffn),
    }
    return {("layers", *module): (layers, *shape) for module, shape in shapes.items()}


def messages(row: dict) -> list[dict]:
    """Turn a row into chat messages."""
    if "messages" in row:
        return row["messages"]
    text = row["input"].removeprefix("### Human:").removesuffix("### Assistant:").strip()
    return [{"role": "user", "content": text}, {"role": "assistant", "content": row["output"].strip()}]


def main() -> None:
    """Write rows and adapters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    for line in args.data.read_text(encoding="utf-8").splitlines():
        chat = messages(json.loads(line))
        source = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        assert whole.startswith(source)
        source_ids = tokenizer(source, add_special_tokens=False).input_ids
        ids = source_ids + tokenizer(whole[len(source) :], add_special_tokens=False).input_ids
        if len(source_ids) < args.length - 8:  # at least a few trained tokens
            rows.append((ids[: args.length], len(source_ids)))
    needed = args.steps * args.batch
    if len(rows) < needed:
        raise SystemExit(f"{args.data} gives {len(rows)} rows short enough; {needed} are needed.")
    order = np.random.default_rng(0).permutation(len(rows))[:needed]
    shape = (args.steps, args.batch)
    input_ids = np.zeros((needed, args.length), np.uint16)
    for index, row in enumerate(order):
        input_ids[index, : len(rows[row][0])] = rows[row][0]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.output_dir / "rows.npz",
        input_ids=input_ids.reshape(*shape, args.length),
        lengths=np.array([len(rows[row][0]) for row in order], np.uint16).reshape(shape),
        source_lengths=np.array([rows[row][1] for row in order], np.uint16).reshape(shape),
        rank=RANK,
        alpha=ALPHA,
        adapter_seed=ADAPTER_SEED,
        **{f"b_scale_{name}": b_scale for name, b_scale in B_SCALES.items()},
    )
    shapes = linears(AutoConfig.from_pretrained(args.model))
    for name, b_scale in B_SCALES.items():
        save_adapter(
            args.output_dir / f"adapter-{name}",
            random_adapter(shapes, RANK, ADAPTER_SEED, b_scale),
            AdapterConfig(RANK, ALPHA, 0.0, tuple(path[-1] for path in shapes), None),
            model_config(AutoConfig.from_pretrained(args.model).to_dict()),
        )


if __name__ == "__main__":
    main()
