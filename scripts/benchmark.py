"""Benchmarks: `step` times the training step on this machine."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal

import numpy as np

from qlora_jax.cli import flag, parse_flags, run
from qlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StepFlags:
    """Flags of `benchmark.py step`."""

    workload: Literal["small", "smollm2", "all"] = flag(
        "all", "small: hidden 1024, 8 layers, 1 x 256 tokens; smollm2: SmolLM2-135M's shapes, 4 x 256 tokens."
    )
    dtype: Literal["float32", "bfloat16", "all"] = flag("all", "Compute dtype.")
    quant_type: Literal["nf4", "fp4", "int8", "none"] = flag("nf4", "Storage of the linear weights.")
    kernel: str = flag("auto", "Implementation of the 4-bit ops.")
    lora_r: int = flag(16, "Rank of the adapters, on all linears.")
    gradient_checkpointing: bool = flag(False, "Recompute each layer in the backward pass.")
    steps: int = flag(10, "Timed steps.")
    json: bool = flag(False, "Print one JSON object a line instead of a table.")


def step(argv: Sequence[str]) -> int:
    """Time the training step."""
    flags, _ = parse_flags(StepFlags, argv, prog="benchmark.py step", description="Time the training step.")
    import jax

    from qlora_jax.quantization import QuantizationConfig
    from qlora_jax.training.benchmark import WORKLOADS, time_step

    if not flags.json:
        device = jax.devices()[0]
        print(f"{device.device_kind}, {jax.device_count()} device(s), jax {jax.__version__}")
        print(
            f"{'workload':10} {'dtype':9} {'s/step: min':>11} {'median':>8} {'max':>8} {'tokens/s':>9} {'compile s':>9}"
        )
    for workload in WORKLOADS if flags.workload == "all" else [flags.workload]:
        for dtype in ("float32", "bfloat16") if flags.dtype == "all" else [flags.dtype]:
            timing = time_step(
                WORKLOADS[workload],
                quantization=QuantizationConfig(flags.quant_type),
                dtype=dtype,
                rank=flags.lora_r,
                remat=flags.gradient_checkpointing,
                kernel=flags.kernel,
                steps=flags.steps,
            )
            low, median, high = np.min(timing.seconds), np.median(timing.seconds), np.max(timing.seconds)
            if flags.json:
                line = {"workload": workload, "dtype": dtype, "tokens_per_second": timing.tokens_per_second}
                print(json.dumps({**line, **dataclasses.asdict(timing)}), flush=True)
            else:
                print(
                    f"{workload:10} {dtype:9} {low:11.3f} {median:8.3f} {high:8.3f} "
                    f"{timing.tokens_per_second:9.0f} {timing.compile_seconds:9.1f}",
                    flush=True,
                )
    return 0


BENCHMARKS = {"step": step}


def main(argv: Sequence[str]) -> int:
    """Run the benchmark named first."""
    if not argv or argv[0] not in BENCHMARKS:
        raise UserError(f"benchmark.py needs one of: {', '.join(BENCHMARKS)}; for its flags, benchmark.py step --help.")
    return BENCHMARKS[argv[0]](argv[1:])


if __name__ == "__main__":
    run(main)
