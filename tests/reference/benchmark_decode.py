"""Time a step of decoding, one token for every row: ours, and transformers and bitsandbytes on the same weights.

    python tests/reference/benchmark_decode.py --reference-python REF/bin/python [--model DIRECTORY] [--rounds 3]

Without `--model` a random model of SmolLM2-135M's shapes is written to a temporary directory. Linear weights are NF4
with double quantisation on both sides. Each measurement is in a process of its own, which is warmed up before; rounds
run all of them in turn. A prompt has 32 tokens and an answer 64, of which the first is not counted. REF is an
environment with torch, transformers and bitsandbytes; without the flag the variable REFERENCE_PYTHON names it.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmark_load import alone  # which makes the checkout's modules found

PROMPT, ANSWER = 32, 64
OURS = """
import json, sys, time
import numpy as np
from qlora_jax.generation import Engine, EngineOptions, Request, Sampling
from qlora_jax import models
from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.quantization import QuantizationConfig

path, rows, dtype, prompt, answer = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
config, storage = resolve_config(path), QuantizationConfig()
graphdef, lora, frozen = models.split_model(models.abstract_model(config, QLoRAConfig(storage, dtype)))
frozen = models.fill_base(frozen, load_base(path, quantization=storage, dtype=dtype).tensors)
engine = Engine(graphdef, lora, frozen, EngineOptions(rows, prompt + answer + 1), eos_ids=[], patient=True)

def measure(seed):
    for row in range(rows):
        tokens = np.random.default_rng(seed + row).integers(0, config.vocab_size, prompt)
        engine.submit(Request(tuple(map(int, tokens)), Sampling(max_new_tokens=answer)))
    engine.step()
    start = time.perf_counter()
    while engine.busy:
        engine.step()
    return (time.perf_counter() - start) / (answer - 1)

measure(0)
print(json.dumps(measure(rows)))
"""
THEIRS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

path, rows, dtype, prompt, answer = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
dtype = getattr(torch, dtype)
four_bit = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=four_bit, device_map={"": "cpu"})
model.generation_config.eos_token_id = None

def run(new):
    ids = torch.randint(0, model.config.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    with torch.inference_mode():
        limits = {"max_new_tokens": new, "min_new_tokens": new}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
    return time.perf_counter() - start

run(8)
print(json.dumps((run(answer) - run(1)) / (answer - 1)))
"""


def write_random(directory: Path) -> None:
    """Write the random model."""
    from fixtures.checkpoint_helpers import write_large_hf

    from qlora_jax.models import PRESETS

    write_large_hf(directory, {**PRESETS["smollm2-135m"], "head_dim": 64, "torch_dtype": "bfloat16"}, shards=1)


def main() -> None:
    """Run all in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", default=os.environ.get("REFERENCE_PYTHON"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not args.reference_python:
        sys.exit("Name a Python with transformers and bitsandbytes: --reference-python or REFERENCE_PYTHON.")
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "random"
        if args.model is None:
            write_random(model)
        found: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
        for _ in range(args.rounds):
            for dtype in args.dtypes:
                for rows in args.rows:
                    numbers = [str(model), str(rows), dtype, str(PROMPT), str(ANSWER)]
                    ours, theirs = found.setdefault((dtype, rows), ([], []))
                    theirs.append(alone(args.reference_python, THEIRS, *numbers, ours=False))
                    ours.append(alone(sys.executable, OURS, *numbers, ours=True))
    print("| compute | rows | transformers + bitsandbytes, ms a step | qlora-jax | ratio in a round | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (dtype, rows), (ours, theirs) in found.items():
        ratios = [other / own for other, own in zip(theirs, ours, strict=True)]
        middle = statistics.median(ours)
        print(
            f"| {dtype} | {rows} | {1e3 * statistics.median(theirs):.0f} | {1e3 * middle:.0f} | "
            f"{min(ratios):.2f} to {max(ratios):.2f} | {rows / middle:.0f} |"
        )


if __name__ == "__main__":
    main()
