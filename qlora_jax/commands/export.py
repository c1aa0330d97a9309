"""`qlora-jax export`: a trained adapter with its base, in the formats that other programs serve."""

import dataclasses
import resource
import sys
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal

from qlora_jax.choices import BaseKind, ExportTarget
from qlora_jax.cli import argument, command, flag, parse_flags, spellings

DESCRIPTION = """Export a fine-tuned model: the adapter of a run, merged into its base or beside it, as files that
transformers, vLLM, llama.cpp and Ollama serve."""


@dataclasses.dataclass(frozen=True)
class ExportFlags:
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
    model: str | None = flag(None, "Base model, where it is not the one that the run names: path or hub id.")
    quant_type: Literal["auto", "nf4", "fp4", "int4", "q4_0", "q4_1", "q8_0", "int8", "none"] | None = flag(
        None, "How linear weights were stored in training (as convert has it); by default as the run says, else auto."
    )
    block_size: int = flag(64, "Weights that shared a scale (with --quant_type auto, nf4, fp4, int4).")
    double_quant: bool = flag(True, "Whether the scales were quantised too (with --quant_type auto, nf4, fp4, int4).")
    dtype: Literal["bfloat16", "float16", "float32"] = flag("bfloat16", "Type of weights that are not quantised.")
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
    if values.quant_type not in ("auto", "nf4", "fp4", "int4"):
        beside = "without `quant_type`" if values.quant_type is None else f"with `quant_type={values.quant_type}`"
        found += [
            f"`{n}` has no effect {beside}; leave it out." for n in sorted(given & {"block_size", "double_quant"})
        ]
    if values.base == "original" and values.quant_type is not None and values.to != "bitsandbytes":
        found.append("`quant_type` has no effect with `base=original`; leave it out.")
    return found


def export_adapter(flags: ExportFlags) -> None:
    """Export with a progress bar; print what survives rounding, sizes, time and peak memory."""
    # Imported once the flags are known to be good: loading JAX takes seconds.
    from tqdm import tqdm

    from qlora_jax.checkpoints.base_weights import BaseStorage
    from qlora_jax.exporting import ExportConfig, export, parse_size
    from qlora_jax.formatting import format_bytes, table
    from qlora_jax.quantization import QuantizationConfig

    storage = None
    if flags.quant_type is not None:
        adopt = flags.quant_type == "auto"
        kind = "nf4" if adopt else flags.quant_type
        storage = BaseStorage(QuantizationConfig(kind, flags.block_size, flags.double_quant), adopt)
    config = ExportConfig(
        adapter=flags.adapter,
        output_dir=flags.output_dir,
        to=flags.to,
        base=flags.base,
        model=flags.model,
        storage=storage,
        dtype=flags.dtype,
        max_shard_bytes=parse_size(flags.max_shard_size),
        overwrite=flags.overwrite,
        push_to_hub=flags.push_to_hub,
    )
    with tqdm(unit=" tensors", desc="Exporting", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = export(config, progress)
    print(f"Wrote {result.directory}: {result.base}")
    if result.left_out:
        print(f"  left out, since nothing is in them: {', '.join(result.left_out)}")
    if result.shares:
        print("  share of the trained change that survives rounding, mean over layers and least:")
        print(table(share_rows(result.shares)))
    print(table([(name, format_bytes(size)) for name, size in sorted(result.files.items())]))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"  {result.seconds:.1f} s, peak memory {format_bytes(peak)}")


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
