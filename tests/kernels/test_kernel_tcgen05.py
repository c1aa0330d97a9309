"""The kernel for data-center Blackwell: in Pallas' interpret mode, and its registers as compiled for a B200."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from fixtures import compile_in_child
from fixtures.mosaic_helpers import check

from qlora_jax.gpus import CHIPS, compile_for
from qlora_jax.gpus.sass import dumped_kernels, kernel_report
from qlora_jax.kernels.codegen_report import dequantizing_loop
from qlora_jax.kernels.mosaic import tcgen05
from qlora_jax.kernels.mosaic.packed_weight import PackedWeight
from qlora_jax.quantization import abstract_quantized, quantize

ODD = {"block_n": 64, "block_k": 128, "stages": 2, "dequantizers": 1}  # for K an odd multiple of 64, transposed


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((264, 264, 192), {}),  # edges in M and N
        ((264, 136, 256), {"transposed": True}),  # in M and in the contraction
        ((128, 264, 192), {"transposed": True, "block_m": 128, **ODD}),
        ((128, 256, 64), {"block_m": 128}),  # one step
    ],
)
def test_product(shape, options):
    check(tcgen05, shape, **options)


def test_other_weights():
    kind = {"quant_type": "fp4", "dtype": jnp.float16, "block_size": 32}
    check(tcgen05, (136, 136, 320), block_m=128, block_n=128, dequantizers=1, **kind)
    kind = {"block_size": 256, "double_quant": False}  # blocks that straddle rows
    check(tcgen05, (128, 128, 192), transposed=True, block_m=128, **ODD, **kind)


@pytest.mark.parametrize("transposed", [False, True])
def test_no_races(transposed):
    # Whole tiles: output tiles that overlap are written twice, to the same bits, which counts as a race. More stages
    # than dequantized tiles: with as many, waiting for the copies would do for waiting for the products too.
    shape = (128, 320, 256) if transposed else (128, 256, 320)
    check(tcgen05, shape, transposed=transposed, races=True, block_m=128)


def test_refuses_what_it_cannot_tile():
    for shape, m, message in [
        ((132, 128), 256, "multiples of 8"),
        ((256, 128), 260, "multiples of 8"),
        ((256, 128), 128, "less than a tile"),
        ((128, 128), 256, "less than a tile"),
        ((256, 96), 256, "whole tiles"),
    ]:
        w = PackedWeight.of(quantize(jnp.ones(shape)))
        with pytest.raises(ValueError, match=message):
            tcgen05.matmul(jnp.ones((m, shape[1]), jnp.bfloat16), w, config=tcgen05.Config())
    too_narrow = {"block_m": 128, "block_n": 64, "block_k": 256}
    for wrong in ({"block_m": 64}, {"block_n": 96}, {"stages": 1}, {"block_n": 64}, {"block_m": 512}, too_narrow):
        with pytest.raises(ValueError, match="not a possible tiling"):
            tcgen05.Config(**wrong)


def compile_and_report(shapes):
    """Registers, spills and ALU instructions of kernels compiled for a B200; runs in a child."""
    reports = []
    for (m, n, k), transposed, options in shapes:
        config = tcgen05.Config(**options)

        def product(x, w, config=config, transposed=transposed):
            packed = PackedWeight.of(w)
            x = tcgen05.pad_activations(x, packed, config, transposed=transposed)
            return tcgen05.matmul(x, packed, config=config, transposed=transposed)

        x = jax.ShapeDtypeStruct((m, n if transposed else k), jnp.bfloat16)
        with tempfile.TemporaryDirectory() as directory:
            with dumped_kernels(Path(directory)):
                compile_for(CHIPS["b200"], product, x, abstract_quantized((n, k)))
            report = kernel_report(Path(directory))
        loop = dequantizing_loop(report)
        threads, weights = 128 * config.dequantizers, config.block_n * config.block_k
        reports.append(
            {
                "registers": report.registers,
                "spills": report.spill_stores + report.spill_loads,
                "alu_per_weight": loop.counts.alu_per_weight(threads=threads, weights=weights),
            }
        )
    return reports


@pytest.mark.compile
def test_registers_on_a_b200():
    """Tiles that `codegen_report` does not compile; test_kernel_ptx executes them."""
    shapes = [
        ((136, 264, 192), False, {"block_m": 128}),
        ((136, 200, 256), True, {"block_m": 128}),
        ((256, 136, 192), True, ODD),
    ]
    for report in compile_in_child.call("test_kernel_tcgen05:compile_and_report", shapes):
        # 168 registers are what each of three warpgroups' threads can have.
        assert report["registers"] <= 168 and report["spills"] == 0 and report["alu_per_weight"] <= 3.7
