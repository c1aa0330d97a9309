"""Tokenizers without torch: from tokenizer.json, or rebuilt from the metadata of a GGUF file.

`transformers` takes about a second to import, so it is imported where a tokenizer is made.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qlora_jax.checkpoints.gguf_file import read_metadata
from qlora_jax.checkpoints.model_files import COMPANION_FILES, DOWNLOAD_AGAIN, read_json_object
from qlora_jax.environment import import_transformers
from qlora_jax.errors import UserError
from qlora_jax.files import reason

if TYPE_CHECKING:
    import transformers

# The largest tokenizer known is Gemma 3's: 33 MB, two million marks of JSON in its vocabulary and merges, 6,400 added
# tokens, and a tokenizer_config.json of 1 MB. A list of special tokens takes transformers time by its square.
_MOST_TOKENIZER_BYTES = 48 * 2**20
_MOST_MARKS = {"tokenizer.json": 3 << 20, "vocab.json": 3 << 20, "merges.txt": 1 << 20}
_MOST_OTHER_MARKS = 1 << 18
_MOST_PARTS, _MOST_SPECIAL = 1 << 16, 1 << 13
_TOKENIZER_FILES = tuple(name for name in COMPANION_FILES if name not in ("config.json", "generation_config.json"))

# GGUF token types (llama.cpp's enum llama_token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_NEVER_JOINED = (_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NEWLINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K_LIKE = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _NEWLINES_AND_SPACES
)
_LLAMA3 = _CL100K_LIKE.replace("{DIGITS}", "{1,3}")
_QWEN2 = _CL100K_LIKE.replace("{DIGITS}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _NEWLINES_AND_SPACES
)


class _PreTokenizer(NamedTuple):
    """Cutting of a text before byte-level BPE.

    Attributes:
        pattern: regular expression of the pieces; None for GPT-2's own.
        single_digits: digits are cut off one by one first.
        ignore_merges: whole pieces that are in the vocabulary bypass the merges.
        add_bos: BOS is added unless the file says otherwise.
        compose: text is brought to Unicode's composed form (NFC) first.
    """

    pattern: str | None = None
    single_digits: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    compose: bool = False


_LLAMA3_PRE = _PreTokenizer(_LLAMA3, ignore_merges=True, add_bos=True)
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(),
    "smollm": _PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "smaug-bpe": _PreTokenizer(_LLAMA3),
    "qwen2": _PreTokenizer(_QWEN2, compose=True),
    "tekken": _PreTokenizer(_TEKKEN, ignore_merges=True, add_bos=True),
}
"""By `tokenizer.ggml.pre`."""


def load_tokenizer(path: str | Path) -> "transformers.PreTrainedTokenizerFast":
    """Tokenizer of a Hugging Face directory, a converted directory or a GGUF file.

    tokenizer.json is taken as it stands; a directory without one goes through transformers' AutoTokenizer. Nothing is
    downloaded and no code from the directory is run.

    Raises:
        UserError: no tokenizer there, one that cannot be read, or one without an end-of-sequence token.
    """
    path = Path(path)
    if path.is_file():
        tokenizer = tokenizer_from_gguf(read_metadata(path), path)
    else:
        tokenizer = _from_directory(path)
    if not isinstance(tokenizer.eos_token_id, int):
        where = "tokenizer.ggml.eos_token_id" if path.is_file() else "eos_token in tokenizer_config.json"
        raise UserError(f"the tokenizer of {path} has no end-of-sequence token; set {where}.")
    return tokenizer


def ensure_pad(tokenizer: "transformers.PreTrainedTokenizerFast") -> "transformers.PreTrainedTokenizerFast":
    """Give the tokenizer a padding token that is not its end-of-sequence token, and return it.

    Padding with EOS and masking padding by its id is how models come to never learn to stop. No token is added, for
    that would need new embedding rows. Chosen is, in this order: the tokenizer's own padding token if it is not EOS, a
    special token with "pad" in its name, the unknown token, and any other special token that is neither BOS nor part of
    the chat template. (SmolLM2 declares <|im_end|> = EOS as padding; it gets its unknown token <|endoftext|>.)

    Raises:
        UserError: the vocabulary has no such token.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != eos:
        return tokenizer
    special = {i: token.content for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else str(tokenizer.chat_template)
    candidates = [token for token in special.values() if "pad" in token.lower()]
    if tokenizer.unk_token is not None:
        candidates.append(tokenizer.unk_token)
    candidates += [token for token in special.values() if token not in template]
    for token in candidates:
        if tokenizer.convert_tokens_to_ids(token) not in (eos, bos):
            tokenizer.pad_token = token
            return tokenizer
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path} has no special token to pad with besides BOS and EOS; "
        f"set pad_token in tokenizer_config.json to a token of its vocabulary."
    )


