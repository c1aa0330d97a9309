"""Mutated files of checkpoints: safetensors and their index, GGUF, converted bases, adapters."""

import functools
import json
import math
import shutil
import struct

import gguf
import numpy as np
import pytest
import safetensors.numpy
from fixtures.checkpoint_helpers import random_tensors, write_gguf, write_hf
from fixtures.packed_checkpoints import write_packed
from fixtures.tiny_configs import BIASED_LLAMA
from fixtures.tiny_model import GOLDEN
from fuzz.mutations import mutated_bytes, mutated_json, run_cases, writer

from qlora_jax import models
from qlora_jax.checkpoints.gguf_file import read_metadata
from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.checkpoints.manifest import MANIFEST_NAME, read_manifest
from qlora_jax.checkpoints.peft import CONFIG_NAME, WEIGHTS_NAME, load_adapter
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.checkpoints.streaming import check_source
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor

pytestmark = pytest.mark.fuzz

TINY = {
    **BIASED_LLAMA, "vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "attention_bias": False,
}  # fmt: skip


# With types checked at run time, as in all tests, a model takes long to declare.
base_tensors = functools.lru_cache(maxsize=16)(models.base_tensors)


def contents(directory):
    """Open a checkpoint as a load does: every tensor its config asks for."""
    source = open_source(directory)
    check_source(source, base_tensors(source.config))
    return source, {name: source.read(name) for name in source.names()}


@pytest.fixture
def model(tmp_path):
    return write_hf(tmp_path / "model", TINY, random_tensors(TINY))


def test_safetensors(cases, model):
    file = model / "model.safetensors"
    raw = file.read_bytes()
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:size])

    def mutate(rng):
        if rng.random() < 0.5:
            return mutated_bytes(raw, rng)
        changed = mutated_json(header, rng)
        return len(changed).to_bytes(8, "little") + changed + raw[size:]

    def check(mutant, value):
        _, tensors = value
        said = json.loads(mutant[8 : 8 + struct.unpack("<Q", mutant[:8])[0]])
        assert set(tensors) == set(said) - {"__metadata__"}
        start = len(mutant) - max(said[name]["data_offsets"][1] for name in tensors)
        for name, values in tensors.items():
            begin, end = said[name]["data_offsets"]
            assert list(values.shape) == said[name]["shape"]
            assert values.tobytes() == mutant[start + begin : start + end]

    run_cases(cases, mutate, writer(file, lambda: contents(model)), check, "model.safetensors", "config.json")


def test_index(cases, tmp_path):
    tensors = random_tensors(TINY)
    model = write_hf(tmp_path / "model", TINY, tensors, shards=2)
    file = model / "model.safetensors.index.json"
    index = json.loads(file.read_bytes())
    safetensors.numpy.save_file({"stolen": np.zeros(4, np.float32)}, tmp_path / "outside.safetensors")

    def check(mutant, value):
        _, read = value
        assert read.keys() == json.loads(mutant)["weight_map"].keys() == tensors.keys()
        assert all(read[name].tobytes() == tensors[name].tobytes() for name in tensors)

    run_cases(
        cases,
        lambda rng: mutated_json(index, rng),
        writer(file, lambda: contents(model)),
        check,
        "model.safetensors.index.json",
        str(model),
    )


def test_gguf(cases, tmp_path):
    tensors = {name: values.astype(np.float32) for name, values in random_tensors(TINY).items()}
    tokens = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab", "</s>"], "types": [1, 1, 1, 3]}
    tokens["merges"] = ["a b"]
    file = write_gguf(tmp_path / "model.gguf", TINY, tensors, tokens, extra={"general.name": "tiny"})
    raw = file.read_bytes()
    data = len(raw) - sum(values.nbytes for values in tensors.values()) - 512

    def mutate(rng):
        # Most of the file is weights, any of which are possible.
        if rng.random() < 0.1:
            return raw[:data] + mutated_bytes(raw[data:], rng)
        return mutated_bytes(raw[:data], rng) + raw[data:]

    def check(mutant, value):
        _, read = value
        if len(mutant) == len(raw) and mutant[:data] == raw[:data]:
            assert read.keys() == tensors.keys()
        reader = gguf.GGUFReader(file)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert repr(metadata) == repr(dict(read_metadata(file)))
        stored = {tensor.name: bytes(tensor.data.tobytes()) for tensor in reader.tensors}
        assert len(stored) == len(read)
        assert sorted(map(len, stored.values())) == sorted(values.nbytes for values in read.values())
        assert read["model.embed_tokens.weight"].tobytes() == stored["token_embd.weight"]

    run_cases(cases, mutate, writer(file, lambda: contents(file)), check, "model.gguf", "config.json")


