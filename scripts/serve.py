"""Serve a base and its adapters through OpenAI's API."""

from functools import partial

from qlora_jax.cli import run
from qlora_jax.commands.serve import main

if __name__ == "__main__":
    run(partial(main, prog="python scripts/serve.py"))
