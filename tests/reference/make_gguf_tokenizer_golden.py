"""Write tests/golden/gguf_tokenizers.json: ids that Qwen's and Gemma's own tokenizers give, for their GGUF metadata.

    python tests/reference/make_gguf_tokenizer_golden.py

Run with an environment that has transformers and sentencepiece (torch is not needed).

- "qwen2": byte-level BPE with a cut-down vocabulary, by transformers' Qwen2Tokenizer.
- "gemma": a small sentencepiece model with what Gemma's has: no space in front of a text, byte fallback, digits by
  themselves, and symbols that are never cut: runs of spaces and of line feeds, HTML tags, turns. Ids are
  sentencepiece's own. llama.cpp's converter (`_create_vocab_sentencepiece`, conversion/base.py) takes the types of
  tokens from tokenizer_config.json where it lists them: special ones are "control", others "user defined", with spaces
  for their U+2581, all with score -1000.
"""

import io
import json
from pathlib import Path

import sentencepiece
import transformers
from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
SMOLLM2 = json.loads((GOLDEN / "smollm2_tokenizer.json").read_text())
TEXTS = [
    *SMOLLM2["texts"],
    "<think>\nHm.\n</think>\n\nYes.",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "\n\n\n\n\n\n\n",
    "a\n\n\n b\n \n\n c",
    *(" " * width + "x" for width in (1, 2, 3, 5, 9, 13)),
    "x     ",
    "<table>\n  <td> two </td>\n</table>",
    "▁▁▁x▁y",
    "Ångström e\u0301tude\u0323\u0307 ﬁn",
]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CHAT = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"


def qwen2() -> dict:
    """Vocabulary, merges and ids of byte-level BPE."""
    small = SMOLLM2["small"]["tokenizer"]
    words = [token for token, kind in zip(small["tokens"], small["types"], strict=True) if kind == NORMAL]
    special, added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]
    vocab = {token: i for i, token in enumerate(words)}
    merges = [tuple(merge.split(" ")) for merge in small["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=dict(vocab), merges=merges)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokens = words + special + added
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokens))] == tokens
    return {
        "tokenizer": {
            "model": "gpt2",
            "pre": "qwen2",
            "tokens": tokens,
            "types": [NORMAL] * len(words) + [CONTROL] * len(special) + [USER_DEFINED] * len(added),
            "merges": small["merges"],
            "special": {
                "eos": tokens.index("<|im_end|>"),
                "pad": tokens.index("<|endoftext|>"),
                "bos": tokens.index("<|endoftext|>"),
            },
            "chat_template": CHAT,
        },
        "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS],
    }


def gemma() -> dict:
    """Pieces, scores and ids of sentencepiece BPE."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    whole = ["\n" * n for n in range(1, 5)] + ["▁" * n for n in range(2, 10)]
    whole += ["<table>", "</table>", "<td>", "</td>"]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in SMOLLM2["texts"] for line in text.splitlines() if line.strip()]),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=540,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_digits=True,
        user_defined_symbols=turns + whole,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    kinds = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_byte, BYTE), (model.is_unused, UNUSED))
    tokens, scores, types = [], [], []
    for i in range(model.vocab_size()):
        token, score = model.id_to_piece(i), model.get_score(i)
        kind = next((kind for test, kind in kinds if test(i)), NORMAL)
        if token in turns:
            kind, score = CONTROL, -1000.0
        elif token in whole:
            token, kind, score = token.replace("▁", " "), USER_DEFINED, -1000.0
        tokens.append(token)
        scores.append(score)
        types.append(kind)
    return {
        "tokenizer": {
            "model": "llama",
            "pre": "default",
            "tokens": tokens,
            "scores": scores,
            "types": types,
            "special": {"pad": 0, "eos": 1, "bos": 2, "unk": 3},
            "chat_template": CHAT,
        },
        "ids": [model.encode(text) for text in TEXTS],
    }


def main() -> None:
    """Write the golden file."""
    golden = {
        "versions": {"transformers": transformers.__version__, "sentencepiece": sentencepiece.__version__},
        "texts": TEXTS,
        "qwen2": qwen2(),
        "gemma": gemma(),
    }
    path = GOLDEN / "gguf_tokenizers.json"
    path.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{path}: {len(TEXTS)} texts")


if __name__ == "__main__":
    main()
