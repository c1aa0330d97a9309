"""Compare our bitsandbytes export with what transformers and bitsandbytes make of our safetensors export.

    qlora-jax export RUN merged --to safetensors
    qlora-jax export RUN merged-4bit --to bitsandbytes
    ref/bin/python check_bitsandbytes_export.py --safetensors merged --bitsandbytes merged-4bit

Then loads ours as a user would. bitsandbytes' CPU kernels give the bytes of its CUDA kernels on one thread only.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--safetensors", type=Path, required=True)
    parser.add_argument("--bitsandbytes", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours = json.loads((args.bitsandbytes / "config.json").read_text())
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=ours["quantization_config"]["bnb_4bit_quant_type"],
        bnb_4bit_use_double_quant=ours["quantization_config"]["bnb_4bit_use_double_quant"],
        bnb_4bit_compute_dtype=getattr(torch, ours["dtype"]),
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.safetensors, quantization_config=four_bit, dtype=getattr(torch, ours["dtype"])
    )
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        theirs = json.loads((Path(directory) / "config.json").read_text())
        expected, found = tensors(Path(directory)), tensors(args.bitsandbytes)
    print(f"names equal: {expected.keys() == found.keys()} ({len(found)} tensors)")
    different = [name for name in expected.keys() & found.keys() if not torch.equal(expected[name], found[name])]
    print(f"tensors that differ: {len(different)} {different[:5]}")
    print(f"quantization_config equal: {theirs['quantization_config'] == ours['quantization_config']}")
    loaded = AutoModelForCausalLM.from_pretrained(args.bitsandbytes)
    kinds = {type(module).__name__ for name, module in loaded.named_modules() if name.endswith("q_proj")}
    print(f"transformers loads it; its q_proj are {kinds}")


if __name__ == "__main__":
    main()
