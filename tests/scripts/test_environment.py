"""The set-up of a command's process for JAX."""

import os

import pytest

from qlora_jax.device_memory import CONTEXT_BYTES
from qlora_jax.environment import let_jax_fill_the_gpu, multiplies_bfloat16


@pytest.mark.parametrize(
    ("answer", "fraction"),
    [("24564", 0.969), ("81559\n24564", 0.969), ("8192", 0.927), ("[N/A]", None), ("", None)],
)
def test_jax_takes_the_gpu_but_for_the_allowance(answer, fraction, tmp_path, monkeypatch):
    """Of the smallest GPU: the planner counts on the rest being there."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\necho '{answer}'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")  # so that what it was comes back
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    let_jax_fill_the_gpu()
    assert os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == (fraction and str(fraction))
    if fraction:
        left = (1 - fraction) * min(map(int, answer.split())) * 2**20
        assert abs(left - CONTEXT_BYTES - 0.01 * min(map(int, answer.split())) * 2**20) < 2**26
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    let_jax_fill_the_gpu()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx512f avx512_bf16 avx512vbmi\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu sse2 avx2\nbugs\t\t: avx512_bf16\n", False),
        ("Features\t: asimd bf16\n", False),
    ],
)
def test_processors_that_multiply_bfloat16(cpuinfo, found):
    assert multiplies_bfloat16(cpuinfo) is found
