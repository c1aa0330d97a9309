"""Write our greedy continuations of a base with an adapter, for `check_llama_cpp.py` to compare llama.cpp's with.

python export_tokens.py --model base.gguf --adapter run/adapter --quant_type nf4 --output tokens.json
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp

from qlora_jax import models
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.merging import open_adapter
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.generation import Sampling, generate
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.quantization import QuantizationConfig

PROMPTS = (
    "Give me three tips for sleeping well.",
    "What is the capital of France?",
    "Write a short poem about rain.",
    "Why is the sky blue?",
)


def main() -> None:
    """Generate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--quant_type", default="none", help="how the base is stored (none: as it is)")
    parser.add_argument("--tokens", type=int, default=48, help="of each continuation")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    base = load_base(args.model, quantization=QuantizationConfig(args.quant_type), dtype="float32")
    lora, tensors = None, {}
    if args.adapter is not None:
        adapter = open_adapter(args.adapter, base.config, tuple(models.base_tensors(base.config)))
        settings = adapter.config
        lora, tensors = LoRAConfig(settings.rank, settings.alpha, 0.0, settings.target_modules), dict(adapter.tensors)
    model = models.abstract_model(base.config, QLoRAConfig(base.quantization, jnp.float32, lora))
    graphdef, trained, frozen = models.split_model(model)
    trained = models.unflatten_like(trained, tensors, what="adapter")
    tokenizer = load_tokenizer(args.model)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    sampling = Sampling(max_new_tokens=args.tokens)
    answers = generate(
        graphdef, trained, models.fill_base(frozen, base.tensors), prompts, eos_ids=[], sampling=sampling
    )
    found = [
        {"text": text, "prompt": prompt, "answer": answer}
        for text, prompt, answer in zip(texts, prompts, answers, strict=True)
    ]
    args.output.write_text(json.dumps(found) + "\n", encoding="utf-8")
    for each in found:
        print(repr(tokenizer.decode(each["answer"])[:90]))


if __name__ == "__main__":
    main()
