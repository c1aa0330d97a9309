"""GGUF files of merged models, read back with this program's own reader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import families
from fixtures.checkpoint_helpers import random_tensors, write_gguf, write_hf
from fixtures.tiny_configs import BIASED_LLAMA, LLAMA
from fixtures.trained_adapters import random_adapter
from gguf import GGMLQuantizationType
from make_family_gguf import write_family_gguf

from qlora_jax import models
from qlora_jax.checkpoints.base_weights import BaseStorage, open_base
from qlora_jax.checkpoints.gguf_file import read_header, read_metadata
from qlora_jax.checkpoints.gguf_source import GGUFSource
from qlora_jax.checkpoints.gguf_tokenizer import tokenizer_metadata
from qlora_jax.checkpoints.gguf_writer import GGUF_FORMATS, decode, encode, model_metadata
from qlora_jax.checkpoints.gguf_writer import write_gguf as export_gguf
from qlora_jax.checkpoints.merging import merged_tensors
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.errors import UserError

TOKENIZERS = json.loads((families.GOLDEN.parent / "smollm2_tokenizer.json").read_text())
OTHERS = json.loads((families.GOLDEN.parent / "gguf_tokenizers.json").read_text())
LLAMA_3 = {
    **BIASED_LLAMA,
    "hidden_size": 128,
    "head_dim": 32,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
YARN = {
    **LLAMA,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
}
LINEAR = {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
LLAMAS = {"llama": BIASED_LLAMA, "llama3": LLAMA_3, "yarn": YARN, "linear": LINEAR}
IN_GGUF = ("gemma3_gguf", "qwen2_tied", "qwen2_untied", "qwen3")
SMALL = {"bos": 0, "eos": 1, "unk": 2}


def llama_tokenizer() -> dict[str, Any]:
    tokens = ["<s>", "</s>", "<|x|>", *map(chr, range(97, 123))]
    types = [3, 3, 3] + [1] * 26
    return {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "types": types, "merges": ["a b"], "special": SMALL}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face directory with a tokenizer, of each family."""
    root, found = tmp_path_factory.mktemp("bases"), {}
    for name in IN_GGUF:
        case = families.CASES[name]
        found[name] = write_hf(root / name, case["config"], families.weights(name))
        load_tokenizer(write_family_gguf(root / f"{name}.gguf", case)).save_pretrained(found[name])
    for name, config in LLAMAS.items():
        tensors = random_tensors(config, "float32")
        found[name] = write_hf(root / name, config, tensors)
        tokenizer = llama_tokenizer()
        tokenizer["tokens"][-1] = "ab"
        written = write_gguf(root / f"{name}.gguf", config, tensors, tokenizer)
        load_tokenizer(written).save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", [*IN_GGUF, *LLAMAS])
@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_reader_gives_what_the_writer_wrote(bases: dict[str, Path], tmp_path: Path, name: str, kind: str):
    base = open_base(bases[name], "original", BaseStorage())
    adapter = random_adapter(tmp_path / "adapter", base.config)
    storage = GGUF_FORMATS[kind]
    shares = export_gguf(base, adapter, tmp_path / "model.gguf", storage, metadata={"general.name": "tiny"})
    assert len(shares) == 7 * base.config.num_hidden_layers
    source = GGUFSource(tmp_path / "model.gguf")
    assert sorted(source.names()) == sorted(spec.name for spec in base.specs)
    for tensor in merged_tensors(base, adapter):
        spec, value = tensor.spec, tensor.value
        gemma_norm = name.startswith("gemma") and spec.kind == "norm"
        if len(spec.shape) == 1:
            expected = (value.astype(np.float32) + 1) - np.float32(1) if gemma_norm else value
        else:
            stored = storage.linear if spec.quantized else storage.other
            expected = decode(encode(value, stored, spec.name), stored)
        np.testing.assert_array_equal(source.read(spec.name), expected.astype(np.float32), err_msg=spec.name)


@pytest.mark.parametrize("name", [*IN_GGUF, *LLAMAS])
def test_read_back_as_the_same_model(bases: dict[str, Path], name: str):
    config = open_base(bases[name], "original", BaseStorage()).config
    specs = tuple(models.base_tensors(config))
    metadata = model_metadata(config, bases[name], specs)
    assert metadata["general.type"] == "model"
    if name == "llama3":
        shorter = models.model_config({**LLAMA_3, "rope_scaling": {**LLAMA_3["rope_scaling"], "low_freq_factor": 2.0}})
        with pytest.raises(UserError, match="rotary scaling"):
            model_metadata(shorter, bases[name], specs)


