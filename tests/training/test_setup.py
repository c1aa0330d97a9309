"""From a configuration to a model and a training step."""

import json
import logging

import numpy as np
import pytest
from fixtures.tiny_model import GOLDEN

from qlora_jax import models
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.setup import find_adapters

ADAPTER = GOLDEN / "peft_tiny"
MODEL = models.model_config(json.loads(str(np.load(ADAPTER / "golden.npz")["config"])))


@pytest.mark.parametrize(
    ("model", "warned"), [("other/model", True), ("tiny-random-llama", False), ("hub/Tiny-Random-Llama", False)]
)
def test_an_adapter_of_another_model_is_pointed_out(model, warned, caplog):
    with caplog.at_level(logging.WARNING, "qlora_jax"):
        find_adapters(TrainConfig(adapter=str(ADAPTER), model_name_or_path=model), MODEL)
    assert ("was trained on tiny-random-llama, not on other/model" in caplog.text) == warned
