"""Base weights on their way from a checkpoint into the model: converted or quantised on the fly, always the same."""

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.checkpoint_helpers import (
    hf_shapes,
    random_tensors,
    write_gguf,
    write_hf,
    write_large_hf,
)
from fixtures.tiny_configs import BIASED_LLAMA, TINY_CONVERTED
from orbax.checkpoint import v1 as ocp

from qlora_jax import cli, models
from qlora_jax.checkpoints import conversion, loading
from qlora_jax.checkpoints.conversion import Conversion, convert
from qlora_jax.checkpoints.host_memory import aligned_empty
from qlora_jax.checkpoints.loading import LoadedBase, load_base
from qlora_jax.checkpoints.manifest import MANIFEST_NAME
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.checkpoints.streaming import check_source, inventory
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.commands.convert import main
from qlora_jax.errors import UserError
from qlora_jax.files import file_digest, file_sizes, read_checked_json, write_checked_json
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor, quantize

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TOKENIZER = json.loads((GOLDEN / "smollm2_tokenizer.json").read_text())["small"]["tokenizer"]
CONFIGS = [
    QuantizationConfig("nf4", 64, True),
    QuantizationConfig("fp4", 32, False),
    QuantizationConfig("int8"),
    QuantizationConfig("none"),
]
NF4 = CONFIGS[0]


def write_model(directory: Path, config: dict[str, Any] = BIASED_LLAMA, **changed: np.ndarray) -> Path:
    return write_hf(directory, config, random_tensors(config) | changed, shards=2)


