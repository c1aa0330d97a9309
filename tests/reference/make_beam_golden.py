"""Search with beams by transformers, on a tiny random model, for every setting of a list.

ref/bin/python make_beam_golden.py ../golden/beams.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from random_weights import random_weights
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SEED, NEW = 3, 12
# Many tokens end an answer, so that beams do.
EOS = list(range(5, 96, 9))
SETTINGS = [
    {"num_beams": 1},
    {"num_beams": 3},
    {"num_beams": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 2.5},
    {"num_beams": 3, "length_penalty": 2.5, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 3, "repetition_penalty": 1.5},
    {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
    {"num_beams": 5, "max_new_tokens": 3},
]


def main() -> None:
    """Write prompts, settings, and the continuations that transformers returns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")).eval()
    specs = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    rng = np.random.default_rng(SEED)
    prompts = [rng.integers(0, CONFIG["vocab_size"], length).tolist() for length in (1, 6, 19)]
    results = []
    with torch.no_grad():
        for name, value in random_weights(specs, SEED).items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
        for settings in SETTINGS:
            options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0, **settings}
            of_prompts = []
            for prompt in prompts:
                ids = torch.tensor([prompt])
                found = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    num_return_sequences=settings["num_beams"],
                    return_dict_in_generate=True,
                    output_scores=True,
                    **options,
                )
                rows = [row[len(prompt) :] for row in found.sequences.tolist()]
                ends = [next((i + 1 for i, token in enumerate(row) if token in EOS), len(row)) for row in rows]
                scores = found.sequences_scores.tolist() if settings["num_beams"] > 1 else [None]
                of_prompts.append([[row[:end], score] for row, end, score in zip(rows, ends, scores, strict=True)])
            results.append({"settings": settings, "beams": of_prompts})
            print(settings, [len(beams[0][0]) for beams in of_prompts])
    document = {"config": CONFIG, "seed": SEED, "eos": EOS, "new": NEW, "prompts": prompts, "results": results}
    args.output.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
