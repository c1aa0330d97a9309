"""Memory and time that files take which claim, or expand to, far more than they hold."""

import io
import itertools
import json
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.finetune_helpers import make_tokenizer
from fixtures.tiny_configs import BYTE_LLAMA

pytestmark = pytest.mark.fuzz

MOST_BYTES = 2**30
"""Memory that reading a file may take above its own size."""
MOST_SECONDS = 5.0
LARGE = 100 * 10**6

# VmHWM, not ru_maxrss: that of a child begins with its parent's. Time of the processor: others may be at work on it.
CHILD = """
import sys, time
from qlora_jax.errors import UserError
{imports}

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024

before, start, said = peak(), time.process_time(), "read"
try:
    {read}
except UserError as error:
    said = str(error)
print(peak() - before, time.process_time() - start)
print(said)
"""
GGUF = ("from qlora_jax.checkpoints.gguf_file import read_metadata", "read_metadata(sys.argv[1])")
MODEL = (
    "import pathlib\nfrom qlora_jax.checkpoints.sources import open_source",
    "open_source(pathlib.Path(sys.argv[1]).parent)",
)
ROWS = ("import pyarrow.parquet\nfrom qlora_jax.data import load_rows", "load_rows(sys.argv[1])")
SKIP = (ROWS[0], "load_rows(sys.argv[1], on_bad_row='skip')")
PROMPTS = (
    "from qlora_jax.training.answers import read_prompts\nfrom qlora_jax.training.config import TrainConfig",
    "read_prompts(TrainConfig(prompts=sys.argv[1]))",
)
TOKENIZER = (
    "import pathlib\nfrom qlora_jax.checkpoints.tokenizer import load_tokenizer\n"
    "from qlora_jax.environment import import_transformers\nimport_transformers().PreTrainedTokenizerFast",
    "load_tokenizer(pathlib.Path(sys.argv[1]).parent)",
)


def parquet(values: list[str], indices: list[int], **options: Any) -> bytes:
    """Make a file of a column in which values are kept once."""
    column = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(values))
    file = io.BytesIO()
    pq.write_table(pa.table({"a": column}), file, **options)
    return file.getvalue()


