"""Attention of every family in programs compiled for GPUs: cuDNN's where it can do it, and why not where it cannot."""

import importlib.util

import pytest
from fixtures import families
from fixtures.compile_in_child import call
from fixtures.tiny_configs import LLAMA

from qlora_jax import models

CONFIGS = {"LLaMA, Mistral": LLAMA} | {
    families.title(name): families.CASES[name]["config"] for name in families.ONE_A_FAMILY
}
"""A tiny model of each family."""

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.cudnn") is None,
        reason="needs cuDNN: pip install 'qlora-jax[plan]'",
    ),
]
# One linear with an adapter: the compiler works on attention, not on what is around it.
FLAGS = {"bits": 16, "kernel": "xla", "lora_modules": "q_proj", "lora_r": 8, "gradient_accumulation_steps": 1}
LENGTH = 320  # no other dimension


def test_every_family_is_here():
    assert set(CONFIGS) == {family.title for family in models.FAMILIES.values()}


@pytest.mark.parametrize("family", CONFIGS)
def test_training_keeps_no_scores(family):
    """On rows of one document and on packed ones, [B, H, S, S] exists nowhere; packed rows have a mask [B, 1, S, S]."""
    runs = [[CONFIGS[family], {**FLAGS, "packing": packing}, LENGTH] for packing in (False, True)]
    for found in call("fixtures.compiled_programs:compiled", "rtx4090", [["attention", *run] for run in runs]):
        assert set(found["obstacles"]) == {None}
        forward, backward = found["calls"]
        assert forward >= backward >= len(found["obstacles"])
        assert not found["scores"]


WIDE, ODD = "The head dim must be <= 128", "Unsupported sequence length Q 511"
OBSTACLES = [
    ("rtx4090", "llama-3.1-8b", False, 512, None),
    ("a100", "llama-7b", True, 512, None),
    ("a6000", "qwen2.5-7b", True, 511, ODD),
    ("h100", "qwen3-8b", True, 511, ODD),
    ("l4", "mistral-7b", False, 511, ODD),
    ("rtx3090", "gemma3-1b", False, 512, WIDE),
    ("h100", "gemma3-1b", False, 512, None),
    ("b200", "gemma3-4b", True, 512, None),
]


def test_what_cudnn_cannot_do_is_known_by_chip_width_and_length():
    cases = [list(case[:4]) for case in OBSTACLES]
    for case, found in zip(OBSTACLES, call("fixtures.compiled_programs:obstacles", cases), strict=True):
        for obstacle in found:
            assert obstacle is None if case[4] is None else obstacle.startswith(case[4]), case