def assert_same(a: dict[tuple[str, ...], Any], b: dict[tuple[str, ...], Any]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        (xs, x_tree), (ys, y_tree) = jax.tree.flatten(a[key]), jax.tree.flatten(b[key])
        assert x_tree == y_tree, key
        for x, y in zip(xs, ys, strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape), key
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), key


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in bfloat16, in two shards; not to be changed."""
    return write_model(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """The model converted to NF4; not to be changed."""
    return convert(source, tmp_path_factory.mktemp("converted") / "out", NF4, "bfloat16")


@pytest.fixture(scope="module")
def direct(source: Path) -> Callable[[QuantizationConfig], LoadedBase]:
    """The model loaded without a conversion, in bfloat16; each quantisation is loaded once."""
    return functools.cache(lambda config: load_base(source, quantization=config, dtype="bfloat16"))


# --- what comes out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.quant_type)
def test_loaded_equals_quantised_tensor_by_tensor(direct: Any, config: QuantizationConfig):
    tensors, model = random_tensors(BIASED_LLAMA), direct(config)
    for spec in models.base_tensors(models.model_config(BIASED_LLAMA)):
        value = model.tensors[spec.path]
        if spec.layer is not None:
            value = jax.tree.map(lambda leaf, layer=spec.layer: leaf[layer], value)
        weight = tensors[spec.name]
        if spec.quantized and config.quant_type != "none":
            options = {"block_size": config.block_size, "double_quant": config.double_quant}
            want: Any = quantize(weight, quant_type=config.quant_type, **options)
        else:
            want = weight.astype(np.float32) if spec.kind == "norm" else weight
        assert_same({spec.path: value}, {spec.path: want})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.quant_type)
@pytest.mark.parametrize("part_bytes", [conversion._PART_BYTES, 9000])  # of 9000, also several chunks an array
def test_converted_equals_loaded(
    source: Path, direct: Any, tmp_path: Path, config: QuantizationConfig, part_bytes: int, monkeypatch: Any
):
    monkeypatch.setattr(conversion, "_PART_BYTES", part_bytes)
    monkeypatch.setattr(conversion, "_CHUNK_BYTES", min(conversion._CHUNK_BYTES, part_bytes // 9))
    result = convert(source, tmp_path / "out", config, "bfloat16")
    converted = load_base(tmp_path / "out", quantization=config, dtype="bfloat16")
    assert_same(converted.tensors, direct(config).tensors)
    assert converted.config == direct(config).config == models.model_config(BIASED_LLAMA)
    assert converted.config.source == BIASED_LLAMA
    assert converted.quantization == config
    assert result.bytes_by_class == inventory(direct(config).tensors) == inventory(converted.tensors)
    parts = [entry for entry in (tmp_path / "out").iterdir() if entry.name.startswith("part-")]
    assert len(parts) == 1 if part_bytes > 9000 else len(parts) > 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("shape", "rows"), [((32003, 4096), 32003), ((32001, 4096), 10667), ((50257, 768), 50257), ((151936, 896), 2374)]
)
def test_chunks_are_whole_rows_and_few(shape: tuple[int, int], rows: int):
    assert conversion.chunk_bytes(jax.ShapeDtypeStruct(shape, jnp.bfloat16)) == rows * shape[1] * 2
    assert conversion.chunk_bytes(jax.ShapeDtypeStruct((), jnp.float32)) == conversion._CHUNK_BYTES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_fill_the_model(source: Path, dtype: str):
    loaded = load_base(source, quantization=NF4, dtype=dtype)
    abstract = models.abstract_model(
        models.model_config(BIASED_LLAMA), QLoRAConfig(dtype=jnp.dtype(dtype), quantization=NF4)
    )
    _, _, frozen = models.split_model(abstract)
    filled = models.fill_base(frozen, loaded.tensors)
    assert_same(models.flatten(filled), loaded.tensors)


def test_inventory_counts_buffers(direct: Any, converted: Conversion):
    shapes = hf_shapes(BIASED_LLAMA)
    linear = [np.prod(shape) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2]
    norms = sum(shape[0] for name, shape in shapes.items() if "norm" in name)
    rest = sum(np.prod(s) for n, s in shapes.items() if n.endswith(".bias") or "embed" in n or "lm_head" in n)
    blocks = [-(-n // 64) for n in linear]
    scales = sum(n + 4 * -(-n // 256) + 4 for n in blocks)
    assert inventory(direct(NF4).tensors) == {
        "base_packed": sum(linear) // 2,
        "scales": scales,
        "unquantised": 4 * norms + 2 * rest,
    }
    assert converted.bits_per_parameter == pytest.approx(8 * (sum(linear) // 2 + scales) / sum(linear))
    assert converted.quantized_parameters == sum(linear)
    assert converted.parameters == sum(np.prod(shape) for shape in shapes.values())


def test_quantised_from_the_checkpoints_own_precision(tmp_path: Path):
    tensors = random_tensors(BIASED_LLAMA, "float32")
    model = load_base(write_hf(tmp_path, BIASED_LLAMA, tensors), quantization=NF4, dtype="bfloat16")
    value = model.tensors["layers", "mlp", "up_proj", "weight"]
    assert value.dtype == "bfloat16"
    want = quantize(tensors["model.layers.0.mlp.up_proj.weight"])
    assert np.array_equal(value.codes[0], want.codes)


def test_another_dtype_than_stored_is_cast_and_said(converted: Conversion):
    model = load_base(converted.directory, quantization=NF4, dtype="float32")
    assert model.tensors["embed_tokens", "weight"].dtype == jnp.float32
    assert model.tensors["layers", "mlp", "up_proj", "weight"].dtype == "float32"
    assert "stored as bfloat16, used as float32" in model.description


def test_gguf_converts_with_its_tokenizer(tmp_path: Path):
    config = {**BIASED_LLAMA, "vocab_size": len(TOKENIZER["tokens"])}
    source = write_gguf(tmp_path / "m.gguf", config, random_tensors(config, "float32"), TOKENIZER)
    convert(source, tmp_path / "out", NF4, "bfloat16")
    direct = load_base(source, quantization=NF4, dtype="bfloat16")
    converted = load_base(tmp_path / "out", quantization=NF4, dtype="bfloat16")
    assert_same(converted.tensors, direct.tensors)
    assert converted.config.source == direct.config.source
    text = "Some text, 123 <|im_end|>"
    assert load_tokenizer(tmp_path / "out")(text).input_ids == load_tokenizer(source)(text).input_ids


def test_a_relative_path_will_do(tmp_path: Path, direct: Any, monkeypatch: pytest.MonkeyPatch):
    write_model(tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    convert("hf", "out", NF4, "bfloat16")
    for path in ("out", "./out", Path("hf", "..", "out")):
        assert_same(load_base(path, quantization=NF4, dtype="bfloat16").tensors, direct(NF4).tensors)


def test_a_path_that_would_be_another_url_will_do(source: Path, tmp_path: Path, direct: Any):
    convert(source, tmp_path / "a b%20?#é", NF4, "bfloat16")
    assert_same(load_base(tmp_path / "a b%20?#é", quantization=NF4, dtype="bfloat16").tensors, direct(NF4).tensors)


def test_conversions_of_earlier_versions_are_read(tmp_path: Path):
    source = write_hf(tmp_path, TINY_CONVERTED, random_tensors(TINY_CONVERTED))
    stored = QuantizationConfig("nf4", 32, True)
    direct = load_base(source, quantization=stored, dtype="bfloat16")
    # Written by tests/reference/make_converted_golden.py before this code was.
    earlier = load_base(GOLDEN / "converted_tiny", quantization=stored, dtype="bfloat16")
    assert_same(earlier.tensors, direct.tensors)
    assert earlier.config.source == TINY_CONVERTED


def test_companion_files_are_kept(tmp_path: Path):
    source = write_model(tmp_path / "hf")
    kept = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"]
    for name in kept:
        (source / name).write_text(name)
    (source / "training_args.txt").write_text("no")
    convert(source, tmp_path / "out", NF4, "bfloat16")
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert names == {*kept, "config.json", MANIFEST_NAME, "part-00000"}
    assert all((tmp_path / "out" / name).read_text() == name for name in kept)


def test_loaded_buffers_are_not_copied():
    stack = loading._Stack(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16))
    if jax.default_backend() != "cpu":
        pytest.skip("host memory is used in place on CPU only")
    address = stack._buffers[0].ctypes.data
    for layer in range(3):
        stack.write(layer, stack.leaves(layer, np.full(5, layer, jnp.bfloat16)))
    value = stack.finish()
    assert value.unsafe_buffer_pointer() == address
    assert np.array_equal(np.asarray(value)[:, 0], [0, 1, 2])
    single = loading._Stack(jax.ShapeDtypeStruct((40,), jnp.float32))
    read = aligned_empty((40,), np.float32)
    single.write(None, single.leaves(None, read))
    assert single.finish().unsafe_buffer_pointer() == read.ctypes.data


def test_values_are_read_into_their_buffers():
    stack = loading._Stack(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16))
    if jax.default_backend() != "cpu":
        pytest.skip("host memory is used in place on CPU only")
    place = stack.place(1, 2)
    assert place.shape == (2, 5)
    place[...] = 7
    stack.write(1, [place])
    stack.write(0, [np.zeros((1, 5), jnp.bfloat16)])
    assert np.array_equal(np.asarray(stack.finish())[:, 0], [0, 7, 7])


def test_device_buffers_are_filled_in_place(monkeypatch: pytest.MonkeyPatch):
    # The path of accelerators, run on whatever there is.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    stack = loading._Stack(jax.ShapeDtypeStruct((3, 5), jnp.float32))
    stack.write(0, stack.leaves(0, np.zeros(5, np.float32)))
    stack.write(1, stack.leaves(1, np.full((2, 5), 7, np.float32)))
    assert np.array_equal(stack.finish(), [[0] * 5, [7] * 5, [7] * 5])
    single = loading._Stack(jax.ShapeDtypeStruct((2,), jnp.float32))
    single.write(None, [np.ones(2, np.float32)])
    assert np.array_equal(single.finish(), [1, 1])


# --- what is refused


def test_missing_extra_and_misshaped_tensors_are_named(tmp_path: Path):
    tensors = random_tensors(BIASED_LLAMA)

    def refused(changed: dict[str, np.ndarray], message: str) -> None:
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        source = open_source(write_hf(tmp_path / "hf", BIASED_LLAMA, changed))
        with pytest.raises(UserError, match=message):
            check_source(source, models.base_tensors(models.model_config(BIASED_LLAMA)), NF4)
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "hf", tmp_path / "out", NF4, "bfloat16")
        assert not (tmp_path / "out").exists()

    name = "model.layers.1.mlp.up_proj.weight"
    refused({k: v for k, v in tensors.items() if k != name}, rf"hf lacks 1 tensor \({name}\)")
    without_mlp = {k: v for k, v in tensors.items() if ".mlp." not in k}
    refused(without_mlp, r"hf lacks 9 tensors \(model\.layers\.0\.mlp\..*, \.\.\.\)")
    refused(tensors | {"model.extra.weight": tensors[name]}, r"safetensors holds 1 tensor \(model\.extra\.weight\)")
    refused(tensors | {name: tensors[name].T.copy()}, rf"{name} \[64, 192\] instead of \[192, 64\]")


def test_tensors_that_carry_nothing_are_passed_over(tmp_path: Path):
    config = {**BIASED_LLAMA, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    specs = models.base_tensors(models.model_config(config))
    check_source(open_source(write_hf(tmp_path, config, tensors)), specs)
    assert {spec.name for spec in specs} == set(hf_shapes(config))


def test_block_size_that_does_not_divide_a_row(source: Path, tmp_path: Path):
    message = r"`block_size=128` does not divide the \d+ inputs of model\.layers\.0\..*; choose a power of two"
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", QuantizationConfig("nf4", 128), "bfloat16")
    with pytest.raises(UserError, match=message):
        load_base(source, quantization=QuantizationConfig("nf4", 128), dtype="bfloat16")
    load_base(source, quantization=QuantizationConfig("int8", 128), dtype="bfloat16")


def test_weights_that_are_not_finite_are_named(tmp_path: Path):
    name = "model.layers.2.self_attn.o_proj.weight"
    bad = random_tensors(BIASED_LLAMA)[name]
    bad[3, 5] = np.nan
    source = write_model(tmp_path / "hf", **{name: bad})
    with pytest.raises(UserError, match=rf"{name} in .*model-.*safetensors: .* NaN or infinity"):
        convert(source, tmp_path / "out", NF4, "bfloat16")
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.2.self_attn.v_proj.bias",
    ],
)
def test_so_are_other_tensors(tmp_path: Path, name: str, value: float):
    bad = random_tensors(BIASED_LLAMA)[name]
    bad.reshape(-1)[-1] = value
    source = write_model(tmp_path / "hf", **{name: bad})
    with pytest.raises(UserError, match=rf"tensor {name} in .*model-.*safetensors holds NaN or infinity"):
        load_base(source, quantization=NF4, dtype="bfloat16")


@pytest.mark.parametrize(
    ("quantization", "path", "leaf"),
    [
        (NF4, ("embed_tokens", "weight"), None),
        (NF4, ("layers", "mlp", "up_proj", "weight"), "nested_absmax"),
        (NF4, ("layers", "mlp", "up_proj", "weight"), "offset"),
        (CONFIGS[1], ("layers", "self_attn", "q_proj", "weight"), "absmax"),
        (CONFIGS[2], ("layers", "self_attn", "q_proj", "weight"), "absmax"),
        (CONFIGS[3], ("layers", "self_attn", "q_proj", "weight"), None),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_so_are_those_of_a_conversion(
    tmp_path: Path,
    source: Path,
    quantization: QuantizationConfig,
    path: tuple[str, ...],
    leaf: str | None,
    value: float,
):
    """With digests that fit, as of a program that wrote them so."""
    directory = convert(source, tmp_path / "out", quantization, "bfloat16").directory
    part = directory / "part-00000"
    tree = jax.tree.map(lambda array: np.array(array), ocp.load(part))
    holder = functools.reduce(lambda node, name: node[name], path if leaf else path[:-1], tree)
    holder[leaf or path[-1]].reshape(-1)[-1] = value
    shutil.rmtree(part)
    conversion._save_tree(part, tree)
    manifest = read_checked_json(directory / MANIFEST_NAME)
    (described,) = manifest["parts"]
    described["files"] = file_sizes(part)
    described["digests"] = {name: file_digest(part / name) for name in described["files"]}
    write_checked_json(directory / MANIFEST_NAME, manifest)
    with pytest.raises(UserError, match=rf"tensor {'.'.join(path)} in .*part-00000 holds NaN or infinity"):
        load_base(directory, quantization=quantization, dtype="bfloat16")


def test_overflow_of_float16_is_named(tmp_path: Path):
    name = "model.embed_tokens.weight"
    source = write_model(tmp_path, **{name: np.full(hf_shapes(BIASED_LLAMA)[name], 1e5).astype("bfloat16")})
    with pytest.raises(UserError, match=rf"tensor {name} .* do not fit float16; use bfloat16"):
        load_base(source, quantization=NF4, dtype="float16")


def test_other_quantisation_than_asked(converted: Conversion):
    wanted = r"converted to nf4 in blocks of 64 with double quantisation, but {} is asked for"
    for config, text in (
        (QuantizationConfig("nf4", 64, False), "nf4 in blocks of 64 without double quantisation"),
        (QuantizationConfig("nf4", 128, True), "nf4 in blocks of 128 with double quantisation"),
        (QuantizationConfig("none"), "16-bit weights"),
        (QuantizationConfig("int8"), "int8"),
    ):
        with pytest.raises(UserError, match=wanted.format(text)):
            load_base(converted.directory, quantization=config, dtype="bfloat16")


def test_damaged_conversion(tmp_path: Path, converted: Conversion):
    good = converted.directory
    manifest = read_checked_json(good / MANIFEST_NAME)

    def refused(message: str, **changes: Any) -> None:
        directory = tmp_path / "bad"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(good, directory)
        for name, content in changes.pop("files", {}).items():
            if content is None:
                shutil.rmtree(directory / name)
            else:
                (directory / name).write_text(content)
                if name in manifest["files"]:
                    changes["files"] = {**manifest["files"], name: file_digest(directory / name)}
        if changes:
            write_checked_json(directory / MANIFEST_NAME, {**manifest, **changes})
        with pytest.raises(UserError, match=message):
            load_base(directory, quantization=NF4, dtype="bfloat16")

    refused(r"qlora_jax\.json is not valid JSON", files={MANIFEST_NAME: "{"})
    refused(r"version 99, not", format_version=99)
    refused(
        r"qlora_jax\.json: quantization\.quant_type should be",
        quantization={**manifest["quantization"], "quant_type": 4},
    )
    refused(r"qlora_jax\.json: quantization should have block_size, double_quant", quantization={"bits": 4})
    refused(r"disagree about", parts=[])
    refused(r"disagree about", files={"config.json": json.dumps({**BIASED_LLAMA, "num_hidden_layers": 2})})
    smaller = json.dumps({**BIASED_LLAMA, "vocab_size": 95})
    refused(r"tensor embed_tokens\.weight in .*part-00000 is bfloat16\[96, 64\] instead of bfloat16\[95, 64\]",
            files={"config.json": smaller})  # fmt: skip
    refused(r"bad/part-00000/.* is missing or does not have its \d+ bytes", files={"part-00000": None})
    for file in (file for file in good.rglob("part-00000/**/*") if file.is_file() and file.stat().st_size):
        name = str(file.relative_to(good))
        refused(rf"bad/{name} is missing or does not have its \d+ bytes", files={name: "cut"})
    part = manifest["parts"][0]
    shutil.copytree(good / part["name"], tmp_path / "elsewhere")
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), "..", "", ".", "part-00000/..", 7):
        refused(r"qlora_jax\.json: parts\.0\.name should be", parts=[{**part, "name": name}])
    for file in ("../config.json", str(good / "config.json")):
        sizes = {file: (good / "config.json").stat().st_size}
        refused(r"qlora_jax\.json: parts\.0\.files.* should be a path below", parts=[{**part, "files": sizes}])
    layered = next(i for i, tensor in enumerate(part["tensors"]) if tensor["first_layer"] == 0)
    for change, message in (
        ({"first_layer": -1}, r"tensors\.\d+\.first_layer.* should "),
        ({"first_layer": "0"}, r"tensors\.\d+\.first_layer.* should "),
        ({"layers": 10**12}, r"tensors\.\d+\.layers.* should "),
        ({"path": []}, r"tensors\.\d+\.path.* should "),
        ({"path": [0]}, r"tensors\.\d+\.path.* should "),
        ({"first_layer": None}, r"should have one layer without first_layer"),
        ({"first_layer": 1}, r"disagree about layers\."),
        ({"layers": 2}, r"disagree about layers\."),
    ):
        # As in format 1, without digests that a changed number of layers would contradict.
        bare = [{key: value for key, value in tensor.items() if key != "digests"} for tensor in part["tensors"]]
        tensors = [{**tensor, **(change if i == layered else {})} for i, tensor in enumerate(bare)]
        refused(rf"qlora_jax\.json.*{message}", parts=[{**part, "tensors": tensors}])
    refused(r"qlora_jax\.json: .* is stored twice", parts=[{**part, "tensors": part["tensors"] * 2}])
    undigested = dict(list(part["digests"].items())[1:])
    refused(r"parts\.0.* should have a digest for each of its files", parts=[{**part, "digests": undigested}])
    empty = {**part, "files": {}, "digests": {}}
    refused(r"bad/part-00000 is damaged or missing", parts=[empty], files={"part-00000": None})


def test_a_load_that_fails_leaves_no_thread(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "_PART_BYTES", 9000)
    out = convert(source, tmp_path / "out", NF4, "bfloat16").directory

    def no_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(loading._Stack, "write", no_memory)
    threads = threading.active_count()
    with pytest.raises(MemoryError) as failure:  # whose traceback keeps what was at work
        load_base(out, quantization=NF4, dtype="bfloat16")
    assert failure.tb is not None and threading.active_count() == threads


def test_a_conversion_is_not_converted_again(tmp_path: Path, converted: Conversion):
    with pytest.raises(UserError, match="out is already converted"):
        convert(converted.directory, tmp_path / "again", NF4, "bfloat16")


def test_output_directory_in_use(tmp_path: Path):
    source = write_model(tmp_path / "hf")
    out = tmp_path / "out"
    out.mkdir()
    convert(source, out, NF4, "bfloat16")
    with pytest.raises(UserError, match="out already holds a converted model; set `overwrite`"):
        convert(source, out, NF4, "bfloat16")
    fp4 = CONFIGS[1]
    convert(source, out, fp4, "bfloat16", overwrite=True)
    assert load_base(out, quantization=fp4, dtype="bfloat16").quantization == fp4
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]
    for overwrite in (False, True):
        with pytest.raises(UserError, match="hf exists and is not a converted model"):
            convert(source, source, NF4, "bfloat16", overwrite=overwrite)


def test_two_conversions_at_once(tmp_path: Path):
    source = write_model(tmp_path / "hf")
    staging = tmp_path / ".out.tmp"
    staging.mkdir()
    other = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            convert(source, tmp_path / "out", NF4, "bfloat16")
    finally:
        os.close(other)
    convert(source, tmp_path / "out", NF4, "bfloat16")


def test_too_little_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Usage(NamedTuple):
        free: int

    source = write_model(tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000))
    with pytest.raises(UserError, match=r"^the converted model takes 0\.\d MB or more and the disk of .* has 0\.0 MB"):
        convert(source, tmp_path / "out", NF4, "bfloat16")
    assert os.listdir(tmp_path) == ["hf"]


# --- interruption, space and memory, in processes of their own

RUNNER = """
import json, os, resource, signal, sys
from qlora_jax import files, models
from qlora_jax.checkpoints import conversion, loading, streaming
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.errors import UserError