def json_list(unit: bytes, nbytes: int, before: bytes = b'{"a":[') -> bytes:
    return before + (unit + b",") * (nbytes // (len(unit) + 1)) + unit + b"]}\n"


def added_tokens(count: int) -> bytes:
    return b",".join(b'"%d":{"content":"%x!"}' % (300 + i, i) for i in range(count))


def gguf_header(tensors: int, fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


def gguf_array(kind: int, length: int, elements: bytes = b"") -> bytes:
    return gguf_header(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, kind, length) + elements)


def vocabulary(merges: int) -> bytes:
    """Make a tokenizer.json that can be read, of so many tokens and merges."""
    letters = [chr(0x4E00 + i) for i in range(2000)]
    pairs = list(itertools.islice(itertools.product(letters, letters), merges))
    tokens = {token: i for i, token in enumerate([*letters, *map("".join, pairs)])}
    whole = json.loads(make_tokenizer().backend_tokenizer.to_str())
    whole["model"] = {"type": "BPE", "vocab": tokens, "merges": pairs}
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()


UINT8, STRING = 0, 8
CASES: dict[str, tuple[tuple[str, str], str, Callable[[], bytes]]] = {
    "gguf, 2^40 tensors": (GGUF, "a.gguf", lambda: gguf_header(2**40, 0)),
    "gguf, 2^40 fields": (GGUF, "a.gguf", lambda: gguf_header(0, 2**40)),
    "gguf, array of 2^40 numbers": (GGUF, "a.gguf", lambda: gguf_array(UINT8, 2**40)),
    "gguf, array of 2^40 strings": (GGUF, "a.gguf", lambda: gguf_array(STRING, 2**40)),
    "gguf, array of 2^62 strings": (GGUF, "a.gguf", lambda: gguf_array(STRING, 2**62, bytes(64))),
    "gguf, string of 2^40 bytes": (GGUF, "a.gguf", lambda: gguf_header(0, 1, struct.pack("<Q", 2**40))),
    "gguf, numbers": (GGUF, "a.gguf", lambda: gguf_array(UINT8, LARGE, bytes(LARGE))),
    "gguf, most numbers": (GGUF, "a.gguf", lambda: gguf_array(UINT8, 2**20, bytes(2**20))),
    "gguf, empty strings": (GGUF, "a.gguf", lambda: gguf_array(STRING, LARGE // 8, bytes(LARGE))),
    "gguf, most strings": (GGUF, "a.gguf", lambda: gguf_array(STRING, 2**20, bytes(2**23))),
    "safetensors, header of 2^40 bytes": (MODEL, "model.safetensors", lambda: struct.pack("<Q", 2**40) + b"{}"),
    "safetensors, header of all the file": (
        MODEL,
        "model.safetensors",
        lambda: struct.pack("<Q", LARGE) + b"{" + b" " * (LARGE - 2) + b"}",
    ),
    "safetensors, header of brackets": (
        MODEL,
        "model.safetensors",
        lambda: struct.pack("<Q", 24 * 2**20) + b'{"a":[' + b"{}," * (8 * 2**20 - 3) + b"0 ]}"[:3].rjust(3),
    ),
    "jsonl, empty rows": (ROWS, "a.jsonl", lambda: b"{}\n" * (LARGE // 3)),
    "jsonl, bad rows": (SKIP, "a.jsonl", lambda: b"x" * 15 + b"\n" + (b"x" * 31 + b"\n") * 2**18),
    "jsonl, a long row": (ROWS, "a.jsonl", lambda: b'{"a":"' + b"x" * LARGE + b'"}\n'),
    "jsonl, rows of empty lists": (ROWS, "a.jsonl", lambda: 4 * json_list(b"[]", 23 * 2**20)),
    "jsonl, nested": (ROWS, "a.jsonl", lambda: b'{"a":' + b"[" * 20_000_000),
    "json, empty objects": (ROWS, "a.json", lambda: json_list(b"{}", LARGE, b'{"data":[')),
    "json, empty strings": (ROWS, "a.json", lambda: json_list(b'""', LARGE)),
    "json, a long string": (ROWS, "a.json", lambda: b'[{"a":"' + b"x" * LARGE + "\U0001f600".encode() + b'"}]'),
    "csv, a long field": (ROWS, "a.csv", lambda: b"a\n" + b"x" * LARGE + "\U0001f600".encode() + b"\n"),
    "csv, an open quote": (ROWS, "a.csv", lambda: b'a\n"' + b"x\n" * (LARGE // 2)),
    "csv, empty columns": (ROWS, "a.csv", lambda: b"," * LARGE),
    "csv, blank lines": (ROWS, "a.csv", lambda: b"a\n" + b"\n" * LARGE),
    "csv, short rows": (ROWS, "a.csv", lambda: b"a\n" + b"1\n" * (LARGE // 2)),
    "csv, bad rows": (SKIP, "a.csv", lambda: b"a,b\n" + (b"1" * 31 + b"\n") * 2**18),
    "parquet, a value a thousand times": (ROWS, "a.parquet", lambda: parquet(["x" * 10**6], [0] * 1000)),
    "parquet, a long value": (
        ROWS,
        "a.parquet",
        lambda: parquet(["x" * LARGE], [0] * 64, compression="none", store_schema=False),
    ),
    "parquet, zeros": (ROWS, "a.parquet", lambda: parquet(["\0" * 2 * LARGE], [0], compression="zstd")),
    "parquet, many equal rows": (ROWS, "a.parquet", lambda: parquet(["a"], [0] * 10**7)),
    "prompts": (PROMPTS, "prompts.txt", lambda: b"x\n" * (LARGE // 2)),
    "prompts, most": (PROMPTS, "prompts.txt", lambda: b"x\n" * 2**21),
    "tokenizer, lists": (TOKENIZER, "tokenizer.json", lambda: json_list(b"[]", 47 * 2**20, b'{"model":{"a":[') + b"}"),
    "tokenizer, noise": (TOKENIZER, "tokenizer.json", lambda: random.Random(0).randbytes(47 * 2**20)),
    "tokenizer, parts": (
        TOKENIZER,
        "tokenizer.json",
        lambda: json_list(b'{"type":"NFC"}', 15_000_000, b'{"normalizer":{"normalizers":['),
    ),
    "tokenizer, added tokens": (
        TOKENIZER,
        "tokenizer_config.json",
        lambda: b'{"tokenizer_class":"PreTrainedTokenizerFast","added_tokens_decoder":{' + added_tokens(60_000) + b"}}",
    ),
    "tokenizer, special tokens": (
        TOKENIZER,
        "special_tokens_map.json",
        lambda: json.dumps({"additional_special_tokens": [f"{i}!" for i in range(50_000)]}).encode(),
    ),
    "tokenizer, many keys": (
        TOKENIZER,
        "tokenizer_config.json",
        lambda: json.dumps(dict.fromkeys(map(str, range(500_000)), 1)).encode(),
    ),
    "tokenizer, large vocabulary": (TOKENIZER, "tokenizer.json", lambda: vocabulary(610_000)),
}


@pytest.mark.parametrize("name", CASES)
def test_memory(name, tmp_path):
    (imports, read), file_name, content = CASES[name]
    file = tmp_path / file_name
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BYTE_LLAMA))
    file.write_bytes(content())
    argv = [sys.executable, "-c", CHILD.format(imports=imports, read=read), str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers, _, said = done.stdout.partition("\n")
    took, seconds = map(float, numbers.split())
    size = file.stat().st_size
    print(f"{name}: {size / 2**20:.0f} MiB file, {took / 2**20:.0f} MiB, {seconds:.1f} s: {said[:200]}")
    assert said == "read\n" or file_name in said or str(tmp_path) in said
    assert took < MOST_BYTES + size
    assert seconds < MOST_SECONDS
