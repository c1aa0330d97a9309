"""Say what fine-tuning would take of a GPU that need not be here: bytes by class, longest sequence, its time."""

from functools import partial

from qlora_jax.cli import run
from qlora_jax.commands.plan import main

if __name__ == "__main__":
    run(partial(main, prog="python scripts/plan.py"))
