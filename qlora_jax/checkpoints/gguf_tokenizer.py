"""GGUF metadata of a tokenizer: copied from a GGUF file, or made of a tokenizer.json.

The inverse of `qlora_jax.checkpoints.tokenizer.tokenizer_from_gguf`: what is made here is read back with it and must
give the same ids.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints.gguf_file import read_metadata
from qlora_jax.checkpoints.tokenizer import load_tokenizer, pre_tokenizer_name, tokenizer_from_gguf
from qlora_jax.errors import UserError

_PREFIX = "tokenizer."
# llama.cpp's enum llama_token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
_USE_SAFETENSORS = "export to safetensors, or the adapter alone"

# Texts whose ids must be the same once the metadata are read back: digits, spaces, lines, scripts, signs, contractions.
_PROBES = (
    "Hello world, it's 12345 o'clock. We'LL see: 3.14159",
    "  two  spaces and\ttabs \n\n\n new lines \r\n end  ",
    "naïve café Straße Ǆ한국어 中文字符 русский हिन्दी 🙂👍🏽 e\u0301",
    "def f(x):\n    return {'a': [x ** 2, -1e-5]}  # code != text\n",
    '<tag attr="1"/> https://example.org/a_b?c=d&e=%20 \\alpha §±',
)


def tokenizer_metadata(model: Path, vocab_size: int) -> dict[str, Any]:
    """Return the `tokenizer.*` metadata of a model.

    Args:
        model: GGUF file, whose metadata are taken as they are, or a directory with a tokenizer that is byte-level BPE
            or sentencepiece-like BPE.
        vocab_size: rows of the embedding; ids without a token become unused ones, as llama.cpp's converter makes them.

    Raises:
        UserError: a tokenizer that has no form in GGUF; says what of it.
    """
    if model.is_file():
        return {key: value for key, value in read_metadata(model).items() if key.startswith(_PREFIX)}
    tokenizer = load_tokenizer(model)
    contents = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = contents["model"]["type"]
    if kind != "BPE":
        raise UserError(f"{model} has a tokenizer of type {kind}, for which GGUF has no form here; {_USE_SAFETENSORS}.")
    tokens, types = _tokens(model, contents, vocab_size)
    if contents["model"].get("byte_fallback"):
        made = _sentencepiece(model, contents, tokens, types)
    else:
        made = _byte_level(model, contents)
    made["tokenizer.ggml.tokens"], made["tokenizer.ggml.token_type"] = tokens, types
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, key in special.items():
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            made[f"tokenizer.ggml.{key}_token_id"] = index
    ids = tokenizer("a").input_ids
    made["tokenizer.ggml.add_bos_token"] = ids[0] == tokenizer.bos_token_id
    made["tokenizer.ggml.add_eos_token"] = ids[-1] == tokenizer.eos_token_id
    if template := _chat_template(tokenizer):
        made["tokenizer.chat_template"] = template
    _check_same(model, tokenizer, made)
    return made


def _tokens(model: Path, contents: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the token of every row of the embedding, and its type."""
    unknown = contents["model"].get("unk_token")
    by_id = {index: (token, _NORMAL) for token, index in contents["model"]["vocab"].items()}
    if contents["model"].get("byte_fallback"):
        by_id |= {i: (t, _BYTE) for i, (t, _) in by_id.items() if len(t) == 6 and t.startswith("<0x") and t[-1] == ">"}
    for added in contents["added_tokens"]:
        text = added["content"]
        # llama.cpp looks for such tokens in the text as it was typed.
        kept = text if added["special"] else text.replace(_SPACE, " ")
        by_id[added["id"]] = (kept, _CONTROL if added["special"] else _USER_DEFINED)
    if unknown is not None and not _is_byte_level(contents):
        by_id[contents["model"]["vocab"][unknown]] = (unknown, _UNKNOWN)
    if len(by_id) and max(by_id) >= vocab_size:
        raise UserError(
            f"{model} has a tokenizer with ids up to {max(by_id)}, but an embedding of {vocab_size} rows; use the "
            f"tokenizer that belongs to the model."
        )
    rows = [by_id.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(vocab_size)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def _is_byte_level(contents: Mapping[str, Any]) -> bool:
    return not contents["model"].get("byte_fallback")


def _byte_level(model: Path, contents: Mapping[str, Any]) -> dict[str, Any]:
    pre = pre_tokenizer_name(contents)
    if pre is None:
        cut = json.dumps(contents["pre_tokenizer"])
        raise UserError(
            f"{model} has a tokenizer.json with the pre_tokenizer {cut[:200]}, for which no tokenizer.ggml.pre is "
            f"known; {_USE_SAFETENSORS}."
        )
    if not contents["model"]["merges"]:
        raise UserError(f"{model} has a tokenizer.json without merges, which GGUF files must have; {_USE_SAFETENSORS}.")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in contents["model"]["merges"]],
    }


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Read a merge, which older files join with a space."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _sentencepiece(model: Path, contents: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Scores that make sentencepiece's rule, the best-scored joint token first, take the merges in their order."""
    merges = [_pair(merge) for merge in contents["model"]["merges"]]
    joinable = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
    merges = [pair for pair in merges if {*pair, "".join(pair)} <= joinable]
    order = list(dict.fromkeys("".join(pair) for pair in merges))
    rank = {token: i for i, token in enumerate(order)}
    every = {(t[:cut], t[cut:]) for t in order for cut in range(1, len(t)) if {t[:cut], t[cut:]} <= joinable}
    ranks = [rank["".join(pair)] for pair in merges]
    if every != set(merges) or ranks != sorted(ranks):
        raise UserError(
            f"{model} has a tokenizer.json whose merges no scores of a sentencepiece model can express; "
            f"{_USE_SAFETENSORS}."
        )
    last = -float(len(order))
    scores = [-float(rank[token]) if token in rank else last for token in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _adds_space(model, contents),
    }


def _adds_space(model: Path, contents: Mapping[str, Any]) -> bool:
    """Tell if a space is put in front of a text, from the three ways in which tokenizer.json says so."""
    normalizer, pre = contents["normalizer"], contents["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    splits_nothing = pre is None or (pre["type"] == "Split" and pre["pattern"] == {"String": " "})
    if splits_nothing and steps == [{"type": "Prepend", "prepend": _SPACE}, replace]:
        return True
    if splits_nothing and steps == [replace]:
        return False
    if normalizer is None and pre and pre["type"] == "Metaspace" and not pre.get("split", True):
        return bool(pre["prepend_scheme"] != "never")
    raise UserError(
        f"{model} has a tokenizer.json whose normalizer and pre_tokenizer are none of sentencepiece's; "
        f"{_USE_SAFETENSORS}."
    )


def _chat_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _check_same(model: Path, tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    """Read the metadata back, and refuse them if a text gets other ids."""
    again = tokenizer_from_gguf(metadata, model)
    for text in _PROBES:
        before, after = (each(text, add_special_tokens=False).input_ids for each in (tokenizer, again))
        if before != after:
            raise UserError(
                f"{model} has a tokenizer that GGUF metadata do not reproduce: {text[:20]!r} gets other ids; "
                f"{_USE_SAFETENSORS}."
            )
