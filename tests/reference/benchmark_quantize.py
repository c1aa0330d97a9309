"""Time NF4 quantisation of one 4096x11008 bfloat16 weight on the CPU: ours and bitsandbytes', in turns.

    python tests/reference/benchmark_quantize.py --reference-python REF/bin/python

REF is an environment with torch and bitsandbytes; without the flag the variable REFERENCE_PYTHON names it.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

import numpy as np

SHAPE = (4096, 11008)
REPEATS = 5

REFERENCE = f"""
import os, time
import torch, bitsandbytes.functional as bnb
torch.set_num_threads(os.cpu_count())
weight = (torch.randn{SHAPE} * 0.02).to(torch.bfloat16)
for _ in range({REPEATS}):
    start = time.perf_counter()
    bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    print(time.perf_counter() - start)
"""


def reference_seconds(python: str) -> list[float]:
    """Return the seconds of each call in bitsandbytes."""
    done = subprocess.run([python, "-c", REFERENCE], capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def our_seconds() -> list[float]:
    """Return the seconds of each call of ours, the first with its compilation."""
    import jax.numpy as jnp

    from qlora_jax.quantization import quantize

    # Row by row, so that making the weight leaves no higher peak of memory behind than the weight itself.
    random, weight = np.random.default_rng(0), np.empty(SHAPE, jnp.bfloat16)
    for row in weight:
        row[:] = random.standard_normal(SHAPE[1], np.float32) * np.float32(0.02)
    quantize(np.zeros((1, 1), np.float32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        q = quantize(weight)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sizes = f"the result takes {q.nbytes / 1e6:.0f} MB, the weight {weight.nbytes / 1e6:.0f} MB"
    print(f"peak memory grew by {peak * 1024e-6:.0f} MB, compiled code included; {sizes}")
    return seconds


def main() -> None:
    """Run both twice, alternating, and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", default=os.environ.get("REFERENCE_PYTHON"))
    args = parser.parse_args()
    if not args.reference_python:
        sys.exit("Name a Python with bitsandbytes: --reference-python or REFERENCE_PYTHON.")
    for _ in range(2):
        for name, seconds in (("bitsandbytes", reference_seconds(args.reference_python)), ("qlora-jax", our_seconds())):
            first, *later = seconds
            print(f"{name:13s} first call {first:.3f} s, then {min(later):.3f} to {max(later):.3f} s")


if __name__ == "__main__":
    main()
