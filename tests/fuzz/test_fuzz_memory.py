"""Memory and time that files take which claim, or expand to, far more than they hold."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable

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


def gguf_header(tensors: int, fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


def gguf_array(kind: int, length: int, elements: bytes = b"") -> bytes:
    return gguf_header(0, 1, struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, kind, length) + elements)


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
    assert said == "read\n" or file_name in said
    assert took < MOST_BYTES + size
    assert seconds < MOST_SECONDS
