"""Bases that are quantised already: taken over without changing a bit, or quantised again and said so."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.checkpoint_helpers import random_tensors, write_gguf
from fixtures.packed_checkpoints import METHODS, TYPES, random_linear, stored_tensors, write_packed
from fixtures.tiny_configs import LLAMA
from gguf import GGMLQuantizationType

from qlora_jax import models
from qlora_jax.checkpoints import packed_safetensors
from qlora_jax.checkpoints.conversion import convert
from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.errors import UserError
from qlora_jax.gpus import CHIPS
from qlora_jax.planner import compiler
from qlora_jax.quantization import MixedQuantization, QuantizationConfig, dequantize
from qlora_jax.training import setup
from qlora_jax.training.config import TrainConfig

CONFIG = {**LLAMA, "intermediate_size": 192, "tie_word_embeddings": False, "num_hidden_layers": 2}
NF4 = QuantizationConfig()


def load(path, config=None, **flags):
    config = TrainConfig(model_name_or_path=str(path), **flags)
    quantization = setup.quantization_of(config, resolve_config(path))
    return load_base(path, quantization=quantization, dtype="float32")


def layer(base, spec):
    value = base.tensors[spec.path]
    return value if spec.layer is None else jax.tree.map(lambda leaf: leaf[spec.layer], value)


def linears_of(base):
    return [spec for spec in models.base_tensors(base.config) if spec.quantized]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_quantised_already_is_kept_bit_for_bit(method, tmp_path):
    linears = write_packed(tmp_path / "model", method, CONFIG)
    storage = QuantizationConfig(*TYPES[method])
    assert dict(resolve_config(tmp_path / "model").stored) == {
        name: storage for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    base = load(tmp_path / "model")
    assert f"{storage} kept in all linears" in base.description
    for spec in linears_of(base):
        want, got = linears[spec.name], layer(base, spec)
        assert got.dtype == "float32" and got.quant_type == want.quant_type
        want = dataclasses.replace(want, dtype="float32")
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert jax.tree.structure(got) == jax.tree.structure(want)
    # What is not quantised is as it was.
    np.testing.assert_array_equal(
        base.tensors[("lm_head", "weight")], random_tensors(CONFIG, "float16")["lm_head.weight"]
    )


@pytest.mark.parametrize("method", ["bnb_nf4", "awq", "nvfp4"])
def test_converted_once_it_loads_the_same(method, tmp_path):
    write_packed(tmp_path / "model", method, CONFIG)
    direct = load(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "converted", NF4, "float32", adopt=True)
    assert done.bits_per_parameter == pytest.approx(direct_bits(direct))
    converted = load(tmp_path / "converted")
    jax.tree.map(np.testing.assert_array_equal, converted.tensors, direct.tensors)
    assert converted.digest == direct.digest
    assert resolve_config(tmp_path / "converted").stored == resolve_config(tmp_path / "model").stored
    if method != "bnb_nf4":
        with pytest.raises(UserError, match=f"was converted to {TYPES[method][0]}.* `bits=auto` takes it as it is"):
            load(tmp_path / "converted", bits=4)


def direct_bits(base):
    weights = [base.tensors[spec.path] for spec in linears_of(base) if spec.layer == 0]
    return 8 * sum(w.nbytes for w in weights) / sum(w.n_elements * w.stack_shape[0] for w in weights)


def test_another_type_that_is_asked_for_is_made_and_said(tmp_path):
    linears = write_packed(tmp_path / "model", "awq", CONFIG)
    base = load(tmp_path / "model", bits=4)
    assert "uint4 in blocks of 32 dequantised and stored as nf4 in blocks of 64 with double quantisation in all" in (
        base.description
    )
    for spec in linears_of(base)[:2]:
        values = np.asarray(dequantize(linears[spec.name], jnp.float32))
        error = np.abs(np.asarray(dequantize(layer(base, spec), jnp.float32)) - values)
        assert 0 < error.max() < np.abs(values).max() / 4
    # The type that it has is kept, whether it is named or not.
    write_packed(tmp_path / "same", "bnb_nf4", CONFIG)
    assert "kept in all linears" in load(tmp_path / "same", bits=4).description
    assert "kept" not in load(tmp_path / "same", bits=4, double_quant=False).description


def test_a_linear_that_is_stored_in_two_ways_is_quantised_again(tmp_path):
    write_packed(tmp_path / "model", "bnb_fp4", CONFIG, plain=["layers.1.mlp.down_proj"])
    assert "down_proj" not in dict(resolve_config(tmp_path / "model").stored)
    said = load(tmp_path / "model").description
    kept = said.partition("fp4 in blocks of 64 without double quantisation kept in ")[2].partition(";")[0]
    assert sorted(kept.split(", ")) == ["gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert "dequantised and stored as nf4 in blocks of 64 with double quantisation in down_proj" in said


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_1"])
def test_gguf(kind, tmp_path):
    tensors = random_tensors(CONFIG, "float32")
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors, kind=GGMLQuantizationType[kind])
    base = load(path)
    source = open_source(path)
    for spec in linears_of(base):
        if kind == "Q5_1":
            assert layer(base, spec).quant_type == "nf4"
        else:
            assert layer(base, spec).quant_type == kind.lower()
            np.testing.assert_array_equal(dequantize(layer(base, spec), jnp.float32), source.read(spec.name))


def without(name):
    return lambda tensors: tensors.pop(name, None)


def replaced(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])}) if name in tensors else None


def added(**tensors):
    """Put tensors beside the codes of `PROJ`; each is one number or an array."""
    return lambda all_tensors: all_tensors.update({f"{PROJ}.{name}": np.asarray(t) for name, t in tensors.items()})


def with_state(**changes):
    """Change the quant_state of `PROJ`; a field of `...` is taken out."""

    def change(tensor):
        state = {**json.loads(tensor.tobytes()), **changes}
        return np.frombuffer(json.dumps({name: v for name, v in state.items() if v is not ...}).encode(), np.uint8)

    return replaced(f"{PROJ}.weight.quant_state.bitsandbytes__nf4", change)


PROJ = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("awq", without(f"{PROJ}.qzeros"), f"tensor {PROJ}.qzeros is missing, which {PROJ}.qweight needs"),
        ("awq", without(f"{PROJ}.scales"), f"tensor {PROJ}.scales must have two dimensions"),
        ("awq", replaced(f"{PROJ}.scales", lambda a: a[:-1]), f"{PROJ}.scales of 5 groups does not fit the 192 inputs"),
        ("awq", replaced(f"{PROJ}.scales", lambda a: a * np.float16(np.nan)), f"tensor {PROJ}.weight .* NaN"),
        ("gptq", replaced(f"{PROJ}.g_idx", lambda a: a[::-1].copy()), f"tensor {PROJ}.weight .*act-order"),
        ("bnb_nf4", without(f"{PROJ}.weight.absmax"), f"{PROJ}.weight.absmax is missing"),
        ("bnb_nf4", replaced(f"{PROJ}.weight.absmax", lambda a: a[:-1]), f"{PROJ}.weight .* absmax of a nf4 weight"),
        (
            "bnb_nf4",
            replaced(f"{PROJ}.weight.quant_state.bitsandbytes__nf4", lambda a: a[:-3]),
            "is not the JSON that bitsandbytes writes",
        ),
        ("nvfp4", without(f"{PROJ}.weight_global_scale"), f"{PROJ}.weight_global_scale is missing"),
        ("nvfp4", replaced(f"{PROJ}.weight_global_scale", lambda a: a * 0), f"{PROJ}.weight .*are not finite"),
        (
            "mxfp4",
            replaced(f"{PROJ}.weight_packed", lambda a: a[:, :-1].copy()),
            f"{PROJ}.weight_packed has 190 inputs",
        ),
        ("mxfp4", replaced(f"{PROJ}.weight_scale", lambda a: a * 0 + np.uint8(255)), f"{PROJ}.weight .*hold NaN"),
    ],
)
def test_damage_is_named(method, change, message, tmp_path):
    write_packed(tmp_path / "model", method, CONFIG, change=change)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "floap16"), ("dtype", ["float16"]), ("quant_type", "int8"), ("quant_type", 4), ("blocksize", 64.0),
        ("blocksize", "64"), ("blocksize", 100), ("shape", 5), ("shape", [128, "192"]), ("shape", [True, -1]),
        ("shape", []), ("nested_offset", "0.1"), ("nested_offset", None), ("nested_offset", float("nan")),
        ("nested_blocksize", 512), ("nested_dtype", "float16"), ("shape", ...), ("nested_offset", 10**400),
    ],
)  # fmt: skip
def test_what_bitsandbytes_says_of_a_weight_is_checked(field, value, tmp_path):
    write_packed(tmp_path / "model", "bnb_nf4", CONFIG, change=with_state(**{field: value}))
    with pytest.raises(UserError, match=rf"tensor {PROJ}.weight.quant_state\S* is not the JSON .*: {field} must be .*"):
        open_source(tmp_path / "model")


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("bnb_int8", added(weight_format=np.uint8(2)), f"tensor {PROJ}.weight_format is 2 .col_turing.; only 0"),
        ("gptq", added(bias=np.ones(3, np.float16)), f"tensor {PROJ}.bias is not zero"),
        ("awq", replaced(f"{PROJ}.scales", lambda a: np.repeat(a, 2, 0)), f"tensor {PROJ}.scales makes groups of 16"),
    ],
)
def test_what_is_not_supported_is_not_called_damaged(method, change, message, tmp_path):
    write_packed(tmp_path / "model", method, CONFIG, change=change)
    with pytest.raises(UserError, match=message) as refusal:
        open_source(tmp_path / "model")
    assert "ownload" not in str(refusal.value)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("bnb_int8", added(weight_format=np.uint8(0))),
        ("gptq", added(bias=np.zeros(CONFIG["hidden_size"], np.float16))),
        ("modelopt", added(k_scale=np.float32(1), v_scale=np.float32(1))),
    ],
)
def test_parts_that_say_nothing_of_a_weight_are_left_alone(method, change, tmp_path):
    write_packed(tmp_path / "model", method, CONFIG, change=change)
    assert "kept in all linears" in load(tmp_path / "model").description


def test_biases_of_zeros_stay_the_models_where_it_has_biases(tmp_path):
    config = {**CONFIG, "attention_bias": True}
    write_packed(tmp_path / "model", "gptq", config, change=zero_biases)
    assert "kept in all linears" in load(tmp_path / "model").description
    assert "model.layers.0.self_attn.q_proj.bias" in open_source(tmp_path / "model").names()


def zero_biases(tensors):
    tensors.update({name: values * 0 for name, values in tensors.items() if name.endswith(".bias")})


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_group_may_be_a_whole_row(method, tmp_path, monkeypatch):
    monkeypatch.setitem(TYPES, method, ("uint4", -1, False))
    wide = {**CONFIG, "hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
    write_packed(tmp_path / "model", method, wide, group_size=-1)
    said = load(tmp_path / "model").description
    assert "uint4 in blocks of 128 kept in " in said and "uint4 in blocks of 192 kept in down_proj" in said
    loaded = resolve_config(tmp_path / "model").stored
    assert without_weights(tmp_path / "model").stored == loaded
    assert {storage.block_size for _, storage in loaded} == {128, 192}
    with pytest.raises(
        UserError, match="group_size is -1, which makes groups of the 96 inputs of down_proj, which are"
    ):
        models.model_config(
            {**wide, "intermediate_size": 96, "quantization_config": {**METHODS[method], "group_size": -1}}
        )


def without_weights(model):
    """Return the configuration of a model by its settings alone."""
    bare = model.with_name("bare")
    bare.mkdir()
    for path in model.glob("*.json"):
        if "index" not in path.name:
            shutil.copyfile(path, bare / path.name)
    return resolve_config(bare)


@pytest.mark.parametrize(
    ("method", "plain", "settings", "kept"),
    [
        ("bnb_nf4", ["layers.1.mlp."], {"llm_int8_skip_modules": ["model.layers.1.mlp", "lm_head"]}, "qkvo"),
        ("bnb_nf4", ["self_attn"], {"llm_int8_skip_modules": ["self_attn"]}, "gud"),
        ("bnb_fp4", ["k_proj"], {"llm_int8_skip_modules": ["k_proj"]}, "qvogud"),
        ("bnb_int8", ["0.mlp.up"], {"llm_int8_skip_modules": [r"model\.layers\.0\.mlp\.(up|x)_proj"]}, "qkvogd"),
        ("gptq", ["layers.0."], {"modules_to_not_convert": ["model.layers.0"]}, ""),
        ("awq", ["gate", "v_proj"], {"modules_to_not_convert": ["gate", "attn.v"]}, "qkoud"),
        ("nvfp4", ["1.mlp.down"], {"ignore": ["lm_head", r"re:.*layers\.1\.mlp\.d.*"]}, "qkvogu"),
        (
            "nvfp4",
            ["q_proj"],
            {"config_groups": {"group_0": {"targets": [r"re:.*\.([kvo]|.*[en]|up)_proj"]}}},
            "kvogud",
        ),
        ("mxfp4", ["1.self_attn.o"], {"ignore": ["model.layers.1.self_attn.o_proj", "o_proj", "up"]}, "qkvgud"),
        ("mxfp4", [], {"config_groups": {"g": {"targets": ["Linear"], "format": "mxfp4-pack-quantized"}}}, "qkvogud"),
        ("modelopt", ["layers.0.self_attn"], {"ignore": ["model.layers.0.self_attn*", "lm_head"]}, "gud"),
        ("modelopt", ["1.mlp.up"], {"exclude_modules": ["*1.mlp.u?_proj"], "ignore": None}, "qkvogd"),
    ],
)
def test_a_plan_knows_which_linears_are_left_out(method, plain, settings, kept, tmp_path):
    """The settings alone say what the tensors do."""
    write_packed(tmp_path / "model", method, CONFIG, plain=plain, **settings)
    loaded = resolve_config(tmp_path / "model").stored
    assert without_weights(tmp_path / "model").stored == loaded
    assert {name[0] for name, _ in loaded} == set(kept)


@pytest.mark.parametrize(
    ("method", "entries", "message"),
    [
        ("bnb_nf4", ["(.+)+!"], r"llm_int8_skip_modules is '.*', which takes too long or too much memory to match"),
        ("nvfp4", ["lm_head"] * 20_000, "quantization_config.ignore should have at most 2048 items"),
        ("nvfp4", ["re:(x"], r"quantization_config\.ignore has '\(x', which is no regular expression"),
    ],
)
def test_patterns_that_cannot_be_matched_are_named(method, entries, message):
    field = {**METHODS[method], "ignore": entries, "llm_int8_skip_modules": entries}
    with pytest.raises(UserError, match=message):
        models.model_config({**CONFIG, "quantization_config": field})


MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.19.0"},
    "quantization": {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"],
    },
}  # fmt: skip


def write_modelopt(directory, config=CONFIG, **settings):
    """Write a checkpoint of modelopt that is described beside config.json."""
    linears = write_packed(directory, "modelopt", CONFIG)
    (directory / "config.json").write_text(json.dumps(config))
    said = {**MODELOPT, "quantization": {**MODELOPT["quantization"], **settings}}
    (directory / "hf_quant_config.json").write_text(json.dumps(said))
    return linears


def test_modelopts_own_file_says_how_linears_are_stored(tmp_path):
    linears = write_modelopt(tmp_path / "model", kv_cache_quant_algo="FP8")
    base = load(tmp_path / "model")
    assert "nvfp4 kept in all linears" in base.description
    assert "keys and values are not quantised (kv_cache_scheme 'FP8' is for serving)" in base.description
    for spec in linears_of(base):
        jax.tree.map(np.testing.assert_array_equal, layer(base, spec).codes, linears[spec.name].codes)
    assert without_weights(tmp_path / "model").stored == resolve_config(tmp_path / "model").stored != ()
    assert resolve_config(tmp_path / "model" / "config.json").stored == resolve_config(tmp_path / "model").stored
    # Where config.json says the same, as later versions write it.
    both = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    write_modelopt(tmp_path / "both", {**CONFIG, "quantization_config": both})
    assert load(tmp_path / "both").digest == base.digest
    convert(tmp_path / "model", tmp_path / "converted", NF4, "float32", adopt=True)
    assert load(tmp_path / "converted").digest == base.digest


def test_cached_keys_and_values_may_be_all_that_modelopt_quantised(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    said = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    assert resolve_config(tmp_path).stored == ()


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"quant_algo": "FP8"}, None, "hf_quant_config.json: quant_algo is 'FP8'; only NVFP4 is supported"),
        ({"quant_algo": "W4A16_AWQ"}, None, "quant_algo is 'W4A16_AWQ'; only NVFP4 is supported"),
        ({"quant_algo": "MIXED_PRECISION"}, None, "quant_algo is 'MIXED_PRECISION'; only"),
        ({"group_size": 32}, None, "group_size is 32; NVFP4 has 16"),
        ({"pre_quant_scale": True}, None, "pre_quant_scale is True, which is not supported"),
        ({"exclude_modules": "lm_head"}, None, "quantization.exclude_modules should be a valid list"),
        ({}, {"quant_method": "modelopt", "quant_algo": "FP8"}, "but config.json has quantization_config of 'FP8'"),
        ({}, METHODS["nvfp4"], "but config.json has quantization_config of 'compressed-tensors'"),
        ({"quant_algo": None}, METHODS["modelopt"], "quant_algo is None, but config.json has .* of 'NVFP4'"),
        ({"exclude_modules": []}, METHODS["modelopt"], "exclude_modules and quantization_config of config.json name"),
    ],
)
def test_what_modelopts_file_cannot_say_is_refused(settings, field, message, tmp_path):
    write_modelopt(tmp_path / "model", {**CONFIG, **({"quantization_config": field} if field else {})}, **settings)
    for read in (open_source, resolve_config):
        with pytest.raises(UserError, match=message) as refusal:
            read(tmp_path / "model")
        assert str(refusal.value).startswith(str(tmp_path / "model" / "hf_quant_config.json"))


def test_a_damaged_file_of_modelopt_is_named_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_modelopt(Path("model"))
    Path("model/hf_quant_config.json").write_text("{")
    with pytest.raises(UserError, match=r"^model/hf_quant_config\.json is not valid JSON"):
        open_source("model")


def test_modelopt_without_its_settings_is_told_by_its_tensors(tmp_path):
    write_packed(tmp_path / "model", "modelopt", CONFIG)
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"no hf_quant_config.json is beside it, but tensor .* quantised weight"):
        open_source(tmp_path / "model")


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoint_format": "gptq"}, {"format": "gptq", "checkpoint_format": "gptq", "dynamic": {}},
        {"sparsity_config": {"format": "dense"}, "transform_config": {}, "pack_dtype": "int32", "meta": {"x": 1}},
    ],
)  # fmt: skip
def test_settings_without_effect_are_accepted(settings):
    assert models.model_config({**CONFIG, "quantization_config": {**METHODS["gptq"], **settings}}).stored


def test_both_names_of_gptqs_second_format_are_read(tmp_path):
    linears = write_packed(tmp_path / "model", "gptq_v2", CONFIG, checkpoint_format=None, format="GPTQ_v2")
    source, name = open_source(tmp_path / "model"), f"{PROJ}.weight"
    np.testing.assert_array_equal(source.read_stored(name).minimum, linears[name].minimum)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"quant_method": "fp8"}, "quant_method 'fp8', which is not supported; give the model's 16-bit weights"),
        ({"quant_method": "gptq", "bits": 3}, "bits is 3; only 4"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act is true: .*act-order"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'; only gemm"),
        ({"quant_method": "awq", "bits": 4, "checkpoint_format": "gemv"}, "checkpoint_format is 'gemv'; only gemm"),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "checkpoint_format is 'marlin'; only gptq and gptq_v2",
        ),
        ({"quant_method": "gptq", "format": "marlin"}, r"quantization_config\.format is 'marlin'"),
        ({"quant_method": "gptq", "format": "gptq", "checkpoint_format": "gptq_v2"}, "contradict each other"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "is_marlin_format is True, which is not supported"),
        ({"quant_method": "gptq", "dynamic": {"-:x": {}}}, "dynamic is {'-:x': {}}, which is not supported"),
        ({"quant_method": "gptq", "group_size": 16}, r"config.json: quantization_config\.group_size is 16"),
        ({"quant_method": "awq", "q_group_size": 0}, r"config.json: quantization_config\.q_group_size is 0"),
        ({**METHODS["nvfp4"], "transform_config": {"config_groups": {"a": {}}}}, "transform_config is .*not supported"),
        ({**METHODS["nvfp4"], "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config .*only dense"),
        ({"quant_method": "awq", "bits": "4"}, "quantization_config.bits should be a valid integer"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "format is 'float-quantized'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo is 'FP8'; only NVFP4"),
        ({**METHODS["nvfp4"], "config_groups": {"a": {"weights": {"num_bits": 8}}}}, "num_bits is 8, but 4 for nvfp4"),
        (
            {**METHODS["mxfp4"], "config_groups": {"a": {"weights": {"group_size": 16}}}},
            "group_size is 16, but 32 for mx",
        ),
        (
            {**METHODS["modelopt"], "config_groups": {"a": {"weights": {"type": "int"}}}},
            "type is 'int', but 'float' for",
        ),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "af4"}, "must be nf4 or fp4, not 'af4'"),
        ("nf4", "must be an object"),
    ],
)
def test_methods_that_are_not_supported_are_named(field, message):
    with pytest.raises(UserError, match=message):
        models.model_config({**CONFIG, "quantization_config": field})


def test_a_plan_knows_the_storage_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": METHODS["awq"]}))
    config = resolve_config(tmp_path)
    assert dict(config.stored)["q_proj"] == QuantizationConfig("uint4", 32)
    parts = setup.declare(TrainConfig(lora_modules="q_proj"), config).parts
    weight = models.flatten(parts.frozen)[("layers", "self_attn", "q_proj", "weight")]
    assert (weight.quant_type, weight.absmax.dtype, weight.minimum.dtype) == ("uint4", jnp.float16, jnp.uint8)
    assert setup.quantization_of(TrainConfig(bits=4), config) == NF4
    assert isinstance(setup.quantization_of(TrainConfig(), config), MixedQuantization)


def test_the_compilers_process_is_told_the_storage(tmp_path, monkeypatch):
    write_packed(tmp_path / "model", "awq", CONFIG)
    config, seen = resolve_config(tmp_path / "model"), []
    tell = "import json, sys; print(json.dumps({'error': sys.stdin.readline()}))"
    monkeypatch.setattr(compiler, "_COMMAND", (sys.executable, "-c", tell))
    with compiler.Compiler(CHIPS["a6000"]) as child, pytest.raises(UserError) as request:
        child(TrainConfig(), config, 128)

    def compile_step(train, model, chip, length):
        seen.append(model)
        raise UserError("enough")

    monkeypatch.setattr(compiler, "compile_step", compile_step)
    assert compiler._answer(json.loads(str(request.value))) == {"error": "enough"}
    assert seen == [config] and seen[0].stored == config.stored != ()


def test_parts_are_named_as_the_reader_says():
    """Ties the names that these checkpoints are written with to the docstring of the reader."""
    for method in METHODS:
        for name in stored_tensors(method, "X", random_linear(method, (64, 192), 0)):
            last = name.removeprefix("X.").removeprefix("weight.").partition("__")[0]
            assert last in packed_safetensors.__doc__
