"""Whole programs, compiled for GPUs that are not here, with the kernels inside them."""

import pytest
from fixtures.compile_in_child import call

# Function, model, kernel, rows (of a GPU), tokens a row, GPUs.
FUSED = [
    ["training_step", "smollm2", "fused", 2, 256, 2],
    ["training_step", "llama-7b", "fused", 1, 512, 1],
    ["long_step", "smollm2", "fused", 1, 8192],
    ["prefilling", "llama-7b", "fused", 8, 1024, 64],
    ["decoding", "llama-7b", "fused", 8, 1024],
    ["decoding", "llama-7b", "fused", 8, 1024, "int8"],
    ["decoding", "llama-7b", "fused", 8, 1024, "auto", 7],
]
# What the assertions on those would find if weights were dequantized to memory: by a kernel, by XLA.
DEQUANTIZED = {
    "h100": ["training_step", "smollm2", "unfused", 4, 256, 1],
    "b200": ["training_step", "smollm2", "xla", 4, 256, 1],
}


@pytest.mark.compile
@pytest.mark.parametrize("chip", ["a6000", "h100", "b200"])
def test_no_weight_is_dequantized_to_memory_or_copied(chip):
    """On the fused path: no array of a whole base weight in 16 or 32 bits, and no codes but the stored ones."""
    programs = [*FUSED, *([DEQUANTIZED[chip]] if chip in DEQUANTIZED else [])]
    results = call("fixtures.compiled_programs:compiled", chip, programs, timeout=900)
    for (program, _, kernel, *rest), result in zip(programs, results, strict=True):
        assert bool(result["decoded"]) == (kernel != "fused")
        if kernel == "xla":
            assert result["kernels"] == 0
            continue
        # Forward, recomputed forward (but for the last linear, whose output nothing needs), backward; tiles add none.
        generation = program in ("prefilling", "decoding")
        assert result["kernels"] == (7 if generation else 7 + 6 + 7)
        assert not result["moved"] or "int8" in rest  # whose cache looks like codes
        assert not result["gathers"]
        if program == "long_step":
            assert result["host_bytes"] == 30 * 8192 * 576 * 2  # the layers' inputs, bfloat16, once
            assert not result["host_computations"]
        if generation:  # the cache is updated where it is: keys and values, bfloat16 or with a scale a token and head
            row = 2 * 32 * 1024 * (32 * (128 + 4) if "int8" in rest else 4096 * 2)
            assert 8 * row < result["updated_bytes"] == result["state_bytes"]
            # None of a row's size, but with guesses a layer of all rows.
            assert result["temporary_bytes"] < (0.2 if 7 in rest else 0.1) * row


@pytest.mark.compile
def test_xla_rematerialises_nothing_in_a_plan_that_fits():
    """On a 48 GiB card; with the sheet's size in the target XLA stops at 80 % of it and computes 47 things twice."""
    found = call("fixtures.compiled_programs:rematerialised", "a6000", "llama-65b", "fused", 1, 512, 64)
    assert found["fixed_bytes"] > 0.8 * 48e9
    assert not found["names"]
