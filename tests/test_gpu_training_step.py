"""The whole training step, compiled for GPUs that are not here, with the kernels inside it."""

import pytest
from gpu_child import call, needs_plugin

# Model, kernel, rows, tokens a row, GPUs.
PROGRAMS = [
    ["smollm2", "fused", 4, 256, 1],
    ["llama-7b", "fused", 1, 512, 1],
    ["smollm2", "fused", 2, 256, 2],
    ["smollm2", "dequantize", 4, 256, 1],
    ["smollm2", "xla", 4, 256, 1],
]


@needs_plugin
@pytest.mark.parametrize("chip", ["a6000", "h100"])
def test_no_weight_is_decoded_to_memory_or_copied(chip):
    """On the fused path: no array of a whole base weight in 16 or 32 bits, and no codes but the stored ones."""
    results = call("gpu_programs:training_steps", chip, PROGRAMS, timeout=600)
    for (_, kernel, *_rest), result in zip(PROGRAMS, results, strict=True):
        if kernel == "fused":
            # Forward, recomputed forward (but for the last linear, whose output nothing needs) and backward.
            assert result["kernels"] == 7 + 6 + 7
            assert not result["decoded"]
            assert not result["moved"]
        elif kernel == "dequantize":
            assert result["kernels"] == 7 + 6 + 7
            assert result["decoded"] and not result["moved"]
        else:  # what the tests above would say if a weight were decoded
            assert result["kernels"] == 0
            assert result["decoded"]
