"""`scripts/benchmark.py kernels`: counting without a GPU, and as much of the timing as a CPU can run."""

import dataclasses
import json
import math
import runpy
from pathlib import Path
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import compile_in_child

from qlora_jax.commands.kernel_plot import plot_kernels
from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS, chip_like, compile_for
from qlora_jax.kernels import benchmark, roofline, selection, timings_cache
from qlora_jax.kernels.codegen_report import (
    ARCHITECTURES,
    FEW_VARIANTS,
    VARIANTS,
    compile_reports,
    crossover_table,
)
from qlora_jax.kernels.mosaic import dequantize, dispatch
from qlora_jax.kernels.product import Product
from qlora_jax.quantization import abstract_quantized
from qlora_jax.training.benchmark import linear_layers

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
PRODUCT = Product(m=8, n=64, k=128, transposed=False)


@pytest.fixture(autouse=True)
def timings_file(monkeypatch, tmp_path):
    monkeypatch.delenv(timings_cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def script(*arguments: str) -> int:
    return runpy.run_path(str(SCRIPT))["main"](["kernels", *arguments])


def test_one_chip_of_each_architecture_is_compiled_for():
    architectures = {CHIPS[name].arch for name in ARCHITECTURES}
    assert len(architectures) == len(ARCHITECTURES)
    assert architectures == {chip.arch for chip in CHIPS.values()}


@pytest.mark.compile
@pytest.mark.parametrize("chip", ARCHITECTURES)
def test_the_static_table(chip):
    """Every kernel compiles for every architecture; limits on its loop, and the model's figures, by machine code."""
    (reports,) = compile_reports([chip], ["nf4", "q4_1"])
    constants = {name: kernel.COST.alu_per_weight for name, kernel in dispatch.KERNELS.items()}
    constants["dequantize"] = dequantize.ALU_PER_WEIGHT
    assert [(report.m, report.transposed) for report in reports] == [
        (v.m, v.transposed) if v else (0, False) for v in (*VARIANTS, *FEW_VARIANTS)
    ]
    for row in reports:
        assert (row.arch, row.chip, row.spilled, row.serialized) == (CHIPS[chip].arch, chip, 0, False)
        assert 0 < row.registers <= 255 and row.shared_bytes <= CHIPS[chip].shared_memory_bytes
        nf4 = row.quant_type == "nf4"
        assert row.bytes_per_weight <= (0.54 if nf4 else 0.625)
        # There ptxas moves mma's accumulators from register to register (BENCHMARKS.md).
        most = 4.6 if row.arch == "sm_120a" else min(4.1, constants[row.kernel])
        # Blocks of 32 have two tables a group of 64.
        assert 3 < row.alu_per_weight <= most + (0 if nf4 else 0.75)


@pytest.mark.compile
def test_the_script_counts_without_a_gpu(capsys, tmp_path):
    assert script("--static", "--chips", "rtx4090", "--output_dir", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "Static:" in said and "Nothing is timed" in said and "Predicted, not measured" in said
    assert said.count("| sm_89 | ") == len(VARIANTS)
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written["kind"] == "static" and len(written["kernels"]) == len(VARIANTS)


@pytest.mark.parametrize("arguments", [("--chips", "h1000", "--static"), ("--static", "--chips", "a100,,b2")])
def test_unknown_chips(arguments, tmp_path):
    with pytest.raises(UserError, match=r"--chips has '(h1000|b2)'; choose from a100, "):
        script(*arguments, "--output_dir", str(tmp_path))


def loop_on_a_gpu(implementation: str) -> str:
    """HLO of the timing loop for an A6000; runs in a child."""
    chip = selection.target_chip = lambda: CHIPS["a6000"]
    product = Product(64, 1024, 1024, True)
    shape = (product.n, product.k)
    weight = jax.ShapeDtypeStruct(shape, jnp.bfloat16) if implementation == "bf16" else abstract_quantized(shape)
    x = jax.ShapeDtypeStruct((product.m, product.contracted), jnp.bfloat16)
    run = benchmark.repeated(benchmark.operation(implementation, product.transposed), 50)
    return compile_for(chip(), run, x, [weight] * 3).as_text()


@pytest.mark.compile
@pytest.mark.parametrize(("implementation", "kernels"), [("fused", 3), ("unfused", 3)])
def test_no_call_leaves_the_timing_loop(implementation, kernels):
    hlo = compile_in_child.call("test_kernel_benchmark:loop_on_a_gpu", implementation)
    computations = hlo.split("\n\n")
    (body,) = (text for text in computations if "custom-call(" in text)
    assert not body.lstrip().startswith("ENTRY") and body.count(" custom-call(") == kernels
    assert "known_trip_count" in hlo  # else the host would ask before every trip
    assert " copy(" not in body


@pytest.mark.parametrize("implementation", ["xla", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_timing(implementation, transposed, monkeypatch):
    monkeypatch.setattr(benchmark, "_SECONDS_A_CALL", 1e-5)
    chip = CHIPS["a6000"]
    product = dataclasses.replace(PRODUCT, transposed=transposed)
    benchmark.check(product, implementation, chip)
    assert 0 < benchmark.seconds_of(product, implementation, chip) < 10
    x, weights = benchmark.random_operands(product, implementation, 2)
    assert x.shape == (8, 64 if transposed else 128)
    function = benchmark.operation(implementation, transposed)
    for result, weight in zip(benchmark.repeated(function, 3)(x, weights), weights, strict=True):
        np.testing.assert_array_equal(result, jax.jit(function)(x, weight))


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    def operation(implementation, transposed):
        return lambda x, w: jnp.full((4, 4), float(implementation == "xla") or 0.9)

    monkeypatch.setattr(benchmark, "operation", operation)
    with pytest.raises(RuntimeError, match=r"fused is wrong on NVIDIA RTX A6000 for Product\(.*off by 0\.1"):
        benchmark.check(PRODUCT, "fused", CHIPS["a6000"])


def test_cold_caches_and_calls_long_enough():
    chip = CHIPS["h100"]
    for product in (Product(1, 1024, 4096, False), Product(16384, 28672, 8192, True)):
        for implementation in benchmark.IMPLEMENTATIONS:
            copies, trips = benchmark.repeats(chip, product, implementation)
            assert 1 <= copies <= 8 and trips >= 1
            size = product.n * product.k * (2 if implementation == "bf16" else 0.5)
            assert copies == 8 or copies * size >= chip.l2_bytes


def test_the_roofline_of_a_product():
    chip = CHIPS["a6000"]
    small, large = Product(1, 4096, 4096, False), Product(16384, 4096, 4096, True)
    assert benchmark.best_seconds(chip, large, "fused") == (2 * 16384 * 4096**2 / chip.bf16_flops, "tensor")
    four, sixteen = (benchmark.best_seconds(chip, small, name)[0] for name in ("fused", "bf16"))
    assert benchmark.best_seconds(chip, small, "xla") == (four, "memory")
    np.testing.assert_allclose(sixteen / four, 2 / 0.5159, rtol=0.01)


def test_equal_shapes_are_timed_once():
    shapes = linear_layers(["llama-7b", "llama-3.1-8b"])
    assert sorted(shapes[4096, 4096].split()) == ["k", "llama-7b", "o", "q", "v"]
    assert shapes[4096, 14336] == "llama-3.1-8b down" and shapes[1024, 4096].startswith("llama-3.1-8b ")
    assert len(shapes) == 6


def fake_measurements(*_, **__):
    for m in (1, 64):
        for implementation, seconds in (("fused", 1e-4), ("unfused", 2e-4), ("xla", 1e-3), ("bf16", math.inf)):
            for transposed in (False, True):
                product = Product(m, 4096, 4096, transposed)
                yield benchmark.Measurement("7b q k v o", product, implementation, seconds, 5e-5, "memory")


def test_the_script_times(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("qlora_jax.gpus.chip_like", lambda device: CHIPS["h100"])
    monkeypatch.setattr(benchmark, "measure", fake_measurements)
    assert script("--output_dir", str(tmp_path / "out"), "--models", "7b", "--rows", "1,64") == 0
    said = capsys.readouterr().out
    assert "50.0 % of memory" in said and "not enough memory" in said
    written = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert written["gpu"] == CHIPS["h100"].title and len(written["measurements"]) == 12
    assert (tmp_path / "out" / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert len(timings_cache.timings(CHIPS["h100"].title)) == 8
    for flags in (("--rows", "0"), ("--rows", "many"), ("--models", "9b"), ("--implementations", "cublas")):
        with pytest.raises(UserError, match=flags[0]):
            script("--output_dir", str(tmp_path / "out"), *flags)


def test_one_panel_plots(tmp_path):
    plot_kernels([one for one in fake_measurements() if not one.product.transposed][:2], "GPU", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_table_of_crossovers(monkeypatch):
    """Each number is in its place; the numbers themselves are test_roofline.py's."""

    def crossover(chip, n, k, *, transposed):
        return None if chip is CHIPS["a6000"] and transposed else n + transposed

    # Against the real one's signature: a call that it would refuse is refused here.
    real = create_autospec(roofline.crossover, side_effect=crossover)
    monkeypatch.setattr(roofline, "crossover", real)
    header, rule, *rows = crossover_table(linear_layers(["llama-7b"]))
    assert header.split(" | ")[2] == "a6000" and set(rule) <= set("| -")
    assert sorted(row.split(" | ")[1] for row in rows) == ["11008 x 4096", "4096 x 11008", "4096 x 4096"]
    for row in rows:
        n = int(row.split(" | ")[1].split()[0])
        first, *others = row.strip("| ").split(" | ")[2:]
        assert first == f"{n} / -"
        assert set(others) == {f"{n} / {n + 1}"}


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_timing_on_the_gpu(transposed):
    chip = chip_like(jax.devices()[0])
    found = list(benchmark.measure(chip, {(4096, 4096): "7b"}, rows=(1, 300), directions=(transposed,)))
    assert [one.implementation for one in found] == 2 * list(benchmark.IMPLEMENTATIONS)
    # Nothing is faster than the data sheet allows: the loop did what it says.
    assert all(0 < one.percent < 105 for one in found)
    assert len(benchmark.tuned(found)) == 4
