"""Measure what merging a trained adapter into its base costs, in every format, and write what is asked for."""

from functools import partial

from qlora_jax.cli import run
from qlora_jax.commands.merge import main

if __name__ == "__main__":
    run(partial(main, prog="python scripts/merge.py"))
