"""Whole fine-tuning runs for tests: a tiny model with a tokenizer on disk, a small data set, and ways to run, kill and
compare `scripts/finetune.py`.
"""

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from checkpoint_helpers import hf_shapes, write_hf
from tiny import random_weights
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SCRIPT = Path(__file__).parent.parent / "scripts" / "finetune.py"
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,  # 256 bytes, the special tokens, and rows that no token uses
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
# A fixed warm-up and learning rate at which a dozen steps show; everything else is what a small run needs.
SMALL = {
    "lora_r": 4,
    "lora_alpha": 8.0,
    "source_max_len": 96,
    "target_max_len": 32,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_dataset_size": 4,
    "max_steps": 12,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 3,
    "report_to": "none",
    "max_new_tokens": 4,
}
MEASURED = ("tokens_per_second", "seconds")


def make_tokenizer(*, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and ChatML's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    named = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1]} | ({"eos_token": SPECIAL[2]} if eos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(directory: Path, *, eos: bool = True) -> Path:
    """A complete Hugging Face directory of random float32 weights."""
    write_hf(directory, CONFIG, random_weights(hf_shapes(CONFIG).items(), seed=3))
    make_tokenizer(eos=eos).save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_rows(count: int = 40) -> list[dict[str, str]]:
    """Questions of two lengths (two buckets) whose answers follow a rule that can be learnt."""
    rows = []
    for i in range(count):
        word = "".join(chr(97 + (7 * i + 3 * j) % 26) for j in range(4 + i % 5))
        padding = " please" * (8 if i % 3 == 0 else 1)
        rows.append({"input": f"say {word}{padding}: ", "output": f"{word} {word}!"})
    return rows


def flags(**values: Any) -> list[str]:
    """{"max_steps": 3} -> ["--max_steps", "3"]."""
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | extra


def start(argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """finetune.py in a process of its own."""
    options.setdefault("env", environment())
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) once it has ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def run(argv: Sequence[str], **options: Any) -> tuple[int, str, str]:
    """finetune.py in a process of its own, to its end."""
    return finish(start(argv, **options))


def call(argv: Sequence[str]) -> int:
    """finetune.py in this process, which spares seconds of imports; its exit status."""
    from qlora_jax import cli

    spec = importlib.util.spec_from_file_location("finetune_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, ["finetune.py", *argv]
    try:
        cli.run(module.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before


def error_line(err: str) -> str:
    """What follows `error: ` in the only line of stderr."""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    return lines[0].removeprefix("error: ")


def last_error(err: str) -> str:
    """What follows `error: ` in the last line of stderr; before it there may only be the progress bar."""
    *bar, last = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith("training:") for line in bar), err
    return error_line(last)


def metrics(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, each line strict JSON (no NaN)."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def reproducible(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what a clock measured."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def line_count(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool], timeout: float = 240) -> bool:
    """Wait for a condition; False if the process ended before it held."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)
    return True


def kill(process: subprocess.Popen[str]) -> bool:
    """SIGKILL; False if it had ended by itself."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_run(directory: Path, golden: Path) -> None:
    """Assert that a run came to what another came to, bit for bit."""
    got, want = reproducible(metrics(directory)), reproducible(metrics(golden))
    assert [line["step"] for line in got] == [line["step"] for line in want]
    assert got == want
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert digest(directory / "adapter" / name) == digest(golden / "adapter" / name), name
    assert json.loads((directory / "answers.json").read_text()) == json.loads((golden / "answers.json").read_text())
    summaries = [json.loads((path / "summary.json").read_text()) for path in (directory, golden)]
    for summary in summaries:
        for name in ("seconds", "adapter", "step_shapes_compiled", "planned_peak_bytes"):
            del summary[name]
    assert summaries[0] == summaries[1]
    assert sorted(path.name for path in directory.iterdir() if path.name != "tensorboard") == sorted(
        path.name for path in golden.iterdir() if path.name != "tensorboard"
    )
