"""Words and plans about weights that a checkpoint holds quantised: notes, descriptions, advice, values on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.checkpoint_helpers import random_tensors, write_gguf
from fixtures.random_weights_of_formats import FOUR_BITS, random_weight
from fixtures.tiny_configs import LLAMA
from gguf import GGMLQuantizationType

from qlora_jax import models
from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.planner.planning import remedies
from qlora_jax.quantization import QuantizationConfig, dequantize, dequantize_on_host, quantize
from qlora_jax.training import setup
from qlora_jax.training.config import TrainConfig


def gguf_config(tmp_path, kind):
    tensors = random_tensors(LLAMA, "float32")
    return write_gguf(tmp_path / "m.gguf", LLAMA, tensors, kind=GGMLQuantizationType[kind])


def test_flags_without_effect_are_told(tmp_path):
    config = resolve_config(gguf_config(tmp_path, "Q4_0"))
    assert setup.quantization_notes(TrainConfig(), config) == []
    assert setup.quantization_notes(TrainConfig(quant_type="fp4", block_size=128), config) == [
        f"`{field}` has no effect: the checkpoint's own q4_0 is kept; `bits=4` quantises again"
        for field in ("quant_type=fp4", "block_size=128")
    ]
    assert setup.quantization_notes(TrainConfig(bits=4, quant_type="fp4"), config) == []
    plain = models.model_config(LLAMA)
    assert setup.quantization_notes(TrainConfig(quant_type="fp4"), plain) == []


@pytest.mark.parametrize(("kind", "fusible"), [("Q4_0", True), ("Q8_0", False), ("Q5_1", True)])
def test_fusing_is_advised_where_it_can_be(kind, fusible, tmp_path):
    config = resolve_config(gguf_config(tmp_path, kind))
    assert setup.stores_4_bits(TrainConfig(), config) == fusible
    assert setup.stores_4_bits(TrainConfig(bits=4), config)
    assert not setup.stores_4_bits(TrainConfig(bits=8), config)
    found = list(remedies(TrainConfig(), fusible=fusible))
    assert ({"kernel": "fused"} in found) == fusible


def test_what_is_quantised_again_is_told(tmp_path):
    base = load_base(gguf_config(tmp_path, "Q5_1"), quantization=QuantizationConfig(), dtype="float32")
    again = "Q5_1 dequantised and stored as nf4 in blocks of 64 with double quantisation in all linears"
    assert again in base.description and "embedding dequantised from Q5_1" in base.description


@pytest.mark.parametrize("quant_type", [*FOUR_BITS, "q8_0", "int8"])
def test_values_on_the_host_are_those_of_dequantize(quant_type):
    if quant_type in FOUR_BITS:
        q = jax.tree.map(lambda buffer: buffer[0], random_weight(quant_type, (33, 128)))
    else:
        q = quantize(np.random.default_rng(0).normal(size=(33, 128)).astype(np.float32), quant_type=quant_type)
    np.testing.assert_array_equal(dequantize_on_host(q), dequantize(q, jnp.float32))
