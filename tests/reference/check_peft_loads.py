"""Load an adapter directory with PEFT, with warnings as errors, and write or compare the adapted model's logits.

    python check_peft_loads.py --model HF_DIR --adapter ADAPTER_DIR [--prompt TEXT | --input-ids IDS.npy] \
        [--logits OURS.npy] [--tolerance 1e-4] [--output PEFT.npy]

The model is computed in float32, unquantised. With `--logits` (float32 [B, S, V] or [S, V]) the exit status is 1 when
the largest difference exceeds the tolerance.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    """Load, compute, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--prompt", default="What is gravity?")
    parser.add_argument("--input-ids", type=Path)
    parser.add_argument("--logits", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    if args.input_ids:
        ids = torch.from_numpy(np.atleast_2d(np.load(args.input_ids))).long()
    else:
        ids = AutoTokenizer.from_pretrained(args.model)(args.prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        base = model(ids, use_cache=False).logits.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's use of transformers
        adapted = PeftModel.from_pretrained(model, args.adapter).eval()

    state = {name: value for name, value in adapted.state_dict().items() if ".lora_" in name}
    with safe_open(args.adapter / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():
            loaded = state.pop(name.replace(".weight", ".default.weight"))
            assert torch.equal(loaded, file.get_tensor(name)), name
    assert not state, f"PEFT has matrices the file lacks: {sorted(state)}"

    with torch.no_grad():
        logits = adapted(input_ids=ids, use_cache=False).logits.numpy()
    print(f"adapter {args.adapter}: loaded, moves the logits by {np.abs(logits - base).max():.3g}")
    if args.output:
        np.save(args.output, logits)
    if args.logits:
        difference = float(np.abs(np.load(args.logits).reshape(logits.shape) - logits).max())
        print(f"largest difference from {args.logits}: {difference:.3g} (tolerance {args.tolerance:g})")
        return int(not difference <= args.tolerance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
