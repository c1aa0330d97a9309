"""Tokenizers rebuilt from GGUF metadata cut text as transformers, llama.cpp and sentencepiece do."""

import io
import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from fixtures.checkpoint_helpers import random_tensors, write_gguf
from fixtures.tiny_configs import BIASED_LLAMA

from qlora_jax.checkpoints.hub import default_gguf_path
from qlora_jax.checkpoints.tokenizer import ensure_pad, load_tokenizer
from qlora_jax.errors import UserError

# Made by tests/reference/make_tokenizer_golden.py.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_tokenizer.json").read_text())
TEXTS = GOLDEN["texts"]
# Made by tests/reference/make_gguf_tokenizer_golden.py.
OTHERS = json.loads((Path(__file__).parents[1] / "golden" / "gguf_tokenizers.json").read_text())
NO_PREFIX = {"tokenizer.ggml.add_space_prefix": False}


def gguf_with(path: Path, tokenizer: dict[str, Any] | None, extra: dict[str, Any] | None = None) -> Path:
    return write_gguf(path, BIASED_LLAMA, random_tensors(BIASED_LLAMA), tokenizer, extra=extra)


def ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_with(tmp_path_factory.mktemp("gguf") / "small.gguf", GOLDEN["small"]["tokenizer"])


def test_byte_level_ids_equal_the_reference(small: Path):
    tokenizer = load_tokenizer(small)
    assert ids(tokenizer) == GOLDEN["small"]["ids"]
    assert [tokenizer.decode(row) for row in ids(tokenizer)] == TEXTS


def test_special_tokens_and_chat_template(small: Path):
    tokenizer = load_tokenizer(small)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer("a b").input_ids == tokenizer("a b", add_special_tokens=False).input_ids
    chat = tokenizer.apply_chat_template(GOLDEN["small"]["messages"], tokenize=False)
    assert chat == GOLDEN["small"]["chat"]


def test_saved_and_read_back(small: Path, tmp_path: Path):
    original = load_tokenizer(small)
    original.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert ids(again) == ids(original)
    assert again.chat_template == original.chat_template
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (
        original.bos_token_id,
        original.eos_token_id,
        original.pad_token_id,
    )


def test_real_smollm2():
    if not default_gguf_path().is_file():
        pytest.skip("SmolLM2 is not cached; python scripts/finetune.py downloads it")
    assert ids(load_tokenizer(default_gguf_path())) == GOLDEN["full"]


def test_sentencepiece_ids_equal_sentencepiece(tmp_path: Path):
    tokenizer = load_tokenizer(gguf_with(tmp_path / "sp.gguf", GOLDEN["sentencepiece"]["tokenizer"]))
    assert ids(tokenizer) == GOLDEN["sentencepiece"]["ids"]
    # LLaMA's tokenizers start a text with BOS unless the file says otherwise.
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    text = "two  spaces, naïve 한국어 🙂\n\tx"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(("name", "extra"), [("qwen2", {"tokenizer.ggml.add_bos_token": False}), ("gemma", NO_PREFIX)])
def test_ids_equal_those_of_other_families(tmp_path: Path, name: str, extra: dict[str, Any]):
    golden, texts = OTHERS[name], OTHERS["texts"]
    original = load_tokenizer(gguf_with(tmp_path / "m.gguf", golden["tokenizer"], extra))
    original.save_pretrained(tmp_path / "hf")
    for tokenizer in (original, load_tokenizer(tmp_path / "hf")):
        assert [tokenizer(text, add_special_tokens=False).input_ids for text in texts] == golden["ids"]
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id or name == "qwen2"
        for text, row in zip(texts, golden["ids"], strict=True):
            # U+2581 stands for a space in sentencepiece's vocabulary, and Qwen composes what is decomposed.
            want = text.replace("\u2581", " ") if name == "gemma" else unicodedata.normalize("NFC", text)
            assert tokenizer.decode(row) == want


