"""Checkpoints of every family, from each format, give the model that transformers computed (golden files)."""

from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import families, tiny_model
from fixtures.checkpoint_helpers import write_hf
from make_family_gguf import write_family_gguf

from qlora_jax import models
from qlora_jax.checkpoints.conversion import convert
from qlora_jax.checkpoints.loading import LoadedBase, load_base
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.checkpoints.tokenizer import ensure_pad, load_tokenizer
from qlora_jax.errors import UserError
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.quantization import QuantizationConfig

PLAIN = tiny_model.PLAIN
NF4 = QuantizationConfig("nf4", 32, True)
# llama.cpp's format keeps neither sliding windows of Qwen2 nor any scale of the scores but that of head_dim.
IN_GGUF = ("gemma3_gguf", "qwen2_tied", "qwen2_untied", "qwen3")


def load(path: Path, quantization: QuantizationConfig = PLAIN) -> LoadedBase:
    return load_base(path, quantization=quantization, dtype="float32")


def logits(base: LoadedBase, input_ids: np.ndarray) -> np.ndarray:
    qlora = QLoRAConfig(base.quantization, jnp.float32)
    graphdef, lora, frozen = models.split_model(models.abstract_model(base.config, qlora))
    return tiny_model.logits(graphdef, lora, models.fill_base(frozen, base.tensors), input_ids)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face directory of every case, in two shards, with the config.json that the hub has."""
    root = tmp_path_factory.mktemp("families")
    written = {}
    for name in families.CASES:
        config = list(families.configs(name).values())[-1]
        written[name] = write_hf(root / name, config, families.weights(name), shards=2)
    return written


@pytest.mark.parametrize("name", families.CASES)
def test_safetensors_give_transformers_logits(directories: dict[str, Path], name: str):
    golden = families.arrays(name)
    np.testing.assert_allclose(
        logits(load(directories[name]), golden["input_ids"]), golden["logits"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_gives_transformers_logits(tmp_path: Path, name: str):
    golden = families.arrays(name)
    base = load(write_family_gguf(tmp_path / "m.gguf", families.CASES[name]))
    np.testing.assert_allclose(logits(base, golden["input_ids"]), golden["logits"], atol=1e-4, rtol=0)


def test_every_family_is_read_from_gguf():
    def titles(names: Any) -> set[str]:
        return {families.title(name) for name in names}

    assert titles(IN_GGUF) == titles(families.CASES)


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_has_the_tensors_of_the_safetensors(tmp_path: Path, name: str):
    source = open_source(write_family_gguf(tmp_path / "m.gguf", families.CASES[name]))
    weights = families.weights(name)
    assert set(source.names()) == weights.keys()
    for tensor, values in weights.items():
        # Adding one to a norm and taking it off costs its last bits.
        tolerance = 2**-24 if name.startswith("gemma") and "norm" in tensor else 0
        np.testing.assert_allclose(source.read(tensor), values, atol=tolerance, rtol=0)
        assert source.dtype(tensor) == "float32"


@pytest.mark.parametrize("name", families.ONE_A_FAMILY)
def test_converted_equals_loaded(directories: dict[str, Path], tmp_path: Path, name: str):
    result = convert(directories[name], tmp_path / "out", NF4, "float32")
    converted, direct = load(tmp_path / "out", NF4), load(directories[name], NF4)
    assert converted.tensors.keys() == direct.tensors.keys()
    for path, value in direct.tensors.items():
        for ours, theirs in zip(jax.tree.leaves(converted.tensors[path]), jax.tree.leaves(value), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert converted.config == direct.config
    assert converted.config.source == direct.config.source
    left_out = ("vision_tower.", "multi_modal_projector.")
    kept = {tensor: value for tensor, value in families.weights(name).items() if not tensor.startswith(left_out)}
    assert (result.tensors, result.parameters) == (len(kept), sum(value.size for value in kept.values()))


@pytest.mark.parametrize("name", IN_GGUF)
def test_converted_gguf_keeps_its_tokenizer(tmp_path: Path, name: str):
    source = write_family_gguf(tmp_path / "m.gguf", families.CASES[name])
    convert(source, tmp_path / "out", NF4, "float32")
    ours, theirs = load_tokenizer(tmp_path / "out"), load_tokenizer(source)
    for text in (
        "the others and you, a  b\n",
        "<start_of_turn>user\nthe<end_of_turn>",
        "<|im_start|>user the<|im_end|>",
    ):
        assert ours(text).input_ids == theirs(text).input_ids
    messages = [{"role": "user", "content": "the other"}]
    chat = theirs.apply_chat_template(messages, tokenize=False)
    assert "the other" in chat
    assert ours.apply_chat_template(messages, tokenize=False) == chat
    assert ensure_pad(ours).pad_token_id not in (ours.eos_token_id, None)


def test_parts_that_are_left_out_are_said(directories: dict[str, Path], tmp_path: Path):
    name = "gemma3_conditional"
    assert load(directories[name]).description.endswith("; left out: the vision tower and its projector")
    convert(directories[name], tmp_path / "out", NF4, "float32")
    assert "left out: the vision tower and its projector" in load(tmp_path / "out", NF4).description
    assert "left out" not in load(directories["gemma3"]).description


def test_names_of_other_versions_of_transformers(directories: dict[str, Path], tmp_path: Path):
    name = "gemma3_conditional"
    old, new = "language_model.model.", "model.language_model."
    tensors = {
        new + tensor.removeprefix(old) if tensor.startswith(old) else f"model.{tensor}": value
        for tensor, value in families.weights(name).items()
    }
    config = families.CASES[name]["config"]
    renamed, direct = load(write_hf(tmp_path / "new", config, tensors)), load(directories[name])
    assert renamed.tensors.keys() == direct.tensors.keys()
    for path, value in direct.tensors.items():
        np.testing.assert_array_equal(renamed.tensors[path], value)
    assert "left out: the vision tower and its projector" in renamed.description
    both = tensors | {f"{old}norm.weight": tensors[f"{new}norm.weight"]}
    with pytest.raises(UserError, match=r"holds tensor language_model\.model\.norm\.weight under two names"):
        open_source(write_hf(tmp_path / "both", config, both))


@pytest.mark.parametrize("head", ["language_model.lm_head.weight", "lm_head.weight"])
def test_a_head_of_its_own_is_read_under_both_names(tmp_path: Path, head: str):
    """transformers wrote Gemma 3's head beside the text part's layers, and writes it at the top."""
    case = "gemma3_conditional"
    config = {**families.CASES[case]["config"], "tie_word_embeddings": False}
    tensors = families.weights(case)
    own = tensors["language_model.model.embed_tokens.weight"] * np.float32(2)
    loaded = load(write_hf(tmp_path / "m", config, {**tensors, head: own}))
    np.testing.assert_array_equal(loaded.tensors["lm_head", "weight"], own)
    both = {**tensors, "lm_head.weight": own, "language_model.lm_head.weight": own}
    with pytest.raises(UserError, match=r"holds tensor language_model\.lm_head\.weight under two names"):
        load(write_hf(tmp_path / "both", config, both))


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        (None, "sssssfs"),
        (6, "sssssfs"),
        (3, "ssfssfs"),
        (1, "fffffff"),
        ([True, False, True, True, False, True, True], "sfssfss"),
    ],
)
def test_layers_of_a_gemma_gguf_slide_as_in_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: Any, kinds: str
):
    add = gguf.GGUFWriter.add_file_type

    def with_pattern(self: gguf.GGUFWriter, kind: Any) -> None:
        key = "gemma3.attention.sliding_window_pattern"
        if pattern is not None:
            self.add_array(key, pattern) if isinstance(pattern, list) else self.add_uint32(key, pattern)
        add(self, kind)

    monkeypatch.setattr(gguf.GGUFWriter, "add_file_type", with_pattern)
    case = families.CASES["gemma3_gguf"]
    config = open_source(write_family_gguf(tmp_path / "m.gguf", case)).config
    assert "".join("f" if facts.window is None else "s" for facts in config.attentions) == kinds


def test_a_gemma_gguf_of_an_older_converter(tmp_path: Path):
    """Without a key for the local rotary table, it is the one that llama.cpp takes."""
    case = families.CASES["gemma3_gguf"]
    older = open_source(write_family_gguf(tmp_path / "older.gguf", case, rope_freq_base_swa=False))
    newer = open_source(write_family_gguf(tmp_path / "newer.gguf", case))
    assert older.config == newer.config


def test_gguf_metadata_that_a_family_does_not_implement(tmp_path: Path):
    case = families.CASES["gemma3_gguf"]
    capped = {**case, "config": {**case["config"], "final_logit_softcapping": 30.0}}
    with pytest.raises(UserError, match=r"final_logit_softcapping = 30\.0"):
        open_source(write_family_gguf(tmp_path / "m.gguf", capped))
