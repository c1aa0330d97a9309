"""`qlora-jax merge`: the cost of merging an adapter into its base, in every format, before anything is written."""

import dataclasses
import shlex
import typing
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_jax.choices import ExportTarget, OnBadRow
from qlora_jax.cli import argument, command, flag, parse_flags, spellings
from qlora_jax.commands.base_flags import BaseFlags, base_refusals
from qlora_jax.commands.export import print_export
from qlora_jax.commands.terminal import progress_bar

if TYPE_CHECKING:
    from qlora_jax.exporting import Measured

DESCRIPTION = """Measure what merging a trained adapter into its base costs: the held-out loss of the 4-bit weights with
the adapter and of the merged model in every format, and how much of the trained change each format keeps. Writes the
formats into --output_dir, if that is given."""

MERGED = tuple(target for target in typing.get_args(ExportTarget) if target != "gguf-lora")
"""Formats of merged models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeFlags(BaseFlags):
    """Flags of `merge`."""

    adapter: str = argument("Directory of a run, of one of its checkpoints, or of an adapter in PEFT's format.")
    to: str | None = flag(
        None,
        f"Formats, with commas between them: {', '.join(MERGED)}; by default, to be measured only, safetensors, "
        "bitsandbytes and the quantised ones of GGUF, if they can hold the model.",
    )
    base: Literal["both", "dequantized", "original"] = flag(
        "both",
        "Merge into the 4-bit weights that training saw, into the original ones, or into each; what is written with "
        "both is merged into the former.",
    )
    eval_dataset: str | None = flag(None, "Held-out rows to measure with, instead of the run's.")
    eval_split: str | None = flag(None, "Split of eval_dataset; by default test, else validation.")
    dataset_format: str | None = flag(None, "Row format of eval_dataset; by default as the run had it.")
    on_bad_row: OnBadRow | None = flag(
        None, "With held-out rows that cannot be used: stop, or leave them out; by default as the run did."
    )
    max_eval_samples: int | None = flag(None, "Use only this many held-out rows.")
    output_dir: str | None = flag(None, "Directory to write the merged models to, each in one named after its format.")
    overwrite: bool = flag(False, "Replace earlier exports there.")


def main(argv: Sequence[str], *, prog: str = "qlora-jax merge") -> int:
    """Measure, print a table, and write what is asked for."""
    flags, _ = parse_flags(MergeFlags, argv, prog=prog, description=DESCRIPTION, check=refusals)
    with command(spellings(MergeFlags)):
        merge(flags, prog)
    return 0


def refusals(values: Any, given: Set[str]) -> list[str]:
    """List a sentence for every flag that has no effect beside the others, and for formats that are not known."""
    found = base_refusals(values, given)
    wanted = formats(values.to)
    if wanted is not None and not (wanted and set(wanted) <= set(MERGED)):
        found.append(f"`to={values.to}`: choose from {', '.join(MERGED)}, with commas between them.")
    if values.eval_dataset is None:
        found += [
            f"`{name}` has no effect without `eval_dataset`; give that too, or leave it out."
            for name in ("eval_split", "dataset_format")
            if name in given
        ]
    if "dtype" in given and wanted and all(name.startswith("gguf") for name in wanted):
        found.append(f"`dtype` has no effect with `to={values.to}`; leave it out.")
    if "quant_type" in given and values.base == "original" and wanted and "bitsandbytes" not in wanted:
        found.append("`quant_type` has no effect with `base=original`; leave it out.")
    if values.output_dir is not None and wanted is None:
        found.append("`output_dir`: give the formats to write there as `to`.")
    if "overwrite" in given and values.output_dir is None:
        found.append("`overwrite` has no effect without `output_dir`; give that too, or leave it out.")
    return found


def formats(text: str | None) -> tuple[Any, ...] | None:
    """Split the value of --to."""
    return None if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def merge(flags: MergeFlags, prog: str) -> None:
    """Measure and print; then write."""
    # Imported once the flags are known to be good: loading JAX takes seconds.
    from qlora_jax.exporting import ComparisonConfig, ExportConfig, check_merged_export, compare, export
    from qlora_jax.formatting import table

    config = ComparisonConfig(
        adapter=flags.adapter,
        formats=formats(flags.to),
        base=flags.base,
        model=flags.model,
        storage=flags.storage,
        dtype=flags.dtype,
        eval_dataset=flags.eval_dataset,
        eval_split=flags.eval_split,
        dataset_format=flags.dataset_format,
        on_bad_row=flags.on_bad_row,
        max_eval_samples=flags.max_eval_samples,
    )
    exports = [
        ExportConfig(
            adapter=flags.adapter,
            output_dir=str(Path(flags.output_dir) / target),
            to=target,
            base="dequantized" if flags.base == "both" else flags.base,
            model=flags.model,
            storage=config.storage,
            dtype=flags.dtype,
            overwrite=flags.overwrite,
        )
        for target in config.formats or ()
        if flags.output_dir is not None
    ]
    # Measuring a large model takes long: what cannot be written is refused before.
    for each in exports:
        check_merged_export(each)
    with progress_bar("Measuring") as progress:
        results, notes = compare(config, progress)
    print("\n".join(notes))
    print(f"Held-out loss of {results[0].held_out.tokens:,} tokens, and share of the trained change that survives:")
    print(table(rows(results)))
    if not exports:
        print(f"Write one: {export_command(flags, prog)}")
    for each in exports:
        with progress_bar(f"Exporting {each.to}") as progress:
            written = export(each, progress)
        print_export(written)


def export_command(flags: MergeFlags, prog: str) -> str:
    """Return the command that writes one of the models that were measured, in the terms of its reader's shell."""
    names = [field.name for field in dataclasses.fields(BaseFlags)]
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) != getattr(MergeFlags, name)}
    words = [flags.adapter, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
    adapter, *base = map(shlex.quote, words)
    return " ".join([prog.replace("merge", "export"), adapter, "DIRECTORY --to FORMAT --base BASE", *base])


def rows(results: Sequence["Measured"]) -> list[tuple[str, ...]]:
    """Make the table's rows: base and format, loss, perplexity, and mean and least share."""
    found: list[tuple[str, ...]] = [("base: model", "loss", "perplexity", "kept", "least")]
    for each in results:
        shares = sorted(each.shares.items(), key=lambda item: item[1])
        mean = f"{100 * sum(each.shares.values()) / len(shares):.1f} %" if shares else ""
        least = f"{100 * shares[0][1]:.1f} % ({shares[0][0]})" if shares else ""
        loss, perplexity = f"{each.held_out.loss:.4f}", f"{each.held_out.perplexity:.3f}"
        found.append((f"{each.base}: {each.name}", loss, perplexity, mean, least))
    return found
