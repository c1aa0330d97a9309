"""Counts in the machine code of every kernel on every architecture, on a machine that needs no GPU: no times.

    python -m qlora_jax.kernels.codegen_report CHIP FORMAT...

is the child process that `compile_reports` starts for each chip: a process assembles kernels for one architecture only,
and a compiler that aborts ends its process.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS, Chip, chip_named, compile_for, sass
from qlora_jax.kernels import roofline
from qlora_jax.kernels.mosaic import dequantize, dispatch, tiles
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight
from qlora_jax.kernels.product import Product
from qlora_jax.quantization import FORMATS, QuantizedTensor, abstract_quantized

# One chip of each architecture.
ARCHITECTURES = ("a100", "a6000", "rtx4090", "h100", "b200", "rtx5090")
SHAPE = (4096, 4096)
# None: dequantizing a whole weight.
VARIANTS: tuple[Product | None, ...] = (
    *(
        Product(m, *SHAPE, transposed)
        for m, transposed in ((1, False), (16, False), (16, True), (4096, False), (4096, True))
    ),
    None,
)
FEW_VARIANTS = (VARIANTS[0], VARIANTS[3], None)
"""For all formats but NF4, whose kernels differ in their tables and scales only."""
FOUR_BITS = tuple(name for name, kind in FORMATS.items() if kind.bits == 4)


@dataclasses.dataclass(frozen=True)
class CodegenReport:
    """Counts of one kernel on one architecture.

    Attributes:
        arch: such as "sm_86".
        quant_type: of the weight.
        chip: the GPU it was compiled for.
        kernel: "small_m", "mma", "dequantize": its module in `qlora_jax.kernels.mosaic`.
        m: rows of x; 0 for "dequantize".
        transposed: x @ W instead of x @ W^T.
        alu_per_weight: ALU instructions for each weight in the loop that dequantizes, counted per thread.
        registers: of a thread.
        spilled: bytes that a thread's registers spill, stores and loads.
        shared_bytes: shared memory of a CTA.
        serialized: ptxas says that it serialized wgmma.
        warnings: ptxas' numbered remarks.
        bytes_per_weight: codes and scales of a weight, read once, by the shapes of the kernel's operands.
    """

    arch: str
    quant_type: str
    chip: str
    kernel: str
    m: int
    transposed: bool
    alu_per_weight: float
    registers: int
    spilled: int
    shared_bytes: int
    serialized: bool
    warnings: tuple[str, ...]
    bytes_per_weight: float

    @property
    def operation(self) -> str:
        """The computation, for people."""
        if not self.m:
            return "dequantize W"
        return f"x @ W{'' if self.transposed else '^T'}, M={self.m}"


def dequantizing_loop(report: sass.KernelReport) -> sass.Loop:
    """Return the loop with most byte permutes, the innermost if several have as many.

    Not always `main_loop`: a kernel may multiply and dequantize in different warps.
    """
    return max(report.loops, key=lambda loop: (loop.counts.opcodes.get("PRMT", 0), -loop.inner_loops))


def compile_variant(chip: Chip, quant_type: str, variant: Product | None, directory: Path) -> CodegenReport:
    """Compile one of `VARIANTS` of a format for a chip, its dump in an empty directory, and count.

    Raises:
        UserError: the compiler or the disassembler is not installed, or compiled for another architecture before.
    """
    n, k = SHAPE
    weight = abstract_quantized(SHAPE, quant_type=quant_type, stack=(2,))
    threads = tiles.WARPGROUP
    operands = jax.eval_shape(lambda w: PackedWeight.of(w, jnp.int32(1)).arrays, weight)

    def matmul(x: jax.Array, w: QuantizedTensor, layer: jax.Array, transposed: bool) -> jax.Array:
        return dispatch.matmul(x, PackedWeight.of(w, layer), transposed=transposed, chip=chip)

    def dequantized(w: QuantizedTensor, layer: jax.Array) -> jax.Array:
        return dispatch.dequantize(PackedWeight.of(w, layer), jnp.bfloat16)

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    with sass.dumped_kernels(directory):
        if variant is None:
            kernel = "dequantize"
            rows, columns = dequantize.tile_of(k)
            weights = rows * columns
            compile_for(chip, dequantized, weight, layer)
        else:
            choice = dispatch.select_kernel(chip, variant)
            kernel, weights = choice.name, choice.config.block_n * choice.config.block_k
            threads *= choice.config.dequantizers
            x = jax.ShapeDtypeStruct((variant.m, variant.contracted), jnp.bfloat16)
            compile_for(chip, functools.partial(matmul, transposed=variant.transposed), x, weight, layer)
    report = sass.kernel_report(directory)
    # Of one layer, without tables of scales, which are the same for all codes.
    read = sum(a.size // 2 * a.dtype.itemsize for a in operands if len(a.shape) > 1 and a.shape[-1] != 256)
    return CodegenReport(
        arch=report.arch,
        quant_type=quant_type,
        chip=chip.name,
        kernel=kernel,
        m=variant.m if variant else 0,
        transposed=variant is not None and variant.transposed,
        alu_per_weight=dequantizing_loop(report).counts.alu_per_weight(threads=threads, weights=weights),
        registers=report.registers,
        spilled=report.spill_stores + report.spill_loads,
        shared_bytes=report.shared_bytes,
        serialized=report.serialized,
        warnings=report.warnings,
        bytes_per_weight=read / (n * k),
    )


def compile_reports(
    chips: Sequence[str] = ARCHITECTURES, formats: Sequence[str] = ("nf4",)
) -> Iterator[list[CodegenReport]]:
    """Compile every kernel for each chip, one child process after another.

    Args:
        chips: names in `qlora_jax.gpus.CHIPS`.
        formats: 4-bit types of the weight; of others than "nf4" `FEW_VARIANTS`.

    Raises:
        UserError: a chip is unknown, or a child failed; with the last line of its errors.
    """
    for name in chips:
        chip_named(name)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "qlora_jax.kernels.codegen_report", name, *formats],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(f"Compiling the kernels for {name} failed: {last.removeprefix('error: ')}")
        rows = json.loads(done.stdout.rpartition("\n@")[2])
        yield [CodegenReport(**{**row, "warnings": tuple(row["warnings"])}) for row in rows]


COLUMNS = (
    "arch",
    "format",
    "kernel",
    "computes",
    "ALU/weight",
    "registers",
    "spilled",
    "shared",
    "serialized",
    "B/weight",
)
CROSSOVER_CHIPS = ("a6000", "rtx4090", "a100", "h100", "b200")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a table that both people and Markdown can read."""
    for row in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(map(str, row))} |"