models.model_config(models.PRESETS["llama-7b"])  # imports transformers, some 100 MiB whatever the model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

baseline = peak()
source, out = sys.argv[1:3]
"""


def run_python(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUNNER + textwrap.dedent(code), *map(str, arguments)]
    # The CPU backend: what a GPU driver maps into the process is not ours to bound.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, env=environment)


@pytest.mark.e2e
def test_killed_at_any_point_leaves_nothing_that_looks_complete(source: Path, direct: Any, tmp_path: Path):
    out = tmp_path / "out"
    # One process per death, forked before JAX starts any thread: importing it takes seconds.
    kill = """
    conversion._PART_BYTES = 9000
    flush = files.flush_to_disk
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    def convert(when):
        def progress(done, total):
            if done == when:
                die()
        if when == "published":
            files.flush_to_disk = lambda path: die() if str(path).endswith(".out.tmp") else flush(path)
        conversion.convert(source, out, QuantizationConfig(), "bfloat16", progress=progress)
    for when in (1, int(sys.argv[3]) // 2, int(sys.argv[3]), "published"):
        child = os.fork()
        if child == 0:
            convert(when)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        staged = sorted(os.listdir(os.path.join(os.path.dirname(out), ".out.tmp")))
        print(json.dumps([-os.waitstatus_to_exitcode(status), os.path.exists(out), staged]), flush=True)
    """
    done = run_python(kill, source, out, len(hf_shapes(BIASED_LLAMA)))
    assert done.returncode == 0, done.stderr
    deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(signal, exists) for signal, exists, _ in deaths] == [(9, False)] * 4
    assert [MANIFEST_NAME in staged for *_, staged in deaths] == [False, False, False, True]
    assert all("config.json" in staged for *_, staged in deaths)
    with pytest.raises(UserError, match="does not exist"):
        load_base(out, quantization=NF4, dtype="bfloat16")
    convert(source, out, NF4, "bfloat16")
    assert os.listdir(tmp_path) == ["out"]
    assert_same(load_base(out, quantization=NF4, dtype="bfloat16").tensors, direct(NF4).tensors)


@pytest.mark.e2e
def test_disk_that_fills_up(source: Path, tmp_path: Path):
    done = run_python(
        """
        # A limit on the size of files is the full disk that a test can have.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            conversion.convert(source, out, QuantizationConfig(), "bfloat16")
        except UserError as error:
            print(error)
        """,
        source,
        tmp_path / "out",
    )
    assert re.search(r"part-00000 cannot be written: .*; free some space", done.stdout), done.stdout + done.stderr
    assert os.listdir(tmp_path) == []


MEASURE = """
mib = 1 << 20
conversion._PART_BYTES = int(sys.argv[3]) * mib
result = conversion.convert(source, out, QuantizationConfig(), "bfloat16")
converting = peak()
loaded = loading.load_base(out, quantization=QuantizationConfig(), dtype="bfloat16")
print((converting - baseline) / mib, (peak() - baseline) / mib, sum(streaming.inventory(loaded.tensors).values()) / mib)
"""


def large_config(hidden: int, ffn: int, layers: int) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": ffn, "vocab_size": ffn, "num_hidden_layers": layers}
    return {**BIASED_LLAMA, **shape, "attention_bias": False, "tie_word_embeddings": True}


class Memory(NamedTuple):
    """MiB of the model, its largest tensor, peaks of `convert` and then `load_base`, and the model as loaded."""

    model: float
    largest: float
    converting: float
    loading: float
    loaded: float


def measure_memory(tmp_path: Path, config: dict[str, Any], shards: int, dtype: str, part: int) -> Memory:
    """Convert a model of that type in parts of `part` MiB, and load it."""
    total = write_large_hf(tmp_path / "hf", config, shards, dtype)
    width = np.dtype(dtype).itemsize
    largest = max(width * int(np.prod(shape)) for shape in hf_shapes(config).values())
    done = run_python(MEASURE, tmp_path / "hf", tmp_path / "out", part)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "hf")
    shutil.rmtree(tmp_path / "out")
    return Memory(total / 2**20, largest / 2**20, *map(float, done.stdout.split()))


@pytest.mark.e2e
def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    # float32, and small parts: a model that outweighs everything else with half the numbers to quantise.
    memory = measure_memory(tmp_path, large_config(1024, 8192, 8), 3, "float32", 16)
    ceiling = 3 * memory.largest + 300
    assert memory.model > 2 * ceiling
    assert memory.converting < ceiling
    assert memory.loading < memory.loaded + ceiling


@pytest.mark.slow
def test_memory_ceiling_of_a_model_several_times_its_size(tmp_path: Path):
    memory = measure_memory(tmp_path, large_config(2048, 16384, 26), 5, "bfloat16", conversion._PART_BYTES >> 20)
    ceiling = 3 * memory.largest + 1024
    assert memory.largest == 64
    assert memory.model > 4 * ceiling
    assert memory.converting < ceiling
    assert memory.loading < memory.loaded + ceiling


# --- the command


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    source = write_model(tmp_path / "hf")
    script = [sys.executable, str(ROOT / "scripts" / "convert.py"), str(source), str(tmp_path / "out")]
    flags = ["--quant_type", "fp4", "--double_quant", "False", "--block_size", "32"]
    done = subprocess.run([*script, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "5.000 bits a quantised parameter" in done.stdout
    assert "base packed" in done.stdout
    model = load_base(tmp_path / "out", quantization=QuantizationConfig("fp4", 32, False), dtype="bfloat16")
    assert isinstance(model.tensors["layers", "mlp", "up_proj", "weight"], QuantizedTensor)
    # Without the child's imports, which take seconds.
    monkeypatch.setattr(sys, "argv", ["convert.py", str(source), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: .*out already holds a converted model; set --overwrite.*\n", said), said
