"""Memory that loading takes beside the model, as `qlora_jax.checkpoints.loading` states it, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from fixtures.checkpoint_helpers import write_large_hf
from fixtures.tiny_configs import BIASED_LLAMA
from plan_load import ceilings

from qlora_jax.checkpoints import conversion
from qlora_jax.quantization import QuantizationConfig

LAYERS, WIDTH, FFN, VOCABULARY = 8, 1024, 8192, 32768
CONFIG = {
    **BIASED_LLAMA,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
}
EMBEDDING, CODES = 2 * VOCABULARY * WIDTH, FFN * WIDTH // 2
"""Bytes of embedding and head in bfloat16, and of the codes of the largest linear in one layer."""
PART = 19 * CODES
"""Bytes of a part: five layers, scales and attention included, and some linears of a sixth."""

# VmHWM, not ru_maxrss: that of a child begins with its parent's. A child forked after the imports would not do: pages
# of libraries that it has yet to touch would count.
CHILD = """
import sys
import jax, tensorstore
from qlora_jax import models
from qlora_jax.checkpoints import loading, streaming
from qlora_jax.quantization import QuantizationConfig

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024

models.model_config(models.PRESETS["llama-7b"])
jax.numpy.zeros(3).block_until_ready()
before = peak()
loaded = loading.load_base(sys.argv[1], quantization=QuantizationConfig(), dtype="bfloat16")
print(peak() - before, sum(streaming.inventory(loaded.tensors).values()))
"""


class Memory(NamedTuple):
    """Bytes of the model in memory, and of what loading took beside it at most."""

    model: int
    beside: int


def load(*paths: Path) -> list[Memory]:
    """Load each, in processes at the same time."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-c", CHILD]
    children = [subprocess.Popen([*argv, path], env=environment, stdout=subprocess.PIPE, text=True) for path in paths]
    found = []
    for child in children:
        out, _ = child.communicate(timeout=300)
        assert child.returncode == 0
        peak, model = map(int, out.split())
        found.append(Memory(model, peak - model))
    return found


@pytest.mark.e2e
def test_a_converted_model_is_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint, converted = tmp_path / "hf", tmp_path / "converted"
    write_large_hf(checkpoint, CONFIG, 2)
    monkeypatch.setattr(conversion, "_PART_BYTES", PART)
    conversion.convert(checkpoint, converted, QuantizationConfig(), "bfloat16")
    memory, quantised = load(converted, checkpoint)
    stated = ceilings(CONFIG)
    print(memory, quantised, stated)
    assert memory.model == quantised.model == stated.model > 2 * EMBEDDING + LAYERS * 3 * CODES
    # A chunk, as it is in the file.
    assert memory.beside < stated.load_converted <= 2 * CODES + (32 << 20)
    # How many pieces the threads of a load hold at a time varies.
    assert memory.beside < quantised.beside + (8 << 20) and quantised.beside < stated.load
