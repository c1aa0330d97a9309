"""Patterns and lists of names from files: what is refused before it takes long, and failures of the child process."""

import sys
import time
from pathlib import Path

import pytest
from fixtures.tiny_configs import BYTE_LLAMA

from qlora_jax import models, patterns
from qlora_jax.checkpoints.peft_modules import Module, named
from qlora_jax.errors import UserError

LONG = [f"{i:04d}{'.' * 500}" for i in range(2048)]


@pytest.mark.parametrize(
    ("field", "subject"),
    [
        ({"quant_method": "awq", "modules_to_not_convert": LONG}, "modules_to_not_convert"),
        ({"quant_method": "gptq", "modules_to_not_convert": LONG}, "modules_to_not_convert"),
        ({"quant_method": "bitsandbytes", "llm_int8_skip_modules": LONG}, "llm_int8_skip_modules"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*a*" * 9**6]}, "ignore"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {f"{i}": {"targets": [f"re:{i}"] * 100} for i in range(64)},
            },
            "config_groups.targets",
        ),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
def test_long_lists_are_refused(field, subject):
    started = time.process_time()
    with pytest.raises(UserError, match=rf"quantization_config\.{subject} has .* too many to compare with \d+ names;"):
        models.model_config({**BYTE_LLAMA, "quantization_config": field})
    assert time.process_time() - started < 1


def test_names_count_as_their_characters():
    entries = ["layers.0"] * 1000
    assert patterns.matching(entries, ["layers.0"], "a") == {"layers.0": {"layers.0"}}
    with pytest.raises(UserError, match=r"^a has 1,000 entries of 8,000 characters, which .* with 1 names; name fewer"):
        patterns.matching(entries, ["." * 300_000], "a")


def test_names_in_a_list_are_looked_up():
    """Thousands of modules and of names: comparing each with each would take minutes."""
    modules = [Module((f"layers.{i}.{'a.' * 50}b", f"{i}"), True) for i in range(3000)]
    started = time.process_time()
    found = named([*(f"{i}.{'a.' * 50}b" for i in range(0, 6000, 2)), "x.b", "", "."], modules, "a")
    assert found == set(modules[::2])
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("echo 'Traceback' >&2; echo 'Fatal: no module named encodings' >&2; exit 1",
         r"^a cannot be matched: .*/python failed to run pattern_child\.py \(Fatal: no module named encodings\)\.$"),
        ("exit 3", r"^a cannot be matched: .*/python failed to run pattern_child\.py \(exit status 3\)\.$"),
        ("kill -SEGV $$", r"^a cannot be matched: .* \(exit status -11\)\.$"),
        ("kill -KILL $$", r"^a is '\(x\)', which takes too long or too much memory to match"),
        ("kill -XCPU $$", r"^a is '\(x\)', which takes too long or too much memory to match"),
        ("echo MemoryError >&2; exit 1", r"^a is '\(x\)', which takes too long or too much memory to match"),
        (None, r"^a cannot be matched: .*/python cannot be run \(No such file or directory\)\.$"),
    ],
)  # fmt: skip
def test_patterns_are_blamed_for_what_they_do_only(
    tmp_path: Path, program: str | None, said: str, monkeypatch: pytest.MonkeyPatch
):
    python = tmp_path / "python"
    if program is not None:
        python.write_text(f"#!/bin/sh\ncat > /dev/null\n{program}\n")
        python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match=said):
        patterns.matching(["(x)"], ["x"], "a")
