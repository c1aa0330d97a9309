"""Load an exported GGUF file, or a base with an exported adapter, in llama.cpp and compare greedy continuations.

    ref/bin/pip install llama-cpp-python==0.3.36
    ref/bin/python check_llama_cpp.py --model model-F16.gguf --tokens tokens.json
    ref/bin/python check_llama_cpp.py --model base.gguf --lora adapter.gguf --tokens tokens.json

Compared are the ids of the prompts' texts (the tokenizer), and of every continuation how many tokens are the same until
the first that differs; there, how far llama.cpp's logit of our token is below that of its own.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from llama_cpp import Llama


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--lora")
    parser.add_argument("--tokens", type=Path, required=True)
    args = parser.parse_args()
    llama = Llama(args.model, lora_path=args.lora, n_ctx=512, logits_all=True, verbose=False, n_threads=2)
    same = total = 0
    for case in json.loads(args.tokens.read_text()):
        ids = llama.tokenize(case["text"].encode(), add_bos=False, special=True)
        tokens = "same ids" if ids == case["prompt"] else f"OTHER IDS {ids}"
        llama.reset()
        llama.eval(case["prompt"])
        answer, note = [], ""
        for expected in case["answer"]:
            logits = np.asarray(llama.scores[llama.n_tokens - 1])
            token = int(logits.argmax())
            if token != expected:
                note = f"; at {len(answer)} ours is {logits[token] - logits[expected]:.3f} below its best"
                break
            answer.append(token)
            llama.eval([token])
        same, total = same + len(answer), total + len(case["answer"])
        print(f"{tokens}; {len(answer)} of {len(case['answer'])} tokens{note}")
    print(f"{same} of {total} tokens before the first that differs")


if __name__ == "__main__":
    main()
