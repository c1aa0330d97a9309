"""`qlora-jax benchmark`: time the training step on this machine, or the 4-bit products on its GPU.

Without a GPU, `kernels` counts what the compiler makes of them.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_jax.choices import Kernel, Remat
from qlora_jax.cli import command, flag, parse_flags, spellings, subcommand
from qlora_jax.errors import UserError

if TYPE_CHECKING:
    from qlora_jax.gpus import Chip


@dataclasses.dataclass(frozen=True)
class StepFlags:
    """Flags of `benchmark step`."""

    workload: Literal["small", "smollm2", "all"] = flag(
        "all", "small: hidden 1024, 8 layers, 1 x 256 tokens; smollm2: SmolLM2-135M's shapes, 4 x 256 tokens."
    )
    dtype: Literal["float32", "bfloat16", "all"] = flag("all", "Compute dtype.")
    quant_type: Literal["nf4", "fp4", "int8", "none"] = flag("nf4", "Storage of the linear weights.")
    kernel: Kernel = flag("auto", "Implementation of the 4-bit ops.")
    lora_r: int = flag(16, "Rank of the adapters, on all linears.")
    remat: Remat = flag("none", "What the backward pass finds of a layer.")
    steps: int = flag(10, "Timed steps.")
    json: bool = flag(False, "Print one JSON object a line instead of a table.")


def time_steps(flags: StepFlags) -> None:
    """Print the times of the training step, a line for each workload and dtype."""
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
                remat=flags.remat,
                kernel=flags.kernel,
                steps=flags.steps,
            )
            low, median, high = min(timing.seconds), statistics.median(timing.seconds), max(timing.seconds)
            if flags.json:
                line = {"workload": workload, "dtype": dtype, "tokens_per_second": timing.tokens_per_second}
                print(json.dumps({**line, **dataclasses.asdict(timing)}), flush=True)
            else:
                print(
                    f"{workload:10} {dtype:9} {low:11.3f} {median:8.3f} {high:8.3f} "
                    f"{timing.tokens_per_second:9.0f} {timing.compile_seconds:9.1f}",
                    flush=True,
                )


@dataclasses.dataclass(frozen=True)
class KernelsFlags:
    """Flags of `benchmark kernels`."""

    static: bool = flag(False, "Count instructions even where there is a GPU to time.")
    chips: str = flag("all", "Static: GPUs to compile for, by commas; all: one of each architecture.")
    formats: str = flag("nf4", "Static: 4-bit types of the weight, by commas; all: all of them.")
    models: str = flag(
        "llama-7b,llama-13b,llama-3.1-8b,llama-2-70b",
        "Models whose linear layers are timed, by commas; 7b, 13b, 8b, 70b for short.",
    )
    rows: str = flag("1,4,16,64,256,1024,4096,16384", "M, rows of the activations, by commas.")
    implementations: str = flag("fused,unfused,xla,bf16", "What is timed, by commas; bf16: an unquantized product.")
    direction: Literal["forward", "backward", "both"] = flag("both", "x W^T, dy W, or both.")
    output_dir: str = flag("output/kernels", "Where kernels.json and, of timings, kernels.png go.")
    tuning: bool = flag(True, "Keep the timings where --kernel auto looks for them (QLORA_JAX_TUNING).")


_SHORT = {"7b": "llama-7b", "13b": "llama-13b", "8b": "llama-3.1-8b", "70b": "llama-2-70b"}


def time_kernels(flags: KernelsFlags, given: frozenset[str]) -> None:
    """Print the times of the 4-bit products, or their instructions.

    Raises:
        UserError: one of the flags `given` belongs to the other of the two.
    """
    import jax

    from qlora_jax.gpus import chip_like

    chip = chip_like(jax.devices()[0])
    counted = chip is None or flags.static
    for name in ("models", "rows", "implementations", "direction", "tuning") if counted else ("chips", "formats"):
        if name in given:
            mode = "is for timing, and without a GPU or with --static" if counted else "is for --static, and here"
            done = "instructions are counted" if counted else "kernels are timed"
            raise UserError(f"--{name} {mode} {done}; leave it out.")
    output = Path(flags.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if chip is None or flags.static:
        _static(flags, output)
    else:
        _timed(flags, chip, output)


def _listed(text: str, allowed: Sequence[str], name: str) -> list[str]:
    chosen = [item.strip() for item in text.split(",") if item.strip()]
    for item in chosen:
        if item not in allowed:
            raise UserError(f"--{name} has {item!r}; choose from {', '.join(allowed)}.")
    return chosen


def _static(flags: KernelsFlags, output: Path) -> None:
    from qlora_jax.gpus import CHIPS
    from qlora_jax.kernels import codegen_report
    from qlora_jax.training.benchmark import linear_layers

    chips = codegen_report.ARCHITECTURES if flags.chips == "all" else _listed(flags.chips, tuple(CHIPS), "chips")
    every = codegen_report.FOUR_BITS
    formats = every if flags.formats == "all" else _listed(flags.formats, every, "formats")
    print(
        "Static: counted in the machine code of kernels compiled for a GPU that need not be here. Nothing is timed.\n"
    )
    reports = []
    header = list(codegen_report.markdown(codegen_report.COLUMNS, []))
    print(*header, sep="\n")
    for of_chip in codegen_report.compile_reports(chips, formats):
        reports += of_chip
        table = codegen_report.markdown(codegen_report.COLUMNS, map(codegen_report.cells, of_chip))
        print(*list(table)[len(header) :], sep="\n", flush=True)
    print("\nPredicted, not measured: M from which on the roofline model dequantizes first, forward / backward.\n")
    print(*codegen_report.crossover_table(linear_layers(("llama-7b", "llama-2-70b"))), sep="\n")
    content = {"kind": "static", "kernels": [dataclasses.asdict(report) for report in reports]}
    (output / "kernels.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(f"\n{output / 'kernels.json'}")


def _timed(flags: KernelsFlags, chip: "Chip", output: Path) -> None:
    import jax

    from qlora_jax.commands.kernel_plot import plot_kernels
    from qlora_jax.kernels import benchmark, timings_cache
    from qlora_jax.models import PRESETS
    from qlora_jax.training.benchmark import linear_layers

    models = [_SHORT.get(name, name) for name in _listed(flags.models, (*PRESETS, *_SHORT), "models")]
    implementations = _listed(flags.implementations, benchmark.IMPLEMENTATIONS, "implementations")
    try:
        rows = [int(m) for m in flags.rows.split(",")]
    except ValueError:
        rows = [0]
    if min(rows) < 1:
        raise UserError(f"--rows {flags.rows} are not numbers of rows from 1 on, separated by commas.")
    directions = {"forward": [False], "backward": [True], "both": [False, True]}[flags.direction]
    print(f"{chip.title}, jax {jax.__version__}")
    print(f"{'layer':22} {'N':>6} {'K':>6} {'':6} {'M':>6}  {'kernel':11} {'us':>10} {'roofline':>9}")
    measured = []
    for one in benchmark.measure(
        chip, linear_layers(models), rows=rows, directions=directions, implementations=implementations
    ):
        measured.append(one)
        product = one.product
        time = f"{1e6 * one.seconds:10.1f} {one.percent:6.1f} % of {one.bound}"
        print(
            f"{one.layer:22} {product.n:6} {product.k:6} {'x W' if product.transposed else 'x W^T':6} {product.m:6}  "
            f"{one.implementation:11} {time if math.isfinite(one.seconds) else 'not enough memory'}",
            flush=True,
        )
    measured = [one for one in measured if math.isfinite(one.seconds)]
    if not measured:
        raise UserError("Nothing could be timed: the GPU's memory is too small for every product asked for.")
    content = {
        "kind": "timed",
        "gpu": chip.title,
        "jax": jax.__version__,
        "measurements": [one.to_json() for one in measured],
    }
    (output / "kernels.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    plot_kernels(measured, chip.title, output / "kernels.png")
    print(f"{output / 'kernels.json'} {output / 'kernels.png'}")
    if flags.tuning:
        file = timings_cache.save(chip.title, benchmark.tuned(measured))
        print(f"{file}: --kernel auto follows these timings from now on")


COMMANDS = {
    "step": "Time the training step on this machine.",
    "kernels": "Time the 4-bit products on this machine's GPU; without one, count their instructions.",
}


def main(argv: Sequence[str], *, prog: str = "qlora-jax benchmark") -> int:
    """Run the benchmark named first."""
    name = subcommand(argv, COMMANDS, prog=prog, description="Time this package on this machine.")
    if name is None:
        return 0
    rest, own, text = argv[1:], f"{prog} {name}", COMMANDS[name]
    if name == "step":
        step_flags, _ = parse_flags(StepFlags, rest, prog=own, description=text)
        with command(spellings(StepFlags)):
            time_steps(step_flags)
    else:
        kernel_flags, given = parse_flags(KernelsFlags, rest, prog=own, description=text)
        with command(spellings(KernelsFlags)):
            time_kernels(kernel_flags, given)
    return 0
