"""`qlora-jax convert`: quantise a model once, for many runs."""

import dataclasses
from collections.abc import Sequence, Set
from typing import Any, Literal

from qlora_jax.cli import argument, command, flag, parse_flags, spellings
from qlora_jax.commands.terminal import peak_memory, progress_bar

DESCRIPTION = "Quantise a model once: safetensors directory, hub id or GGUF file to a directory that finetune loads."


@dataclasses.dataclass(frozen=True)
class ConvertFlags:
    """Flags of `convert`."""

    model: str = argument("Model directory, .gguf file or hub id.")
    output_dir: str = argument("Directory to create.")
    quant_type: Literal["auto", "nf4", "fp4", "int4", "q4_0", "q4_1", "q8_0", "int8", "none"] = flag(
        "auto", "How linear weights are stored; auto keeps those that are quantised already, and stores others as nf4."
    )
    block_size: int = flag(64, "Weights that share a scale (nf4, fp4, int4).")
    double_quant: bool = flag(True, "Quantise the scales too (nf4, fp4, int4).")
    dtype: Literal["bfloat16", "float16", "float32"] = flag(
        "bfloat16", "Type of embedding, head and biases, and of linear weights with --quant_type none."
    )
    overwrite: bool = flag(False, "Replace an earlier conversion in OUTPUT_DIR.")


def main(argv: Sequence[str], *, prog: str = "qlora-jax convert") -> int:
    """Convert and print what was written."""
    flags, _ = parse_flags(ConvertFlags, argv, prog=prog, description=DESCRIPTION, check=refusals)
    with command(spellings(ConvertFlags)):
        convert_model(flags)
    return 0


def refusals(values: Any, given: Set[str]) -> list[str]:
    """List a sentence for every flag that has no effect beside the others."""
    idle = [] if values.quant_type in ("auto", "nf4", "fp4", "int4") else sorted(given & {"block_size", "double_quant"})
    return [f"`{name}` has no effect with `quant_type={values.quant_type}`; leave it out." for name in idle]


def convert_model(flags: ConvertFlags) -> None:
    """Convert with a progress bar; print sizes, time and peak memory."""
    # Imported once the flags are known to be good: loading JAX takes seconds.
    from qlora_jax.checkpoints.conversion import convert
    from qlora_jax.checkpoints.hub import resolve_model
    from qlora_jax.formatting import format_bytes, table
    from qlora_jax.quantization import QuantizationConfig

    adopt = flags.quant_type == "auto"
    quantization = QuantizationConfig("nf4" if adopt else flags.quant_type, flags.block_size, flags.double_quant)
    source = resolve_model(flags.model)
    with progress_bar("Converting") as progress:
        result = convert(
            source,
            flags.output_dir,
            quantization,
            flags.dtype,
            adopt=adopt,
            overwrite=flags.overwrite,
            progress=progress,
        )
    print(f"Read {result.description}")
    print(f"Wrote {result.directory}: {result.tensors} tensors, {result.parameters:,} parameters")
    rows = [(name.replace("_", " "), format_bytes(size)) for name, size in result.bytes_by_class.items()]
    print(table([*rows, ("total", format_bytes(sum(result.bytes_by_class.values())))]))
    if result.bits_per_parameter is not None:
        print(f"  {result.bits_per_parameter:.3f} bits a quantised parameter, scales included")
    print(f"  {result.seconds:.1f} s, peak memory {format_bytes(peak_memory())}")
