"""Model cards: the README.md of an export, from the records of its run; nothing in it but what was recorded.

Of paths on this machine only the last part is told, and of flags only those that shape what was learnt.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from qlora_jax.formatting import format_bytes
from qlora_jax.training.config import TrainConfig

# Flags that say where things are, how they are computed, or how they are reported.
_UNTOLD = frozenset({"adapter", "do_train", "kernel"})
_UNTOLD_GROUPS = frozenset({"output", "evaluation"})


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """Facts of an export that the records of its run lack.

    Attributes:
        title: first heading.
        target: format of the export.
        model: hub id or path of the base.
        base: "dequantized" or "original"; None for an adapter that is not merged.
        quantization: of the base in training, for people.
        shares: module -> share of its change that survives rounding.
    """

    title: str
    target: str
    model: str
    base: str | None
    quantization: str
    shares: Mapping[str, float]


def public_name(name: str) -> str:
    """Return a hub id as it is, and of a path the last part."""
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return PurePath(name).name if is_path else name


def model_card(facts: CardFacts, run: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Return the contents of README.md.

    Args:
        facts: of the export.
        run: contents of run.json; {} if there is none.
        summary: contents of summary.json; {} if there is none.
    """
    flags = run.get("flags", {})
    model, dataset = public_name(facts.model), public_name(str(flags.get("dataset", "")))
    header = {
        "base_model": model if "/" in model else None,
        "library_name": "gguf" if facts.target.startswith("gguf") else "transformers",
        "datasets": f"[{dataset}]" if "/" in dataset else None,
        "tags": "[qlora, lora, qlora-jax]",
    }
    lines = ["---", *(f"{name}: {value}" for name, value in header.items() if value is not None), "---", ""]
    lines += [f"# {facts.title}", "", *_how(facts, model, dataset), ""]
    for heading, rows in (
        ("Training", _settings(flags)),
        ("Results", _results(summary)),
        ("Memory of the run", {name: format_bytes(size) for name, size in summary.get("bytes", {}).items()}),
        ("Versions", run.get("facts", {}).get("versions", {})),
    ):
        if rows:
            lines += [f"## {heading}", "", *_table(rows), ""]
    return "\n".join(lines)


def _how(facts: CardFacts, model: str, dataset: str) -> list[str]:
    data = f" on {dataset}" if dataset else ""
    lines = [f"LoRA adapters trained{data} with qlora-jax on {model}, whose weights were kept as {facts.quantization}."]
    if facts.base is None:
        lines.append("This is the adapter alone; put it beside that base.")
    else:
        lines.append(f"They are merged into the {facts.base} weights and stored as {facts.target}.")
    if facts.shares:
        mean = sum(facts.shares.values()) / len(facts.shares)
        least = min(facts.shares, key=lambda module: facts.shares[module])
        lines.append(
            f"Of the trained change {100 * mean:.1f} % survives rounding to that format on average, least in {least} "
            f"({100 * facts.shares[least]:.1f} %)."
        )
    return lines


def _settings(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that were not left at their defaults, and shape what was learnt."""
    told = {}
    for field in dataclasses.fields(TrainConfig):
        value = flags.get(field.name)
        if field.name in _UNTOLD or field.metadata["group"] in _UNTOLD_GROUPS or value in (None, field.default):
            continue
        told[field.name] = public_name(value) if isinstance(value, str) else value
    return told


def _results(summary: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "steps", "epochs", "tokens", "trained_tokens", "first_loss", "last_loss", "first_eval_loss", "last_eval_loss",
        "trainable_parameters", "total_parameters", "bits_per_quantized_parameter",
    )  # fmt: skip
    return {name: summary[name] for name in names if summary.get(name) is not None}


def _table(rows: Mapping[str, Any]) -> list[str]:
    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    return ["| | |", "| --- | --- |", *(f"| {name} | {text(value)} |" for name, value in rows.items())]
