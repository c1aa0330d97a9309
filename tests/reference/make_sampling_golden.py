"""Filter logits with transformers' own processors, as `generate` does, for every setting of a list.

ref/bin/python make_sampling_golden.py ../golden/sampling.npz
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

VOCABULARY, LENGTHS, EOS = 48, (3, 9, 14), 7
SETTINGS = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"min_new_tokens": 6},
    {"do_sample": True, "top_k": 0, "temperature": 0.3},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_k": 0, "top_p": 0.8},
    {"do_sample": True, "top_k": 0, "top_p": 0.05},
    {"do_sample": True, "top_k": 0, "min_p": 0.2},
    {"do_sample": True, "top_k": 0, "typical_p": 0.6},
    {"do_sample": True, "top_k": 0, "typical_p": 0.1, "temperature": 2.0},
    {
        "do_sample": True, "temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9,
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 6,
    },
]  # fmt: skip


def main() -> None:
    """Write logits, histories, and what the processors make of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((len(LENGTHS), VOCABULARY))).astype(np.float32)
    # Few different tokens, so that n-grams come again.
    histories = [rng.integers(0, 4, length) for length in LENGTHS]
    prompt = 2
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=1))
    filtered = np.empty((len(SETTINGS), *logits.shape), np.float32)
    for i, settings in enumerate(SETTINGS):
        config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, **{"do_sample": False, **settings})
        for row, history in enumerate(histories):
            ids = torch.from_numpy(history)[None]
            model._prepare_special_tokens(config, device="cpu")
            processors = model._get_logits_processor(config, input_ids_seq_length=prompt, device="cpu")
            filtered[i, row] = processors(ids, torch.from_numpy(logits[row : row + 1]).clone())[0].numpy()
    np.savez_compressed(
        args.output,
        settings=json.dumps(SETTINGS),
        logits=logits,
        filtered=filtered,
        prompt=prompt,
        eos=EOS,
        **{f"history_{row}": history for row, history in enumerate(histories)},
    )


if __name__ == "__main__":
    main()