def tokenizer_digest(tokenizer: "transformers.PreTrainedTokenizerFast") -> str:
    """SHA-256 of all that decides which ids a text or a chat becomes, in hexadecimal digits."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by every call, not part of what was loaded.
    facts = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}
    facts["template"], facts["special"] = tokenizer.chat_template, tokenizer.special_tokens_map
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: str | Path) -> "transformers.PreTrainedTokenizerFast":
    """Rebuild a tokenizer from GGUF metadata (keys tokenizer.ggml.*); `path` is for messages.

    Supports byte-level BPE ("gpt2") with the pre-tokenizers of `_PRE_TOKENIZERS`, and sentencepiece BPE ("llama").

    Raises:
        UserError: another tokenizer model or pre-tokenizer, or metadata that do not belong together.
    """
    from tokenizers import AddedToken

    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise UserError(f"{path} has no tokenizer (tokenizer.ggml.tokens); use another GGUF version of the model.")
    if len(set(tokens)) != len(tokens):
        raise UserError(f"{path} has duplicate tokens in tokenizer.ggml.tokens; use the safetensors version.")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise UserError(f"{path} has {len(types)} tokenizer.ggml.token_type for {len(tokens)} tokens.")
    if model == "gpt2":
        backend, add_bos = _byte_level_bpe(metadata, tokens, path)
    elif model == "llama":
        backend, add_bos = _sentencepiece_bpe(metadata, tokens, types, path), True
    else:
        raise UserError(
            f"{path} has tokenizer.ggml.model {model!r}, which is not supported (only 'gpt2' and 'llama' are); "
            f"use the safetensors version of the model."
        )
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    # sentencepiece looks for them in a text whose spaces have become U+2581 already.
    normalized = model == "llama" and not _has_space_prefix(metadata)
    backend.add_tokens([AddedToken(token, normalized=normalized) for token in whole])
    if backend.get_vocab_size() != len(tokens):
        raise UserError(f"{path} has tokens that its own tokenizer cannot hold; use the safetensors version.")

    special: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise UserError(f"{path} has tokenizer.ggml.{key}_token_id {index} for {len(tokens)} tokens.")
        special[f"{name}_token"] = tokens[index]
    tokenizer = import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=str(path),
        add_bos_token=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length", int(1e30)),
        **special,
    )
    if template := metadata.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
    return tokenizer


def _from_directory(path: Path) -> "transformers.PreTrainedTokenizerFast":
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a model directory or a .gguf file.")
    for name in _TOKENIZER_FILES:
        if (path / name).is_file():
            _refuse_oversized(path / name)
    library = import_transformers()
    whole = (path / "tokenizer.json").is_file()
    if not whole:
        _refuse_code(path)
    # The file itself, not a class rebuilt from its vocabulary, which may cut text differently.
    loader = library.PreTrainedTokenizerFast if whole else library.AutoTokenizer
    try:
        # Unless told not to, transformers asks on the terminal if it may run the model's own code.
        tokenizer = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        tokenizer("a")  # some fields of a wrong type are found when they are used
    except Exception as error:  # transformers and tokenizers raise many types, some of them bare Exception
        raise UserError(
            f"{path} has no tokenizer that can be read ({reason(error)}); add its tokenizer.json."
        ) from error
    if not isinstance(tokenizer, library.PreTrainedTokenizerFast):
        raise UserError(f"{path} has no fast tokenizer; add its tokenizer.json.")
    return tokenizer


def _refuse_oversized(file: Path) -> None:
    """Refuse a file before a library parses it: each value takes up to 250 bytes there, each typed part 1,400."""
    if file.stat().st_size > _MOST_TOKENIZER_BYTES:
        raise UserError(
            f"{file} is larger than the {_MOST_TOKENIZER_BYTES} bytes that are read of such a file; {DOWNLOAD_AGAIN}."
        )
    if file.name == "tokenizer.model":
        return
    text = file.read_bytes()
    marks = sum(map(text.count, (b"\n",) if file.suffix == ".txt" else (b",", b":", b"[", b"{")))
    parts = text.count(b'"content"') + text.count(b'"type"')
    special = 0
    if file.name in ("tokenizer_config.json", "special_tokens_map.json") and marks <= _MOST_OTHER_MARKS:
        values = read_json_object(file, DOWNLOAD_AGAIN).values()
        special = max((len(value) for value in values if isinstance(value, list)), default=0)
    if marks > _MOST_MARKS.get(file.name, _MOST_OTHER_MARKS) or parts > _MOST_PARTS or special > _MOST_SPECIAL:
        raise UserError(f"{file} holds more than that of any known tokenizer; {DOWNLOAD_AGAIN}.")


def _refuse_code(path: Path) -> None:
    """Refuse a directory whose tokenizer is Python code of its own."""
    for name in ("tokenizer_config.json", "config.json"):
        if (path / name).is_file() and "auto_map" in read_json_object(path / name, DOWNLOAD_AGAIN):
            raise UserError(
                f"{path / name} has auto_map: its tokenizer is code from the model's repository, which is never run; "
                f"add its tokenizer.json."
            )


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str], path: str | Path) -> tuple[Any, bool]:
    """Byte-level BPE as GPT-2's (Radford et al. 2019), cut as tokenizer.ggml.pre says; also whether BOS is usual."""
    from tokenizers import Tokenizer, decoders, models

    kind = metadata.get("tokenizer.ggml.pre")
    if kind not in _PRE_TOKENIZERS:
        raise UserError(
            f"{path} has tokenizer.ggml.pre {kind!r}, which is not supported ({', '.join(_PRE_TOKENIZERS)} are); "
            f"use the safetensors version of the model."
        )
    pre = _PRE_TOKENIZERS[kind]
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise UserError(f"{path} has missing or malformed tokenizer.ggml.merges; use the safetensors version.")
    backend = Tokenizer(_bpe(models.BPE, path, tokens, merges, ignore_merges=pre.ignore_merges))
    _set_cutting(backend, pre)
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _set_cutting(backend: Any, pre: _PreTokenizer) -> None:
    """Give a tokenizer the normalizer and pre-tokenizer of byte-level BPE."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if pre.compose:
        backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None)
    first: list[pre_tokenizers.PreTokenizer] = []
    if pre.single_digits:
        first.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.pattern is not None:
        first.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level


def pre_tokenizer_name(contents: Mapping[str, Any]) -> str | None:
    """Return the `tokenizer.ggml.pre` of a byte-level BPE with these contents of tokenizer.json; None if it has none.

    Compared are normalizer, pre-tokenizer and the rule for whole pieces: the ids of all texts then agree.
    """
    from tokenizers import Tokenizer, models

    for name, pre in _PRE_TOKENIZERS.items():
        own = Tokenizer(models.BPE(ignore_merges=pre.ignore_merges))
        _set_cutting(own, pre)
        if _cutting(json.loads(own.to_str())) == _cutting(contents):
            return name
    return None


def _cutting(contents: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides how a text is cut, without nesting and what concerns offsets only."""

    def steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
        if part is None:
            return []
        found = [step for each in part[inner] for step in steps(each, inner)] if part["type"] == "Sequence" else [part]
        return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in found]

    whole = bool(contents["model"].get("ignore_merges"))
    return steps(contents["normalizer"], "normalizers"), steps(contents["pre_tokenizer"], "pretokenizers"), whole