def test_manifest(cases, tmp_path):
    directory = tmp_path / "converted"
    shutil.copytree(GOLDEN / "converted_tiny", directory)
    file = directory / MANIFEST_NAME
    document = json.loads(file.read_bytes())

    def check(mutant, manifest):
        said = json.loads(mutant)
        made = json.loads(json.dumps(manifest.to_json()))
        # Of format 1, without digests and linears: its mutants are not all refused for another digest of the file.
        del made["format_version"], made["files"], made["linears"]
        for part in made["parts"]:
            for digested in (part, *part["tensors"]):
                del digested["digests"]
        assert {key: said[key] for key in made} == made
        for part in manifest.parts:
            assert (directory / part.name).parent == directory
            assert all((directory / part.name / name).resolve().is_relative_to(directory) for name in part.files)

    run_cases(
        cases,
        lambda rng: mutated_json(document, rng),
        writer(file, lambda: read_manifest(directory)),
        check,
        MANIFEST_NAME,
    )


ADAPTER = GOLDEN / "peft_tiny"


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_adapter(cases, tmp_path, name):
    directory = tmp_path / "adapter"
    shutil.copytree(ADAPTER, directory)
    model = models.model_config(json.loads(str(np.load(ADAPTER / "golden.npz")["config"])))
    raw = (ADAPTER / name).read_bytes()
    good, _ = load_adapter(ADAPTER, model)

    def mutate(rng):
        return mutated_json(json.loads(raw), rng) if name == CONFIG_NAME else mutated_bytes(raw, rng)

    def check(mutant, value):
        tensors, config = value
        if name == CONFIG_NAME:
            said = json.loads(mutant)
            alpha = said["lora_alpha"] * (math.sqrt(said["r"]) if said.get("use_rslora") else 1)
            assert config.rank == said["r"] and math.isclose(config.alpha, alpha)
            assert 0 < config.alpha / config.rank < 1e6
            assert all(np.array_equal(tensors[path], good[path]) for path in good)
        else:
            assert tensors.keys() == good.keys()
            assert all(np.isfinite(values).all() for values in tensors.values())

    read = writer(directory / name, lambda: load_adapter(directory, model))
    run_cases(cases // 2, mutate, read, check, CONFIG_NAME, WEIGHTS_NAME)


def adopted(directory):
    """Open a checkpoint that is quantised already, and read its linears as they are stored or dequantised."""
    source = open_source(directory)
    specs = base_tensors(source.config)
    check_source(source, specs, QuantizationConfig())
    return source, {
        spec.name: source.read_stored(spec.name) if source.stored(spec.name) else source.read(spec.name)
        for spec in specs
    }


WIDE = {**TINY, "hidden_size": 64, "head_dim": 32, "intermediate_size": 64, "num_key_value_heads": 2}
PACKED = ("bnb_nf4", "awq", "gptq", "nvfp4", "mxfp4")


@pytest.mark.parametrize("method", PACKED)
def test_packed(cases, tmp_path, method):
    """Mutants of the settings, of the header, and of the tensors that make the weights of a 4-bit checkpoint."""
    linears = write_packed(tmp_path / "model", method, WIDE)
    model = tmp_path / "model"
    config, file = model / "config.json", model / "model-00001-of-00002.safetensors"
    contents, raw = json.loads(config.read_bytes()), file.read_bytes()
    size = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:size])

    def mutate(rng):
        kind = rng.random()
        if kind < 0.4:
            changed = mutated_json(contents["quantization_config"], rng)
            return b"config" + b'{"quantization_config": ' + changed + b", " + json.dumps(contents).encode()[1:]
        if kind < 0.7:
            changed = mutated_json(header, rng)
            return b"tensor" + len(changed).to_bytes(8, "little") + changed + raw[size:]
        return b"tensor" + raw[:size] + mutated_bytes(raw[size:], rng)

    def read(mutant):
        config.write_bytes(mutant[6:] if mutant[:6] == b"config" else json.dumps(contents).encode())
        file.write_bytes(mutant[6:] if mutant[:6] == b"tensor" else raw)
        return adopted(model)

    def check(mutant, value):
        source, tensors = value
        for spec in base_tensors(source.config):
            got = tensors[spec.name]
            assert got.shape == spec.shape
            if mutant[:6] == b"config" and spec.quantized and isinstance(got, QuantizedTensor):
                want = linears[spec.name]
                if got.quant_type == want.quant_type and got.block_size == want.block_size:
                    assert got.codes.tobytes() == want.codes.tobytes() and got.absmax.tobytes() == want.absmax.tobytes()

    run_cases(max(1, cases // len(PACKED)), mutate, read, check, "config.json", str(model), file.name)


def test_modelopt_file(cases, tmp_path):
    """Mutants of hf_quant_config.json: what is read is NVFP4, of the linears that it does not leave out."""
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    file = tmp_path / "hf_quant_config.json"
    document = {
        "producer": {"name": "modelopt", "version": "0.19.0"},
        "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "has_zero_point": False,
            "exclude_modules": ["lm_head", "model.layers.0.self_attn*"],
        },
    }  # fmt: skip

    def check(mutant, config):
        said = json.loads(mutant)["quantization"]
        assert {storage.quant_type for _, storage in config.stored} <= {"nvfp4"}
        assert not config.stored or said["quant_algo"] == "NVFP4"

    read = writer(file, lambda: resolve_config(tmp_path))
    run_cases(cases // 2, lambda rng: mutated_json(document, rng), read, check, file.name)
