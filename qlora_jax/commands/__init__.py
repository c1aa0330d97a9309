"""The command line `qlora-jax`; each command is a module of its name, and scripts/ runs the same from a checkout."""

import importlib
from collections.abc import Sequence

from qlora_jax import cli

COMMANDS = {
    "finetune": "Fine-tune a language model; without flags, a small example.",
    "chat": "Talk to a fine-tuned model, or to several.",
    "generate": "Answer a file of prompts.",
    "serve": "Serve adapters on one base through OpenAI's API.",
    "plan": "Say what fine-tuning would take of a GPU that need not be here.",
    "convert": "Quantise a model once, for many runs.",
    "merge": "Measure what merging an adapter costs in every format, before anything is written.",
    "export": "Write a fine-tuned model in the formats that others serve: safetensors, GGUF, Ollama.",
    "benchmark": "Time the training step, or the 4-bit kernels.",
}
DESCRIPTION = "Fine-tune 4-bit language models with LoRA adapters (QLoRA) in JAX."


def main(argv: Sequence[str]) -> int:
    """Run the command named first."""
    if argv and argv[0] == "--version":
        from importlib.metadata import version

        print(f"qlora-jax {version('qlora-jax')}")
        return 0
    name = cli.subcommand(argv, COMMANDS, prog="qlora-jax", description=DESCRIPTION)
    # Imported by name: a command's own imports cost the others nothing.
    return 0 if name is None else importlib.import_module(f"{__name__}.{name}").main(argv[1:])


def entry() -> None:
    """Run the installed program."""
    cli.run(main)


__all__ = ["COMMANDS", "entry", "main"]
