"""Quantise a model once: safetensors directory, hub id or GGUF file -> a directory that finetune.py loads."""

import argparse
import resource
import sys

from tqdm import tqdm

from qlora_jax.checkpoints.base import convert
from qlora_jax.checkpoints.hub import resolve_model
from qlora_jax.errors import UserError
from qlora_jax.quantization import QUANT_TYPES, QuantizationConfig


def parse_bool(text: str) -> bool:
    """`True` and `False` as the reference program's flags spell them."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return text.lower() == "true"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="model directory, .gguf file or hub id")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="directory to create")
    parser.add_argument(
        "--quant_type", choices=[*QUANT_TYPES, "none"], default="nf4", help="how linear weights are stored"
    )
    parser.add_argument("--block_size", type=int, default=64, help="weights that share a scale (nf4, fp4)")
    parser.add_argument(
        "--double_quant",
        type=parse_bool,
        nargs="?",
        const=True,
        default=True,
        metavar="True|False",
        help="quantise the scales too (nf4, fp4)",
    )
    parser.add_argument(
        "--no-double_quant",
        dest="double_quant",
        action="store_false",
        default=argparse.SUPPRESS,
        help="keep the scales in float32",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="type of embedding, head and biases, and of linear weights with --quant_type none",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in OUTPUT_DIR")
    return parser.parse_args()


def main() -> None:
    """Convert and print what was written."""
    args = parse_arguments()
    quantization = QuantizationConfig(args.quant_type, args.block_size, args.double_quant)
    source = resolve_model(args.model)
    with tqdm(unit=" tensors", desc="Converting", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = convert(source, args.output_dir, quantization, args.dtype, overwrite=args.overwrite, progress=progress)
    print(f"Wrote {result.directory}: {result.tensors} tensors, {result.parameters:,} parameters")
    for name, size in result.bytes_by_class.items():
        print(f"  {name.replace('_', ' '):<16}{size / 1e6:>12,.1f} MB")
    print(f"  {'total':<16}{sum(result.bytes_by_class.values()) / 1e6:>12,.1f} MB")
    if result.bits_per_parameter is not None:
        print(f"  {result.bits_per_parameter:.3f} bits per quantised parameter, scales included")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"  {result.seconds:.1f} s, peak memory {peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
