"""Export a fine-tuned model: the adapter of a run, merged into its base or beside it, as files that others serve."""

from functools import partial

from qlora_jax.cli import run
from qlora_jax.commands.export import main

if __name__ == "__main__":
    run(partial(main, prog="python scripts/export.py"))
