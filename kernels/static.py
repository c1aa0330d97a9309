"""What the compiler makes of every kernel on every architecture, on a machine that needs no GPU: counts, no times.

    python -m qlora_jax.kernels.static CHIP

is what `tables` runs in a child for each chip: one process assembles kernels for one architecture only, and a compiler
that aborts takes its process along.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS, Chip, chip_named, compile_for, sass
from qlora_jax.kernels.mosaic import dequantize, launch, streaming, tiles
from qlora_jax.kernels.mosaic.operands import Operands
from qlora_jax.quantization import QuantizedTensor, abstract_quantized

# One chip of each architecture.
ARCHITECTURES = ("a100", "a6000", "rtx4090", "h100", "b200", "rtx5090")
SHAPE = (4096, 4096)
# What is compiled: rows of x and whether by W; None for decoding a whole weight.
VARIANTS: tuple[tuple[int, bool] | None, ...] = ((1, False), (16, False), (16, True), (4096, False), (4096, True), None)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel on one architecture.

    Attributes:
        arch: such as "sm_86".
        chip: the GPU it was compiled for.
        kernel: "streaming", "mma", "dequantize": its module in `qlora_jax.kernels.mosaic`.
        m: rows of x; 0 for "dequantize".
        transposed: x @ W instead of x @ W^T.
        alu_per_weight: ALU instructions for each weight in the loop that decodes, counted per thread.
        registers: of a thread.
        spilled: bytes that a thread's registers spill, stores and loads.
        shared_bytes: shared memory of a CTA.
        serialized: whether ptxas says that it serialised wgmma.
        warnings: ptxas' numbered remarks.
        bytes_per_weight: codes and scales of a weight, read once, by the shapes of the kernel's operands.
    """

    arch: str
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
        """What it computes, for people."""
        if not self.m:
            return "decode W"
        return f"x @ W{'' if self.transposed else '^T'}, M={self.m}"


def decoding_loop(report: sass.KernelReport) -> sass.Loop:
    """The loop that decodes: the one with most byte permutes, the innermost if several have as many.

    Not always `main_loop`: a kernel may multiply and decode in different warps.
    """
    return max(report.loops, key=lambda loop: (loop.counts.opcodes.get("PRMT", 0), -loop.inner_loops))


def compile_variant(chip: Chip, variant: tuple[int, bool] | None, directory: Path) -> Row:
    """Compile one of `VARIANTS` for a chip, its dump in an empty directory, and count.

    Raises:
        UserError: the compiler or the disassembler is not installed, or compiled for another architecture before.
    """
    n, k = SHAPE
    weight = abstract_quantized(SHAPE, stack=(2,))
    threads = tiles.WARPGROUP
    operands = jax.eval_shape(lambda w: Operands.of(w, jnp.int32(1)).arrays, weight)

    def product(x: jax.Array, w: QuantizedTensor, layer: jax.Array) -> jax.Array:
        return launch.matmul(x, Operands.of(w, layer), transposed=variant is not None and variant[1], chip=chip)

    def decode(w: QuantizedTensor, layer: jax.Array) -> jax.Array:
        return launch.dequantize(Operands.of(w, layer), jnp.bfloat16)

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    with sass.dumped_kernels(directory):
        if variant is None:
            kernel, m, transposed = "dequantize", 0, False
            rows, columns = dequantize.tile_of(k)
            weights = rows * columns
            compile_for(chip, decode, weight, layer)
        else:
            m, transposed = variant
            plan = launch.plan(chip, m, SHAPE, transposed=transposed)
            kernel, weights = plan.kernel, streaming.BLOCK_N * streaming.BLOCK_K
            if plan.config is not None:
                weights = plan.config.block_n * plan.config.block_k
                # Warpgroups that decode a tile together; where they take turns, one decodes it alone.
                threads *= getattr(plan.config, "decoders", 1)
            x = jax.ShapeDtypeStruct((m, n if transposed else k), jnp.bfloat16)
            compile_for(chip, product, x, weight, layer)
    report = sass.kernel_report(directory)
    codes, absmax, nested, *_ = operands
    read = sum(buffer.size // buffer.shape[0] * buffer.dtype.itemsize for buffer in (codes, absmax, nested))
    return Row(
        arch=report.arch,
        chip=chip.name,
        kernel=kernel,
        m=m,
        transposed=transposed,
        alu_per_weight=decoding_loop(report).counts.alu_per_weight(threads=threads, weights=weights),
        registers=report.registers,
        spilled=report.spill_stores + report.spill_loads,
        shared_bytes=report.shared_bytes,
        serialized=report.serialized,
        warnings=report.warnings,
        bytes_per_weight=read / (n * k),
    )


def tables(chips: Sequence[str] = ARCHITECTURES) -> Iterator[list[Row]]:
    """Compile every kernel for each chip, one child process after another.

    Args:
        chips: names in `qlora_jax.gpus.CHIPS`.

    Raises:
        UserError: a chip is unknown, or a child failed; with what it said last.
    """
    for name in chips:
        chip_named(name)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "qlora_jax.kernels.static", name],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(f"Compiling the kernels for {name} failed: {last.removeprefix('error: ')}")
        rows = json.loads(done.stdout.rpartition("\n@")[2])
        yield [Row(**{**row, "warnings": tuple(row["warnings"])}) for row in rows]


def _main(name: str) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, variant in enumerate(VARIANTS):
            rows.append(dataclasses.asdict(compile_variant(CHIPS[name], variant, Path(scratch) / str(number))))
    print("\n@" + json.dumps(rows))


if __name__ == "__main__":
    try:
        _main(sys.argv[1])
    except UserError as error:
        sys.exit(f"error: {error}")
