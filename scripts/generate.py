"""Answer a file of prompts with a fine-tuned model."""

from functools import partial

from qlora_jax.cli import run
from qlora_jax.commands.generate import main

if __name__ == "__main__":
    run(partial(main, prog="python scripts/generate.py"))
