"""Time our training step and the reference stack's in turn, on the same machine in the same run (project environment).

    python compare_step.py --reference-python ref/bin/python --smollm2 smollm2-hf-f32 [--rounds 1]

Every round runs ours, then the reference's, workload by workload; the best median of each dtype over the rounds counts,
for both, and for the reference also the best of its attention implementations. `--smollm2` is the Hugging Face
directory that make_smollm2_golden.py exports; ours has the same shapes with random values.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WORKLOADS = ("small", "smollm2")


def lines(command: list[str]) -> list[dict]:
    """Run a benchmark and return the JSON objects it prints."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Run both and print a table of tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference-python", required=True)
    parser.add_argument("--smollm2", required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()

    best: dict[tuple[str, str, str], float] = {}

    def keep(workload: str, side: str, dtype: str, rate: float) -> None:
        print(f"# {workload} {side} {dtype} {rate:.0f} tokens/s", file=sys.stderr, flush=True)
        key = (workload, side, dtype)
        best[key] = max(best.get(key, 0.0), rate)

    ours = [sys.executable, str(HERE.parent.parent / "scripts" / "benchmark.py"), "step", "--json"]
    theirs = [args.reference_python, str(HERE / "benchmark_step.py"), "--checkpointing", "off", "--dtypes", "fp32"]
    theirs += ["bf16", "bf16-autocast", "--steps", str(args.steps)]
    for _ in range(args.rounds):
        for workload in WORKLOADS:
            for line in lines([*ours, "--workload", workload, "--steps", str(args.steps)]):
                keep(workload, "ours", line["dtype"], line["tokens_per_second"])
            model = ["--config", "small"] if workload == "small" else ["--model", args.smollm2]
            for line in lines([*theirs, *model]):
                dtype = "float32" if line["dtype"] == "fp32" else "bfloat16"
                keep(workload, "reference", dtype, line["tokens_per_second_median"])
    print(f"{'workload':10} {'dtype':9} {'ours tok/s':>11} {'reference tok/s':>16} {'ratio':>6}")
    for workload in WORKLOADS:
        for dtype in ("float32", "bfloat16"):
            mine, other = best[workload, "ours", dtype], best[workload, "reference", dtype]
            print(f"{workload:10} {dtype:9} {mine:11.0f} {other:16.0f} {mine / other:6.2f}")


if __name__ == "__main__":
    main()
