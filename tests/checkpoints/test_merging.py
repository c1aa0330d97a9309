"""Merging: the stream of weights, and the share of a change that rounding lets through."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import families, tiny_model
from fixtures.checkpoint_helpers import random_tensors, write_hf
from fixtures.tiny_configs import BIASED_LLAMA, LLAMA
from fixtures.trained_adapters import random_adapter, write_adapter

from qlora_jax import models
from qlora_jax.checkpoints.base_weights import BaseStorage, open_base
from qlora_jax.checkpoints.conversion import convert
from qlora_jax.checkpoints.hf_export import HuggingFaceFormat, write_hugging_face
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.merging import merged_tensors, open_adapter, surviving_share
from qlora_jax.checkpoints.safetensors_source import SafetensorsSource
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.errors import UserError
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.quantization import QuantizationConfig, quantize

NF4 = QuantizationConfig("nf4", 32, True)
STORAGE = BaseStorage(NF4, adopt=False)
IDS = np.arange(2, 34, dtype=np.int32).reshape(2, 16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("base"), BIASED_LLAMA, random_tensors(BIASED_LLAMA))


def merge(base: Path, adapter: Path, output: Path, kind="dequantized", trained=STORAGE, dtype="float32", **storage):
    """Write a merged model; return its directory and what survives."""
    opened = open_base(base, kind, trained)
    output.mkdir()
    shares = write_hugging_face(
        opened,
        open_adapter(adapter, opened.config, opened.specs),
        output,
        HuggingFaceFormat(dtype, **storage),
    )
    return output, shares


def logits(base: Path, quantization: QuantizationConfig, adapter: Path | None = None) -> np.ndarray:
    """Float32 logits of a base, with an adapter or without."""
    loaded = load_base(base, quantization=quantization, dtype="float32")
    lora = tensors = None
    if adapter is not None:
        opened = open_adapter(adapter, loaded.config, tuple(models.base_tensors(loaded.config)))
        lora = LoRAConfig(opened.config.rank, opened.config.alpha, 0.0, opened.config.target_modules)
        tensors = opened.tensors
    qlora = QLoRAConfig(quantization, jnp.float32, lora)
    graphdef, trained, frozen = models.split_model(models.abstract_model(loaded.config, qlora))
    if tensors is not None:
        trained = models.unflatten_like(trained, tensors, what="adapter")
    return np.asarray(tiny_model.logits(graphdef, trained, models.fill_base(frozen, loaded.tensors), IDS))


def test_merged_model_computes_what_the_quantised_base_and_the_adapter_do(checkpoint: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", models.model_config(BIASED_LLAMA), size=0.15)
    expected = logits(checkpoint, NF4, adapter)
    scale = np.abs(expected).max()
    assert np.abs(expected - logits(checkpoint, NF4)).max() > 0.2 * scale  # the adapter matters
    merged, _ = merge(checkpoint, adapter, tmp_path / "merged")
    np.testing.assert_allclose(logits(merged, tiny_model.PLAIN), expected, atol=1e-5 * scale, rtol=0)
    merged, _ = merge(checkpoint, adapter, tmp_path / "bf16", dtype="bfloat16")
    assert 0 < np.abs(logits(merged, tiny_model.PLAIN) - expected).max() < 2**-7 * scale


def test_original_base_is_the_checkpoints_own(checkpoint: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", models.model_config(BIASED_LLAMA))
    merged, _ = merge(checkpoint, adapter, tmp_path / "merged", kind="original")
    expected = logits(checkpoint, tiny_model.PLAIN, adapter)
    np.testing.assert_allclose(logits(merged, tiny_model.PLAIN), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_every_tensor_of_the_base_is_in_the_merged_model_once(checkpoint: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", models.model_config(BIASED_LLAMA))
    merged, _ = merge(checkpoint, adapter, tmp_path / "merged", max_shard_bytes=50_000)
    assert len(list(merged.glob("model-*-of-*.safetensors"))) > 3
    before, after = SafetensorsSource(checkpoint), SafetensorsSource(merged)
    assert sorted(before.names()) == sorted(after.names())
    assert {name: before.shape(name) for name in before.names()} == {n: after.shape(n) for n in after.names()}
    config = json.loads((merged / "config.json").read_text())
    assert config == {**BIASED_LLAMA, "dtype": "float32"}
    assert json.loads((merged / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_other_parts_of_a_model_are_carried_along(tmp_path: Path):
    name = "gemma3_conditional"
    base = write_hf(tmp_path / "base", families.CASES[name]["config"], families.weights(name))
    adapter = write_adapter(tmp_path / "adapter", families.config(name))
    merged, shares = merge(base, adapter, tmp_path / "merged")
    before, after = SafetensorsSource(base), SafetensorsSource(merged)
    assert sorted(before.names()) == sorted(after.names())
    other = [tensor for tensor in before.names() if tensor.startswith("vision_tower.")]
    assert other
    assert all(np.array_equal(before.read(tensor), after.read(tensor)) for tensor in other)
    assert len(shares) == 7 * families.config(name).num_hidden_layers


def test_converted_base_is_merged_as_its_checkpoint_is(checkpoint: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", models.model_config(BIASED_LLAMA))
    converted = convert(checkpoint, tmp_path / "converted", NF4, "bfloat16").directory
    merged, _ = merge(checkpoint, adapter, tmp_path / "merged", dtype="bfloat16")
    again, _ = merge(converted, adapter, tmp_path / "again", dtype="bfloat16", trained=BaseStorage())
    first, second = SafetensorsSource(merged), SafetensorsSource(again)
    assert sorted(first.names()) == sorted(second.names())
    assert all(np.array_equal(first.read(name), second.read(name)) for name in first.names())
    with pytest.raises(UserError, match="not the original ones"):
        open_base(converted, "original", BaseStorage())


def test_share_of_a_change_that_survives(tmp_path: Path, checkpoint: Path):
    rng = np.random.default_rng(0)
    base, change = rng.normal(size=(2, 64, 64)).astype(np.float32)
    assert surviving_share(change, base + change, base) == pytest.approx(1, abs=1e-5)
    assert surviving_share(change, base, base) == 0
    assert surviving_share(0 * change, base, base) is None
    half = np.where(np.arange(64) < 32, change, 0)
    assert surviving_share(change, base + half, base) == pytest.approx(0.5, abs=0.05)
    # On average bfloat16 rounds a change as often up as down, however small: all of a large one, noise of a tiny one.
    config = models.model_config(BIASED_LLAMA)
    _, large = merge(checkpoint, write_adapter(tmp_path / "a", config), tmp_path / "b", dtype="bfloat16")
    assert all(abs(share - 1) < 0.02 for share in large.values())
    assert len(large) == 7 * config.num_hidden_layers
    _, kept = merge(checkpoint, tmp_path / "a", tmp_path / "c")
    assert all(abs(share - 1) < 1e-3 for share in kept.values())


def test_requantising_undoes_small_changes(checkpoint: Path, tmp_path: Path):
    nf4 = QuantizationConfig("nf4", 64, False)
    adapter = write_adapter(tmp_path / "adapter", models.model_config(BIASED_LLAMA), size=0.005)
    settings = {"trained": BaseStorage(nf4), "dtype": "bfloat16"}
    opened = open_base(checkpoint, "dequantized", BaseStorage(nf4))
    (tmp_path / "4bit").mkdir()
    shares = write_hugging_face(
        opened,
        open_adapter(adapter, opened.config, opened.specs),
        tmp_path / "4bit",
        HuggingFaceFormat("bfloat16", quantization=nf4),
    )
    # On the same grid of values, a change far below half a step moves no code.
    assert max(map(abs, shares.values())) < 0.1
    _, shares = merge(checkpoint, adapter, tmp_path / "16bit", **settings)
    assert min(shares.values()) > 0.5


def test_bitsandbytes_checkpoint_is_the_quantised_merged_model(checkpoint: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", models.model_config(BIASED_LLAMA))
    storage = QuantizationConfig("nf4", 64, True)
    merged, _ = merge(checkpoint, adapter, tmp_path / "16bit", dtype="bfloat16")
    packed, _ = merge(checkpoint, adapter, tmp_path / "4bit", dtype="bfloat16", quantization=storage)
    plain, source = open_source(merged), open_source(packed)
    assert sorted(plain.names()) == sorted(source.names())
    assert dict(source.config.stored) == dict.fromkeys(models.lora_modules(source.config, "all"), storage)
    for spec in models.base_tensors(source.config):
        weight = plain.read(spec.name)
        if not spec.quantized:
            np.testing.assert_array_equal(source.read(spec.name), weight)
            continue
        expected, found = quantize(weight, quant_type="nf4", double_quant=True), source.read_stored(spec.name)
        assert found.dtype == expected.dtype == "bfloat16"
        for before, after in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(before, after)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    with pytest.raises(UserError, match="in blocks of 64, not of nf4 in blocks of 32"):
        HuggingFaceFormat(quantization=NF4)


def test_adapters_of_another_model_are_refused(checkpoint: Path, tmp_path: Path):
    config = models.model_config(BIASED_LLAMA)
    deeper = models.model_config({**BIASED_LLAMA, "num_hidden_layers": config.num_hidden_layers + 1})
    wider = models.model_config({**BIASED_LLAMA, "hidden_size": 128})
    for name, other in (("deeper", deeper), ("wider", wider)):
        adapter = write_adapter(tmp_path / name, other)
        with pytest.raises(UserError, match="give the base it was trained on as `model`"):
            merge(checkpoint, adapter, tmp_path / f"merged-{name}")


def test_stream_gives_every_base_tensor_in_the_order_it_says(checkpoint: Path, tmp_path: Path):
    base = open_base(checkpoint, "original", BaseStorage())
    adapter = random_adapter(tmp_path / "adapter", base.config, modules="attention")
    tensors = list(merged_tensors(base, adapter))
    assert [tensor.spec for tensor in tensors] == list(base.specs)
    changed = {tensor.spec.path[-2] for tensor in tensors if tensor.change is not None}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_values_that_overflow_are_refused(tmp_path: Path):
    tensors = random_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e5
    base = write_hf(tmp_path / "base", LLAMA, tensors)
    adapter = write_adapter(tmp_path / "adapter", models.model_config(LLAMA))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has values that do not fit float16"):
        merge(base, adapter, tmp_path / "merged", kind="original", dtype="float16")
