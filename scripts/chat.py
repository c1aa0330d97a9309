"""Talk to a fine-tuned model in the terminal."""

from functools import partial

from qlora_jax.cli import run
from qlora_jax.commands.chat import main

if __name__ == "__main__":
    run(partial(main, prog="python scripts/chat.py"))
