"""The template of training in the files of an export: in every program a conversation has the tokens it had there."""

from pathlib import Path
from typing import Any

from qlora_jax import data
from qlora_jax.checkpoints.model_files import DOWNLOAD_AGAIN, read_json_object
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.data.chat_template import render
from qlora_jax.errors import UserError
from qlora_jax.files import write_json

_CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def adds_bos(tokenizer: Any) -> bool:
    """Tell if the tokenizer puts its BOS before a text, as programs that read GGUF files then do."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def template_metadata(tokenizer: Any, dataset_format: str) -> dict[str, Any]:
    """Return the metadata of a GGUF file that training on `dataset_format` makes others than the base's."""
    if (template := data.FORMATS[dataset_format].template) is not None:
        return {"tokenizer.chat_template": template}
    if adds_bos(tokenizer) and not _renders_bos(tokenizer):
        return {"tokenizer.ggml.add_bos_token": False}
    return {}


def _renders_bos(tokenizer: Any) -> bool:
    """Tell if the chat template begins with BOS; True if it cannot be told."""
    try:
        (text,) = render(tokenizer, [{"role": "user", "content": "a"}], [(1, True)], "chat template")
    except UserError:
        return True
    return text.startswith(tokenizer.bos_token)


def write_template(directory: Path, dataset_format: str) -> None:
    """Bring the files of a Hugging Face directory up to date with training on `dataset_format`.

    The chat template is that of the format, unless it is the tokenizer's own, and generation_config.json lists every
    token that ends an answer.

    Args:
        directory: with generation_config.json and the tokenizer of the base, if it has one.
        dataset_format: of the training data.
    """
    if (template := data.FORMATS[dataset_format].template) is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        (directory / "chat_template.json").unlink(missing_ok=True)
        if (directory / _CONFIG).is_file():
            fields = read_json_object(directory / _CONFIG, DOWNLOAD_AGAIN)
            if fields.pop("chat_template", None) is not None:
                write_json(directory / _CONFIG, fields)
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        return
    fields = read_json_object(directory / _GENERATION, DOWNLOAD_AGAIN)
    known = fields.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    tokenizer = load_tokenizer(directory)
    if missing := [token for token in data.eos_ids(tokenizer, (), dataset_format) if token not in ends]:
        write_json(directory / _GENERATION, {**fields, "eos_token_id": [*ends, *missing]})
