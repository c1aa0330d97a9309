"""Time one QLoRA training step of transformers + PEFT + bitsandbytes on the CPU; prints one JSON line a combination.

    python benchmark_step.py --config small                     # hidden 1024, 8 layers, ffn 2816, vocab 32000, 1 x 256
    python benchmark_step.py --model smollm2-hf-f32             # SmolLM2, 4 x 256

A step is forward, backward, clipping, AdamW over rank-16 adapters on every linear but the head; base NF4 with double
quantisation. Combinations: `--dtypes`, `--checkpointing`, `--attention`, `--optimizers`; by default nearly all, so that
the best line is the stack's best. Tokens are batch x length: rows are full and every token is trained.
"""

import argparse
import gc
import itertools
import json
import resource
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_small(directory: str) -> None:
    """Save the benchmark's random model, so that it is loaded and quantised as any other."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def load(model_dir: str, mode: str, checkpointing: bool, attention: str, rank: int) -> torch.nn.Module:
    """Load, quantise, add adapters.

    `mode`: fp32; bf16-autocast (float32 adapters, norms and residuals under autocast); bf16 (all but the norms is
    bfloat16 in storage and compute, as the reference program has it; PEFT keeps the adapters float32).
    """
    dtype = torch.float32 if mode == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.bfloat16 if mode == "bf16" else torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        device_map={"": "cpu"},
        attn_implementation=attention,
    )
    model.config.use_cache = False
    model.requires_grad_(False)
    if mode == "bf16-autocast":
        model.get_input_embeddings().to(dtype)
        model.get_output_embeddings().to(dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    return model.train()


def measure(model: torch.nn.Module, args: argparse.Namespace, mode: str, fused: bool) -> list[float]:
    """Seconds of each timed step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0, fused=fused)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.length), generator=generator)
    seconds = []
    for step in range(args.warmup + args.steps):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if mode == "bf16-autocast" else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        loss.item()
        if step >= args.warmup:
            seconds.append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    """Run every combination."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", choices=["small"])
    source.add_argument("--model")
    parser.add_argument("--batch", type=int, help="default: 1 for small, 4 for a model directory")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's own choice")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16-autocast", "bf16"])
    parser.add_argument("--checkpointing", nargs="+", choices=["on", "off"], default=["off", "on"])
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"])
    parser.add_argument("--optimizers", nargs="+", choices=["plain", "fused"], default=["fused"])
    args = parser.parse_args()
    args.batch = args.batch or (1 if args.config else 4)
    if args.threads:
        torch.set_num_threads(args.threads)

    with tempfile.TemporaryDirectory() as directory:
        if args.config:
            make_small(directory)
        combinations = itertools.product(args.dtypes, args.checkpointing, args.attention, args.optimizers)
        for mode, checkpointing, attention, optimizer in combinations:
            torch.manual_seed(0)
            model = load(args.model or directory, mode, checkpointing == "on", attention, args.rank)
            seconds = measure(model, args, mode, optimizer == "fused")
            median = statistics.median(seconds)
            line = {
                "model": args.config or Path(args.model).name,
                "batch": args.batch,
                "length": args.length,
                "rank": args.rank,
                "dtype": mode,
                "checkpointing": checkpointing,
                "attention": attention,
                "optimizer": optimizer,
                "threads": torch.get_num_threads(),
                "steps": args.steps,
                "seconds_min": round(min(seconds), 4),
                "seconds_median": round(median, 4),
                "tokens_per_second_median": round(args.batch * args.length / median, 1),
                "tokens_per_second_best": round(args.batch * args.length / min(seconds), 1),
                "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
            print(json.dumps(line), flush=True)
            del model
            gc.collect()


if __name__ == "__main__":
    main()
