"""The kernel for data-center Blackwell: in Pallas' interpret mode with `reference`, and as compiled for a B200.

Interpret mode tells of roles, barriers, tiles and edges; the compiled program, executed on the CPU, of all the rest but
time.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import compile_in_child
from fixtures.mosaic_helpers import array, check
from ptx_simulator import mosaic_args

from qlora_jax.gpus import CHIPS, compile_for
from qlora_jax.gpus.sass import dumped_kernels, kernel_report
from qlora_jax.kernels.mosaic import tcgen05
from qlora_jax.kernels.mosaic.operands import Operands, pad_contraction
from qlora_jax.quantization import dequantize, quantize

ODD = {"block_n": 64, "block_k": 128, "stages": 2, "decoders": 1}  # for K an odd multiple of 64, transposed


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
    check(tcgen05, (136, 136, 320), block_m=128, block_n=128, decoders=1, **kind)
    kind = {"block_size": 256, "double_quant": False}  # blocks that straddle rows
    check(tcgen05, (128, 128, 192), transposed=True, block_m=128, **ODD, **kind)


@pytest.mark.parametrize("transposed", [False, True])
def test_no_races(transposed):
    # Whole tiles: output tiles that overlap are written twice, to the same bits, which counts as a race. More stages
    # than decoded tiles: with as many, waiting for the copies would do for waiting for the products too.
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
        w = Operands.of(quantize(jnp.ones(shape)))
        with pytest.raises(ValueError, match=message):
            tcgen05.matmul(jnp.ones((m, shape[1]), jnp.bfloat16), w, config=tcgen05.Config())
    too_narrow = {"block_m": 128, "block_n": 64, "block_k": 256}
    for wrong in ({"block_m": 64}, {"block_n": 96}, {"stages": 1}, {"block_n": 64}, {"block_m": 512}, too_narrow):
        with pytest.raises(ValueError, match="not a possible tiling"):
            tcgen05.Config(**wrong)


def problem(shape, transposed, config):
    """x, the second of two stacked weights, and their product in float64."""
    m, n, k = shape
    layers = [quantize(array(n, k, seed=seed)) for seed in (1, 2)]
    w = Operands.of(jax.tree.map(lambda *buffers: jnp.stack(buffers), *layers), 1)
    x = array(m, n if transposed else k, dtype=jnp.bfloat16)
    decoded = np.asarray(dequantize(layers[1], jnp.bfloat16), np.float64)
    expected = np.float64(x) @ (decoded if transposed else decoded.T)
    return pad_contraction(x, n, config.block_k) if transposed else x, w, expected


def compile_and_report(directory, shape, transposed, options):
    """Leave the compiled kernel in `directory`; return its report; runs in a child."""
    config = tcgen05.Config(**options)
    x, w, _ = problem(shape, transposed, config)

    def f(x, codes, scales, layer):
        operands = Operands(codes, scales, layer, w.quant_type, w.block_size, w.n_rows)
        return tcgen05.matmul(x, operands, config=config, transposed=transposed)

    arrays = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), (x, w.codes, w.scales, w.layer))
    with dumped_kernels(Path(directory)):
        compile_for(CHIPS["b200"], f, *arrays)
    report = kernel_report(Path(directory))
    decoding = max(report.loops, key=lambda loop: loop.counts.opcodes.get("PRMT", 0))
    threads, weights = 128 * config.decoders, config.block_n * config.block_k
    return {
        "registers": report.registers,
        "spills": report.spill_stores + report.spill_loads,
        "alu_per_weight": decoding.counts.alu_per_weight(threads=threads, weights=weights),
    }


@pytest.mark.compile
@pytest.mark.parametrize(
    ("shape", "transposed", "options"),
    [
        ((136, 264, 192), False, {"block_m": 128}),
        ((136, 200, 256), True, {"block_m": 128}),
        ((256, 136, 192), True, ODD),
    ],
)
def test_compiled_for_a_b200(shape, transposed, options, tmp_path):
    report = compile_in_child.call("test_kernel_tcgen05:compile_and_report", str(tmp_path), shape, transposed, options)
    # 168 registers are what each of three warpgroups' threads can have.
    assert report["registers"] <= 168 and report["spills"] == 0 and report["alu_per_weight"] <= 3.7

    x, w, expected = problem(shape, transposed, tcgen05.Config(**options))
    y = np.zeros(expected.shape, jnp.bfloat16)
    mosaic_args(tmp_path).run([*(np.array(operand) for operand in (x, *w.arrays)), y])
    np.testing.assert_allclose(np.float64(y), expected, rtol=float(jnp.finfo(y.dtype).eps), atol=1e-4)