@pytest.mark.parametrize("name", IN_GGUF)
def test_metadata_are_those_of_llama_cpps_converter(bases: dict[str, Path], tmp_path: Path, name: str):
    # Which make_family_gguf.py was compared with.
    converted = read_metadata(write_family_gguf(tmp_path / "converter.gguf", families.CASES[name]))
    base = open_base(bases[name], "original", BaseStorage())
    export_gguf(
        base,
        random_adapter(tmp_path / "adapter", base.config),
        tmp_path / "ours.gguf",
        GGUF_FORMATS["F16"],
        metadata={"general.name": "Tiny Random"},
    )
    ours = read_metadata(tmp_path / "ours.gguf")
    added = {"rope.dimension_count", "vocab_size", "attention.key_length", "attention.value_length"}
    different = {key for key in ours.keys() | converted.keys() if ours.get(key) != converted.get(key)}
    architecture = ours["general.architecture"]
    assert {key.removeprefix(f"{architecture}.") for key in different} - added <= {
        "general.file_type",
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.token_type",  # of rows without a token, which the directory's tokenizer has as tokens
    }


def test_types_of_tensors(bases: dict[str, Path], tmp_path: Path):
    base = open_base(bases["qwen2_untied"], "original", BaseStorage())
    adapter = random_adapter(tmp_path / "adapter", base.config)
    for kind, storage in GGUF_FORMATS.items():
        export_gguf(base, adapter, tmp_path / f"{kind}.gguf", storage, metadata={"general.name": "tiny"})
        metadata, entries = read_header(tmp_path / f"{kind}.gguf")
        types = {name: entry.kind for name, entry in entries.items()}
        assert types["blk.0.ffn_up.weight"] == GGMLQuantizationType[kind]
        expected = GGMLQuantizationType.Q8_0 if kind.startswith("Q") else GGMLQuantizationType[kind]
        assert types["token_embd.weight"] == types["output.weight"] == expected
        assert types["blk.0.attn_norm.weight"] == types["blk.0.attn_q.bias"] == GGMLQuantizationType.F32
        assert metadata["general.file_type"] == storage.file_type


@pytest.mark.parametrize("name", ["qwen2_sliding", "gemma3"])
def test_models_that_gguf_cannot_express_are_refused(tmp_path: Path, name: str):
    config = families.config(name)
    with pytest.raises(UserError, match=r"has attentions that a GGUF file cannot express .*export to safetensors"):
        model_metadata(config, tmp_path, tuple(models.base_tensors(config)))


def test_tokenizer_of_a_gguf_file_is_copied(tmp_path: Path):
    written = write_family_gguf(tmp_path / "base.gguf", families.CASES["gemma3_gguf"])
    before = {key: value for key, value in read_metadata(written).items() if key.startswith("tokenizer.")}
    base = open_base(written, "original", BaseStorage())
    export_gguf(
        base,
        random_adapter(tmp_path / "adapter", base.config),
        tmp_path / "new.gguf",
        GGUF_FORMATS["Q8_0"],
        metadata={"general.name": "t"},
    )
    after = {key: value for key, value in read_metadata(tmp_path / "new.gguf").items() if key.startswith("tokenizer.")}
    assert after == before


@pytest.mark.parametrize("name", ["small", "qwen2", "gemma", "sentencepiece"])
def test_tokenizer_of_a_directory_is_written_and_read_back(tmp_path: Path, name: str):
    golden = OTHERS[name] if name in OTHERS else TOKENIZERS[name]
    texts = OTHERS["texts"] if name in OTHERS else TOKENIZERS["texts"]
    extra = {"tokenizer.ggml.add_space_prefix": False} if name == "gemma" else None
    tensors = random_tensors(BIASED_LLAMA)
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", BIASED_LLAMA, tensors, golden["tokenizer"], extra=extra))
    tokenizer.save_pretrained(tmp_path / "directory")
    size = len(golden["tokenizer"]["tokens"]) + 3
    metadata = tokenizer_metadata(tmp_path / "directory", size)
    assert metadata["tokenizer.ggml.tokens"] == [
        *golden["tokenizer"]["tokens"],
        *(f"[PAD{size - i}]" for i in (3, 2, 1)),
    ]
    assert metadata["tokenizer.ggml.token_type"] == [*golden["tokenizer"]["types"], 5, 5, 5]
    described = {
        "model": metadata["tokenizer.ggml.model"],
        "pre": metadata["tokenizer.ggml.pre"],
        "merges": metadata.get("tokenizer.ggml.merges"),
        "scores": metadata.get("tokenizer.ggml.scores"),
        "tokens": metadata["tokenizer.ggml.tokens"],
        "types": metadata["tokenizer.ggml.token_type"],
        "special": golden["tokenizer"]["special"],
    }
    again = load_tokenizer(write_gguf(tmp_path / "b.gguf", BIASED_LLAMA, tensors, described, extra=extra))
    assert [again(text, add_special_tokens=False).input_ids for text in texts] == golden["ids"]


def test_unknown_pre_tokenizers_are_refused(bases: dict[str, Path], tmp_path: Path):
    tokenizer = json.loads((bases["qwen3"] / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text((bases["qwen3"] / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match=r"pre_tokenizer .*Whitespace.*no tokenizer\.ggml\.pre is known"):
        tokenizer_metadata(tmp_path, 400)
    with pytest.raises(UserError, match="an embedding of 10 rows"):
        tokenizer_metadata(bases["qwen3"], 10)