def _has_space_prefix(metadata: Mapping[str, Any]) -> bool:
    """Tell if sentencepiece puts a space in front of every text, which it does by default."""
    return bool(metadata.get("tokenizer.ggml.add_space_prefix", True))


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: str | Path) -> Any:
    """Sentencepiece BPE with byte fallback (LLaMA 1 and 2, Mistral 7B, TinyLlama, Gemma).

    Sentencepiece joins the neighbours whose joint token has the best score; merges in order of that score do the same.
    User-defined tokens are found before anything is joined, the longest first, and join nothing.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise UserError(f"{path} has missing or malformed tokenizer.ggml.scores; use the safetensors version.")
    prefix = _has_space_prefix(metadata)
    if prefix and any(" " in token or "▁" in token for i, token in enumerate(tokens) if types[i] == _USER_DEFINED):
        raise UserError(
            f"{path} has user-defined tokens with spaces and a tokenizer that puts a space in front of a text, which "
            f"cannot be rebuilt faithfully; use the safetensors version of the model."
        )
    joinable = {token: i for i, token in enumerate(tokens) if types[i] not in _NEVER_JOINED}
    ranked = [
        (-scores[i], -cut, (token[:cut], token[cut:]))
        for token, i in joinable.items()
        for cut in range(1, len(token))
        if token[:cut] in joinable and token[cut:] in joinable
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Tokenizer(
        _bpe(
            models.BPE,
            path,
            tokens,
            [merge for *_, merge in sorted(ranked)],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _bpe(model: Any, path: str | Path, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Any:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        return model(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{path} has a vocabulary and merges that do not belong together ({error}).") from error
