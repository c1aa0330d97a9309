"""The real SmolLM2: a merged GGUF file answers as the 4-bit base with its adapter does.

llama.cpp's answers to the same files are compared by tests/reference/check_llama_cpp.py.
"""

from pathlib import Path

import jax.numpy as jnp
import pytest
from fixtures.trained_adapters import write_adapter

from qlora_jax import models
from qlora_jax.checkpoints.base_weights import BaseStorage
from qlora_jax.checkpoints.hub import default_gguf
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.merging import open_adapter
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.exporting import ExportConfig, export
from qlora_jax.generation import Sampling, generate
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.quantization import QuantizationConfig

NF4 = QuantizationConfig("nf4", 64, True)


def answer(path: Path, quantization: QuantizationConfig, adapter: Path | None = None) -> list[list[int]]:
    """Greedy continuations of a model, with an adapter or without."""
    base = load_base(path, quantization=quantization, dtype="float32")
    lora, tensors = None, {}
    if adapter is not None:
        opened = open_adapter(adapter, base.config, tuple(models.base_tensors(base.config)))
        lora = LoRAConfig(opened.config.rank, opened.config.alpha, 0.0, opened.config.target_modules)
        tensors = dict(opened.tensors)
    qlora = QLoRAConfig(quantization, jnp.float32, lora)
    graphdef, trained, frozen = models.split_model(models.abstract_model(base.config, qlora))
    trained = models.unflatten_like(trained, tensors, what="adapter")
    prompts = [load_tokenizer(path)(text).input_ids for text in ("The capital of France is", "Rain is")]
    sampling = Sampling(max_new_tokens=16)
    return generate(graphdef, trained, models.fill_base(frozen, base.tensors), prompts, eos_ids=[], sampling=sampling)


@pytest.mark.slow
def test_merged_gguf_answers_as_the_base_with_its_adapter(tmp_path: Path):
    model = default_gguf()
    adapter = write_adapter(tmp_path / "adapter", open_source(model).config, rank=8, size=0.04, base=str(model))
    config = ExportConfig(
        str(adapter), str(tmp_path / "out"), to="gguf-f16", model=str(model), storage=BaseStorage(NF4, adopt=False)
    )
    export(config)
    expected = answer(model, NF4, adapter)
    assert expected != answer(model, NF4)
    assert answer(tmp_path / "out" / "model-F16.gguf", QuantizationConfig("none")) == expected