def test_a_tokenizer_that_cannot_be_rebuilt(tmp_path: Path):
    """A space in front of every text cannot be told from one that belongs to a user-defined token."""
    with pytest.raises(UserError, match=r"user-defined tokens with spaces .* cannot be rebuilt faithfully"):
        load_tokenizer(gguf_with(tmp_path / "m.gguf", OTHERS["gemma"]["tokenizer"]))


def test_pad_is_never_eos(small: Path):
    tokenizer = load_tokenizer(small)
    size = len(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert ensure_pad(tokenizer) is tokenizer
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == size


def test_pad_prefers_what_the_vocabulary_reserves_for_it(tmp_path: Path):
    tokenizer = {**GOLDEN["small"]["tokenizer"]}
    tokens = list(tokenizer["tokens"])
    tokens[tokens.index("<gh_stars>")] = "<|finetune_right_pad_id|>"
    tokenizer["tokens"] = tokens
    assert (
        ensure_pad(load_tokenizer(gguf_with(tmp_path / "m.gguf", tokenizer))).pad_token == "<|finetune_right_pad_id|>"
    )


def test_pad_without_any_candidate(tmp_path: Path):
    tokenizer = {**GOLDEN["small"]["tokenizer"]}
    special = tokenizer["special"]
    keep = {special["bos"], special["eos"]}
    tokenizer["types"] = [k if k == 1 or i in keep else 1 for i, k in enumerate(tokenizer["types"])]
    tokenizer["special"] = {"bos": special["bos"], "eos": special["eos"]}
    loaded = load_tokenizer(gguf_with(tmp_path / "m.gguf", tokenizer))
    with pytest.raises(UserError, match="no special token to pad with"):
        ensure_pad(loaded)


def test_no_eos(small: Path, tmp_path: Path):
    tokenizer = {**GOLDEN["small"]["tokenizer"], "special": {"bos": 1}}
    with pytest.raises(UserError, match=r"m\.gguf has no end-of-sequence token; set tokenizer\.ggml\.eos_token_id"):
        load_tokenizer(gguf_with(tmp_path / "m.gguf", tokenizer))
    load_tokenizer(small).save_pretrained(tmp_path / "hf")
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "eos_token"}))
    with pytest.raises(UserError, match=r"set eos_token in tokenizer_config\.json"):
        load_tokenizer(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, r"tokenizer\.ggml\.model 'bert'"),
        ({"pre": "martian"}, r"tokenizer\.ggml\.pre 'martian'"),
        ({"merges": ["a b c"]}, r"malformed tokenizer\.ggml\.merges"),
        ({"merges": ["qx zy"]}, r"do not belong together"),
        ({"special": {"eos": 10**6}}, r"eos_token_id 1000000"),
        ({"model": "llama", "scores": None}, r"malformed tokenizer\.ggml\.scores"),
    ],
)
def test_unsupported_metadata_is_named(tmp_path: Path, change: dict[str, Any], message: str):
    tokenizer = {**GOLDEN["small"]["tokenizer"], **change}
    with pytest.raises(UserError, match=message):
        load_tokenizer(gguf_with(tmp_path / "m.gguf", tokenizer))


def test_no_tokenizer(tmp_path: Path):
    with pytest.raises(UserError, match=r"m\.gguf has no tokenizer"):
        load_tokenizer(gguf_with(tmp_path / "m.gguf", None))
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="hf has no tokenizer that can be read"):
        load_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="hf has no tokenizer that can be read"):
        load_tokenizer(tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf")


EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PreTrainedTokenizerFast as Evil
"""


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_of_a_model_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str, model_type: str
):
    marker, model = tmp_path / "evil-ran", tmp_path / "model"
    model.mkdir()
    (model / "evil.py").write_text(EVIL.format(marker=str(marker)))
    auto_map = {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (model / "tokenizer_config.json").write_text("{}")
    (model / "config.json").write_text(json.dumps({"model_type": model_type}))
    (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | auto_map))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    with pytest.raises(UserError, match=rf"{file} has auto_map: .* never run; add its tokenizer\.json\.$"):
        load_tokenizer(model)
    assert not marker.exists()
    assert capsys.readouterr().out == ""  # no question
