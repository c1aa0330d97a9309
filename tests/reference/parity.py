"""Train a few steps with transformers + PEFT + bitsandbytes on the CPU and write every loss: the numbers to follow.

    python parity.py --model smollm2-hf-f32 --adapter adapter-zero --rows rows.npz --output losses.json

The recipe: base linears (all but lm_head) in NF4 with double quantisation, quantised from the float32 checkpoint; norms
and embeddings float32; no dropout; torch.optim.AdamW (betas 0.9, 0.999, eps 1e-8, no weight decay), constant learning
rate; gradients clipped to a global norm; one batch a step; the loss is transformers' own (mean over trained tokens).
`--compute-dtype bf16` runs the forward pass under bfloat16 autocast with bfloat16 embeddings; adapters stay float32.

`rows.npz` comes from make_parity_inputs.py. Written: settings, `losses` and `grad_norms` (before clipping) per step.
`--name NAME` stores them under that name in a JSON file of several runs, keeping the others.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import bitsandbytes
import numpy as np
import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(model_dir: Path, adapter_dir: Path, compute_dtype: torch.dtype) -> torch.nn.Module:
    """Load the quantised base with its adapter, trainable."""
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        ),
        device_map={"": "cpu"},
    )
    model.requires_grad_(False)
    if compute_dtype != torch.float32:
        model.get_input_embeddings().to(compute_dtype)  # the head too, where it is tied
        model.get_output_embeddings().to(compute_dtype)
    model.config.use_cache = False
    adapted = PeftModel.from_pretrained(model, adapter_dir, is_trainable=True)
    quantized = [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    layers = model.config.num_hidden_layers
    assert len(quantized) == 7 * layers, f"{len(quantized)} 4-bit linears in {layers} layers"
    return adapted


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-grad-norm", type=float, default=0.3)
    parser.add_argument("--compute-dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's own choice")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    rows = np.load(args.rows)
    positions = np.arange(rows["input_ids"].shape[-1])
    model = load(args.model, args.adapter, DTYPES[args.compute_dtype])
    model.train()  # no dropout anywhere: LLaMA has none, and the adapter's must be 0
    assert model.peft_config["default"].lora_dropout == 0
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trainable)
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses, grad_norms = [], []
    for step in range(args.steps):
        begin = time.perf_counter()
        ids, lengths = rows["input_ids"][step].astype(np.int64), rows["lengths"][step][:, None]
        mask = positions < lengths
        trained = mask & (positions >= rows["source_lengths"][step][:, None])
        labels = np.where(trained, ids, -100)
        autocast = torch.autocast("cpu", torch.bfloat16) if args.compute_dtype == "bf16" else nullcontext()
        with autocast:
            loss = model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask.astype(np.int64)),
                labels=torch.from_numpy(labels),
            ).loss
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, args.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        grad_norms.append(grad_norm.item())
        print(
            f"step {step + 1:3} loss {losses[-1]:.6f} grad norm {grad_norms[-1]:.6f} "
            f"{time.perf_counter() - begin:.1f} s",
            flush=True,
        )

    result = {
        "adapter": args.adapter.name,
        "compute_dtype": args.compute_dtype,
        "learning_rate": args.learning_rate,
        "max_grad_norm": args.max_grad_norm,
        "rank": model.peft_config["default"].r,
        "alpha": model.peft_config["default"].lora_alpha,
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)},
        "losses": losses,
        "grad_norms": grad_norms,
    }
    if args.name:
        runs = json.loads(args.output.read_text()) if args.output.exists() else {}
        result = {**runs, args.name: result}
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
