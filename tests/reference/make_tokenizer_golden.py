"""Write tests/golden/smollm2_tokenizer.json: what other programs make of the tokenizers that GGUF files carry.

Run with an environment that has torch, transformers, gguf, safetensors, ml_dtypes and sentencepiece:

    python tests/reference/make_tokenizer_golden.py SmolLM2-135M-Instruct.Q4_1.gguf

- "full": ids of SmolLM2's whole vocabulary, read by transformers. transformers ignores `tokenizer.ggml.pre` = "smollm",
  which says that digits are cut off one by one before anything else (the model's own tokenizer.json and llama.cpp do);
  that step is put in front of its result. "unchanged" counts the strings for which it makes no difference.
- "small": the same for a vocabulary cut down to its first merges, so that tests need no download.
- "sentencepiece": a small BPE model trained here, with byte fallback, and sentencepiece's own ids.
"""

import io
import json
import sys
import tempfile
from pathlib import Path

import gguf
import sentencepiece
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from fixtures.checkpoint_helpers import add_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "smollm2_tokenizer.json"
MERGES = 400
TEXTS = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three,    four, and\ttabs\t\tand\n\nnewlines\r\n",
    "    indented = [i ** 2 for i in range(10)]\n    return indented",
    "def f(x: int) -> str:\n\treturn f'{x:>8}'  # comment\n",
    "1234567890 3.14159 1,000,000 0x1F 2e-4",
    "in 2024  5 of   12 items\n\n7",
    "a1b22c333",
    "don't I'll we've they're it's I'd I'm DON'T",
    "CamelCase snake_case kebab-case SCREAMING",
    "naïve café coöperate façade Ångström",
    "Zażółć gęślą jaźń",
    "Съешь же ещё этих мягких французских булок",
    "いろはにほへと 漢字とカナ",
    "한국어 문장입니다.",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "ไทยไม่มีเว้นวรรค",
    "🙂👍🏽👨‍👩‍👧🇩🇪",
    "½ ² Ⅷ ① ٤",
    "e\u0301 \u00e9 \u200b\u200d\ufeff",
    "\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522 \U00010348",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|endoftext|> <repo_name>x<file_sep>",
    "<|im_end|",
    "https://example.org/a?b=c&d=%20#frag",
    "$E = mc^2$ \\frac{a}{b} \\\\ {}",
    "!!! ... ?! --- *** ((( ))) ;;",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "\x00\x01\x7f\u00a0\u3000\u2028",
    "▁ underscores ▁▁ of sentencepiece",
]


def transformers_ids(path: Path, digits_first: bool) -> list[list[int]]:
    """Ids without special tokens around the text."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if digits_first:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]


def small_vocabulary(path: Path) -> dict:
    """Special tokens, the byte alphabet and the first merges of a byte-level BPE vocabulary."""
    fields = gguf.GGUFReader(path).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    merges = merges[:MERGES]
    wanted = {"".join(merge.split(" ")) for merge in merges}
    kept = [(t, k) for t, k in zip(tokens, types, strict=True) if k != 1 or len(t) == 1 or t in wanted]
    names = [token for token, _ in kept]
    special = {"bos": "<|im_start|>", "eos": "<|im_end|>", "unk": "<|endoftext|>", "pad": "<|im_end|>"}
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": names,
        "types": [int(kind) for _, kind in kept],
        "merges": merges,
        "special": {key: names.index(token) for key, token in special.items()},
        "chat_template": fields["tokenizer.chat_template"].contents(),
    }


def write_vocabulary(path: Path, tokenizer: dict) -> None:
    """A GGUF file with nothing but a tokenizer (and the configuration transformers insists on)."""
    writer = gguf.GGUFWriter(path, "llama")
    for add in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{add}")(64)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, **tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def train_sentencepiece() -> tuple[dict, list[list[int]]]:
    """A small sentencepiece BPE model in GGUF's terms, and its ids."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines() if line.strip()]),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    ids = range(model.vocab_size())
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6), (model.is_unused, 5))
    tokenizer = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "types": [next((kind for test, kind in kinds if test(i)), 1) for i in ids],
        "special": {"unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id()},
    }
    return tokenizer, [model.encode(text) for text in TEXTS]


def main() -> None:
    """Write the golden file."""
    path = Path(sys.argv[1])
    full, plain = transformers_ids(path, True), transformers_ids(path, False)
    small = small_vocabulary(path)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "small.gguf"
        write_vocabulary(file, small)
        small_ids = transformers_ids(file, True)
    messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    chat = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).apply_chat_template(messages, tokenize=False)
    sentencepiece_model, sentencepiece_ids = train_sentencepiece()
    golden = {
        "texts": TEXTS,
        "full": full,
        "unchanged": sum(a == b for a, b in zip(full, plain, strict=True)),
        "small": {"tokenizer": small, "ids": small_ids, "messages": messages, "chat": chat},
        "sentencepiece": {"tokenizer": sentencepiece_model, "ids": sentencepiece_ids},
    }
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{GOLDEN}: {golden['unchanged']} of {len(TEXTS)} texts are cut the same without the digits step")


if __name__ == "__main__":
    main()
