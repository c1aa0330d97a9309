"""Mutated config.json of every family."""

import json

import pytest
from fixtures import families
from fixtures.tiny_configs import LLAMA
from fuzz.mutations import mutated_json, run_cases, writer

from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.models import base_tensors

pytestmark = pytest.mark.fuzz

CONFIGS = {"llama": LLAMA} | {
    name: families.CASES[name]["config"] for name in ("qwen2_sliding", "qwen3", "gemma3", "gemma3_conditional")
}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 32, "rope_theta": 1e4,
}  # fmt: skip
CONFIGS["yarn"] = {**LLAMA, "rope_parameters": YARN}
CONFIGS["llama3"] = {
    **LLAMA,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
READ = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, cases, tmp_path):
    file = tmp_path / "config.json"

    def check(mutant, config):
        said = json.loads(mutant)
        tied = {"tie_word_embeddings": said["tie_word_embeddings"]} if "tie_word_embeddings" in said else {}
        text = {**said["text_config"], **tied} if "text_config" in said else said
        assert json.dumps(config.source) == json.dumps(said)  # NaN is not equal to itself
        assert [config.architecture] == said["architectures"]
        for field in READ:
            assert field not in text or getattr(config, field) == text[field]
        if "tie_word_embeddings" in text:
            assert config.tie_word_embeddings is text["tie_word_embeddings"]
        assert len(config.attentions) == config.num_hidden_layers
        if len(mutant) % 64 == 0 and config.num_hidden_layers < 100:  # a declared model takes longer than all else
            assert base_tensors(config)[0].shape == (config.vocab_size, config.hidden_size)

    read = writer(file, lambda: resolve_config(file))
    run_cases(cases // len(CONFIGS), lambda rng: mutated_json(CONFIGS[name], rng), read, check, "config.json")
