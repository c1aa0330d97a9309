"""Time the training step on this machine (`step`), or the 4-bit products on its GPU (`kernels`)."""

from functools import partial

from qlora_jax.cli import run
from qlora_jax.commands.benchmark import main

if __name__ == "__main__":
    run(partial(main, prog="python scripts/benchmark.py"))
