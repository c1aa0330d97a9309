"""`qlora-jax export`: a trained adapter with its base, in the formats that other programs serve."""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.choices import BaseKind, ExportTarget
from qlora_jax.cli import argument, command, flag, parse_flags, spellings
from qlora_jax.commands.base_flags import BaseFlags, base_refusals
from qlora_jax.commands.terminal import peak_memory, progress_bar

if TYPE_CHECKING:
    from qlora_jax.exporting import Export

DESCRIPTION = """Export a fine-tuned model: the adapter of a run, merged into its base or beside it, as files that
transformers, vLLM, llama.cpp and Ollama serve."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags(BaseFlags):
    """Flags of `export`."""

    adapter: str = argument("Directory of a run, of one of its checkpoints, or of an adapter in PEFT's format.")
    output_dir: str = argument("Directory to create.")
    to: ExportTarget = flag(
        "safetensors",
        "Format: safetensors (16 bits) or bitsandbytes (4 bits) for transformers and vLLM; gguf-... for llama.cpp and "
        "Ollama, in the type of that name, or gguf-lora for the adapter alone.",
    )
    base: BaseKind = flag(
        "dequantized",
        "Merge into the 4-bit weights that training saw (the model that was evaluated), or into the original ones.",
    )
    max_shard_size: str = flag("5GB", "Most data of a safetensors file.")
    overwrite: bool = flag(False, "Replace an earlier export in OUTPUT_DIR.")
    push_to_hub: str | None = flag(None, "Repository (OWNER/NAME) on the Hugging Face hub to upload the result to.")


def main(argv: Sequence[str], *, prog: str = "qlora-jax export") -> int:
    """Export and print what was written."""
    flags, _ = parse_flags(ExportFlags, argv, prog=prog, description=DESCRIPTION, check=refusals)
    with command(spellings(ExportFlags)):
        export_adapter(flags)
    return 0


def refusals(values: Any, given: Set[str]) -> list[str]:
    """List a sentence for every flag that has no effect beside the others."""
    found = []
    gguf = str(values.to).startswith("gguf")
    idle = {"dtype", "max_shard_size"} if gguf else set()
    idle |= {"base", "quant_type"} if values.to == "gguf-lora" else set()
    found += [f"`{name}` has no effect with `to={values.to}`; leave it out." for name in sorted(idle & given)]
    found += base_refusals(values, given)
    if values.base == "original" and values.quant_type is not None and values.to != "bitsandbytes":
        found.append("`quant_type` has no effect with `base=original`; leave it out.")
    return found


def export_adapter(flags: ExportFlags) -> None:
    """Export with a progress bar, and print what was written."""
    # Imported once the flags are known to be good: loading JAX takes seconds.
    from qlora_jax.exporting import ExportConfig, export, parse_size

    config = ExportConfig(
        adapter=flags.adapter,
        output_dir=flags.output_dir,
        to=flags.to,
        base=flags.base,
        model=flags.model,
        storage=flags.storage,
        dtype=flags.dtype,
        max_shard_bytes=parse_size(flags.max_shard_size),
        overwrite=flags.overwrite,
        push_to_hub=flags.push_to_hub,
    )
    with progress_bar("Exporting") as progress:
        result = export(config, progress)
    print_export(result)
    print("Serve it\n" + "\n".join(f"  {line}" for line in serving_commands(flags.to, result.directory, result.files)))


def serving_commands(to: ExportTarget, directory: Path, names: Iterable[str]) -> list[str]:
    """List the commands that serve an export.

    Args:
        to: its format.
        directory: where it is.
        names: its files.
    """
    place = shlex.quote(str(directory))
    if not to.startswith("gguf"):
        return [f"vllm serve {place}", f'AutoModelForCausalLM.from_pretrained("{directory}")  # transformers']
    (file,) = (shlex.quote(str(directory / name)) for name in names if name.endswith(".gguf"))
    model = f"BASE.gguf --lora {file}" if to == "gguf-lora" else file
    return [f"llama-cli -m {model}", f"ollama create NAME -f {place}/Modelfile"]


def print_export(result: "Export") -> None:
    """Print what was written, what survives rounding, sizes, time and peak memory."""
    from qlora_jax.formatting import format_bytes, table

    print(f"Wrote {result.directory}: {result.base}")
    if result.left_out:
        print(f"  left out, since nothing is in them: {', '.join(result.left_out)}")
    if result.shares:
        print("  share of the trained change that survives rounding, mean over layers and least:")
        print(table(share_rows(result.shares)))
    print(table([(name, format_bytes(size)) for name, size in sorted(result.files.items())]))
    print(f"  {result.seconds:.1f} s, peak memory {format_bytes(peak_memory())}")


def share_rows(shares: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Make a row for the linears of one name in all layers: mean share, least share, and whose that is."""
    by_name: dict[str, dict[str, float]] = {}
    for module, share in shares.items():
        by_name.setdefault(module.rpartition(".")[2], {})[module] = share
    rows: list[tuple[str, ...]] = []
    for name, found in by_name.items():
        least = min(found, key=lambda module: found[module])
        mean = sum(found.values()) / len(found)
        rows.append((name, f"{100 * mean:.1f} %", f"{100 * found[least]:.1f} % ({least})"))
    return rows
