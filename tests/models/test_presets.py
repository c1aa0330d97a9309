"""Presets: every parameter of the published models is counted."""

import math

import pytest

from qlora_jax import models

# As the models' own pages count them; Gemma 3 without the vision tower, with the 64 rows its larger vocabularies add.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_099_328 + 64 * 2560,
    "gemma3-12b": 11_765_788_416 + 64 * 3840,
    "gemma3-27b": 27_009_002_240 + 64 * 5376,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_its_models_parameters(name):
    specs = models.base_tensors(models.model_config(models.PRESETS[name]))
    assert sum(math.prod(spec.shape) for spec in specs) == PARAMETERS[name]


def test_every_preset_can_be_read():
    for name, config in models.PRESETS.items():
        assert models.model_config(config).num_hidden_layers == config["num_hidden_layers"], name


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738), ("llama-13b", 13.016), ("llama-33b", 32.529), ("llama-65b", 65.286),
        ("llama-2-70b", 68.977), ("llama-3.1-8b", 8.030), ("llama-3.3-70b", 70.554), ("smollm2-135m", 0.134515),
    ],
)  # fmt: skip
def test_presets_have_the_parameters_of_their_models(name, billions):
    counted = sum(math.prod(spec.shape) for spec in models.base_tensors(models.model_config(models.PRESETS[name])))
    assert counted / 1e9 == pytest.approx(billions, abs=1e-3 if billions > 1 else 1e-6)
