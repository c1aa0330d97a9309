"""Fine-tune a language model with QLoRA; `--help` lists the flags, no flags run a small example from end to end."""

from functools import partial

from qlora_jax.cli import run
from qlora_jax.commands.finetune import main

if __name__ == "__main__":
    run(partial(main, prog="python scripts/finetune.py"))
