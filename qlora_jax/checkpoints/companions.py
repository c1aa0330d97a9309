"""Files of a model beside its weights: config.json, tokenizer and chat template, as a base or an export has them."""

import json
import shutil
from pathlib import Path

from qlora_jax.checkpoints.gguf_file import read_metadata
from qlora_jax.checkpoints.model_files import COMPANION_FILES
from qlora_jax.checkpoints.tokenizer import tokenizer_from_gguf
from qlora_jax.models import DecoderConfig


def write_companions(model: Path, config: DecoderConfig, directory: Path) -> None:
    """Write config.json and the tokenizer's files; for a GGUF file both are made from its metadata.

    Args:
        model: Hugging Face or converted directory, or GGUF file.
        config: of the model.
        directory: to write to.
    """
    if model.is_file():
        (directory / "config.json").write_text(json.dumps(config.source, indent=2) + "\n", encoding="utf-8")
        tokenizer_from_gguf(read_metadata(model), model).save_pretrained(directory)
        return
    for name in COMPANION_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, directory / name)
