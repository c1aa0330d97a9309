"""Write logits of the real SmolLM2-135M-Instruct, computed by transformers in float32 from its GGUF file.

    python make_smollm2_golden.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --output ../golden/smollm2_logits.npz \
        --export-f32 smollm2-hf-f32 --export-bf16 smollm2-hf

`smollm2_logits.npz` holds `prompts` (the texts), `sampled_ids` int32 [512] (vocabulary entries drawn once) and, for
prompt i: `<i>/input_ids` int32 [S], `<i>/positions` int32 [P] (the last ones), `<i>/top_ids` int32 and `<i>/top_logits`
float32 [P, 64] (largest first), `<i>/sampled_logits` float32 [P, 512], `<i>/greedy_ids` int32 [24] (greedy
continuation, without a stop at EOS).

Optionally exports Hugging Face directories (config, tokenizer, safetensors) of the same dequantised weights; the
float32 one holds them exactly, the bfloat16 one rounds them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "The capital of France is",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    # 0, 1, 1, 2, 3, 5, 8, 13, 21, 34\n    if n < 2:\n        return",
)
STORED_POSITIONS = 4
TOP = 64
SAMPLED = 512
GREEDY = 24


def export(model: torch.nn.Module, tokenizer: object, directory: Path, dtype: torch.dtype) -> None:
    """Save model and tokenizer as a Hugging Face directory of plain `dtype` tensors."""
    model.config.dtype = dtype
    for owner, name in (  # what transformers remembers of the GGUF file
        (model.config, "quantization_config"),
        (model.config, "_pre_quantization_dtype"),
        (model.config, "_model_name_or_path"),
        (model, "hf_quantizer"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """Compute and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--export-f32", type=Path)
    parser.add_argument("--export-bf16", type=Path)
    args = parser.parse_args()

    where = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager").eval()

    if args.output:
        sampled = np.sort(np.random.default_rng(0).choice(model.config.vocab_size, SAMPLED, replace=False))
        arrays = {"prompts": np.array(PROMPTS), "sampled_ids": sampled.astype(np.int32)}
        for index, prompt in enumerate(PROMPTS):
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0, -STORED_POSITIONS:]
            greedy = ids
            for _ in range(GREEDY):
                with torch.no_grad():
                    next_id = model(greedy, use_cache=False).logits[:, -1:].argmax(-1)
                greedy = torch.cat([greedy, next_id], dim=1)
            top = torch.topk(logits, TOP)
            length = ids.shape[1]
            arrays[f"{index}/input_ids"] = ids[0].numpy().astype(np.int32)
            arrays[f"{index}/positions"] = np.arange(length - STORED_POSITIONS, length, dtype=np.int32)
            arrays[f"{index}/top_ids"] = top.indices.numpy().astype(np.int32)
            arrays[f"{index}/top_logits"] = top.values.numpy()
            arrays[f"{index}/sampled_logits"] = logits[:, sampled].numpy()
            arrays[f"{index}/greedy_ids"] = greedy[0, length:].numpy().astype(np.int32)
            print(repr(prompt), "->", repr(tokenizer.decode(greedy[0, length:])))
        np.savez_compressed(args.output, **arrays)
    if args.export_f32:
        export(model, tokenizer, args.export_f32, torch.float32)
    if args.export_bf16:
        export(model, tokenizer, args.export_bf16, torch.bfloat16)


if __name__ == "__main__":
    main()