def cells(report: CodegenReport) -> tuple[str, ...]:
    """Format a report as a row under `COLUMNS`; shared memory in KiB."""
    return (
        report.arch,
        report.quant_type,
        report.kernel,
        report.operation,
        f"{report.alu_per_weight:.2f}",
        str(report.registers),
        str(report.spilled),
        f"{report.shared_bytes / 1024:.0f} KiB",
        "yes" if report.serialized else "no",
        f"{report.bytes_per_weight:.3f}",
    )


def crossover_table(layers: Mapping[tuple[int, int], str]) -> Iterator[str]:
    """Tabulate the M from which on the roofline model dequantizes first, forward / backward; a dash if it never does.

    Args:
        layers: (N, K) -> name of a layer with such a weight.
    """

    def cell(name: str, n: int, k: int) -> str:
        both = (roofline.crossover(CHIPS[name], n, k, transposed=transposed) for transposed in (False, True))
        return " / ".join("-" if m is None else str(m) for m in both)

    rows = [(layer, f"{n} x {k}", *(cell(name, n, k) for name in CROSSOVER_CHIPS)) for (n, k), layer in layers.items()]
    yield from markdown(("layer", "N x K", *CROSSOVER_CHIPS), rows)


def _main(name: str, formats: Sequence[str]) -> None:
    rows: list[dict[str, Any]] = []
    wanted = [(each, v) for each in formats for v in (VARIANTS if each == "nf4" else FEW_VARIANTS)]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (quant_type, variant) in enumerate(wanted):
            report = compile_variant(CHIPS[name], quant_type, variant, Path(scratch) / str(number))
            rows.append(dataclasses.asdict(report))
    sys.stdout.write("\n@" + json.dumps(rows))


if __name__ == "__main__":
    try:
        _main(sys.argv[1], sys.argv[2:])
    except UserError as error:
        sys.exit(f"error: {error}")
