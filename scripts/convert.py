"""Quantise a model once: safetensors directory, hub id or GGUF file to a directory that finetune.py loads."""

from functools import partial

from qlora_jax.cli import run
from qlora_jax.commands.convert import main

if __name__ == "__main__":
    run(partial(main, prog="python scripts/convert.py"))
