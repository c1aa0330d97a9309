"""Time loading a checkpoint as NF4 with double quantisation: ours, and transformers and bitsandbytes on the same files.

    python tests/reference/benchmark_load.py --reference-python REF/bin/python [--model DIRECTORY] [--adopted PATH ...]

Without `--model` a random model of SmolLM2-360M's shapes is written to a temporary directory, in bfloat16. Ours also
loads what it converts the directory to, and each path of `--adopted` with its linears as they are stored. Every load is
in a process of its own; each round runs all of them in turn, after the files have been read once. REF is an environment
with torch, transformers and bitsandbytes; without the flag the variable REFERENCE_PYTHON names it. Imports do not count
on either side.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

COMMON = """
import json, resource, sys, time

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024

def times():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_stime

def measure(load):
    before, start = memory("VmRSS"), times()
    loaded = load()
    print(json.dumps([*(stop - begun for stop, begun in zip(times(), start)), memory("VmHWM") - before]))
"""
OURS = (
    COMMON
    + """
import jax, tensorstore
from qlora_jax import models
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.manifest import is_converted
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.quantization import MixedQuantization, QuantizationConfig

models.model_config(models.PRESETS["llama-7b"])  # imports transformers
jax.numpy.zeros(1).block_until_ready()
path, quantization = sys.argv[1], QuantizationConfig()
if sys.argv[2] == "adopt":
    quantization = MixedQuantization(quantization, open_source(path).config.stored)
measure(lambda: load_base(path, quantization=quantization, dtype="bfloat16"))
"""
)
THEIRS = (
    COMMON
    + """
import bitsandbytes, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

torch.zeros(1)
four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
measure(
    lambda: AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.bfloat16, quantization_config=four_bit, device_map={"": "cpu"}
    )
)
"""
)


class Load(NamedTuple):
    """Seconds by the clock, of the processor and of those in the system; bytes at most above those before."""

    wall: float
    cpu: float
    system: float
    memory: int


def load(python: str, program: str, *arguments: str) -> Load:
    """Load in a process of its own."""
    return Load(*alone(python, program, *arguments, ours=program == OURS))


def alone(python: str, program: str, *arguments: str, ours: bool) -> Any:
    """Run a program in a process of its own, `ours` with this checkout; return the JSON that it prints last."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if ours:
        environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # -P: transformers would take our directory kernels for a package of that name.
    done = subprocess.run([python, "-P", "-c", program, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{python} failed with {arguments[0]}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def nbytes(path: Path) -> int:
    """Read a file, or the files below a directory, so that they are in memory; return their bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    total = 0
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total += len(block)
    return total


def write_random(directory: Path) -> None:
    """Write the random model."""
    from fixtures.checkpoint_helpers import write_large_hf

    from qlora_jax.models import PRESETS

    sizes = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "head_dim": 64}
    heads = {"num_attention_heads": 15, "num_key_value_heads": 5}
    config = {**PRESETS["smollm2-135m"], **sizes, **heads, "torch_dtype": "bfloat16"}
    write_large_hf(directory, config, shards=1)


def converted(model: Path, directory: Path) -> None:
    """Convert the model."""
    from qlora_jax.checkpoints.conversion import convert
    from qlora_jax.quantization import QuantizationConfig

    convert(model, directory, QuantizationConfig(), "bfloat16")


def main() -> None:
    """Run all in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", default=os.environ.get("REFERENCE_PYTHON"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adopted", type=Path, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not args.reference_python:
        sys.exit("Name a Python with transformers and bitsandbytes: --reference-python or REFERENCE_PYTHON.")
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "random"
        if args.model is None:
            write_random(model)
        converted(model, Path(scratch) / "converted")
        runs = {
            "transformers + bitsandbytes": (args.reference_python, THEIRS, str(model)),
            "qlora-jax": (sys.executable, OURS, str(model), "quantise"),
            "qlora-jax, converted": (sys.executable, OURS, f"{scratch}/converted", "as converted"),
            **{f"qlora-jax, {p.name} as stored": (sys.executable, OURS, str(p), "adopt") for p in args.adopted},
        }
        sizes = {name: nbytes(Path(run[2])) for name, run in runs.items()}
        loads: dict[str, list[Load]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                loads[name].append(load(*run))
    reference, ours = ([one.wall for one in loads[name]] for name in list(runs)[:2])
    ratios = [theirs / own for theirs, own in zip(reference, ours, strict=True)]
    print("| | read, GB | s: min | median | max | processor s, median | in the system | GB/s, median | memory, GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, found in loads.items():
        wall = sorted(one.wall for one in found)
        middle, size = statistics.median(wall), sizes[name] / 1e9
        processor = [statistics.median(times) for times in ([one.cpu for one in found], [one.system for one in found])]
        figures = [wall[0], middle, wall[-1], *processor, size / middle]
        peak = max(one.memory for one in found) / 2**30
        print(f"| {name} | {size:.2f} | {' | '.join(f'{figure:.2f}' for figure in figures)} | {peak:.2f} |")
    low, high = min(ratios), max(ratios)
    print(f"\nratio in a round: {low:.1f} to {high:.1f}, median {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
