"""Every family through a whole run: converted, trained packed, resumed, its adapter read back."""

import json
import shutil

import pytest
from fixtures import families
from fixtures.checkpoint_helpers import write_hf
from fixtures.finetune_helpers import make_rows, make_tokenizer, read_metrics, write_jsonl
from random_weights import random_weights

from qlora_jax import TrainConfig, finetune, load_adapter, models
from qlora_jax.checkpoints.conversion import convert
from qlora_jax.quantization import QuantizationConfig

pytestmark = pytest.mark.e2e
MEASURED = ("seconds", "tokens_per_second")


def metrics(directory):
    lines = read_metrics(directory)
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def tiny_config(name):
    """The case's configuration with a vocabulary that a tokenizer of bytes fits into."""
    config = json.loads(json.dumps(families.CASES[name]["config"]))
    config.update({"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256, "vocab_size": 264})
    return config


@pytest.mark.parametrize("name", families.ONE_A_FAMILY)
def test_convert_train_resume_and_evaluate(name, tmp_path):
    config = tiny_config(name)
    shapes = {spec.name: spec.shape for spec in models.base_tensors(models.model_config(config))}
    source = write_hf(tmp_path / "model", config, random_weights(shapes.items(), **families.CASES[name]["weights"]))
    make_tokenizer().save_pretrained(source)
    convert(source, tmp_path / "nf4", QuantizationConfig(block_size=32), "float32")

    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(24))
    flags = TrainConfig(
        model_name_or_path=str(tmp_path / "nf4"), dataset=str(rows), output_dir=str(tmp_path / "run"), block_size=32,
        lora_r=4, lora_alpha=8.0, lora_dropout=0.1, packing=True, sequence_length=96, eval_dataset_size=4,
        max_steps=4, save_steps=2, eval_steps=2, logging_steps=1, learning_rate=1e-2, gradient_accumulation_steps=1,
        per_device_train_batch_size=2, max_new_tokens=4, report_to="none",
    )  # fmt: skip
    result = finetune(flags)
    assert result.summary["steps"] == 4
    assert result.summary["last_eval_loss"] < result.summary["first_eval_loss"]
    want = metrics(tmp_path / "run")

    # The run again, from the checkpoint of its second step.
    for gone in ("checkpoint-000004", "adapter"):
        shutil.rmtree(tmp_path / "run" / gone)
    adapter = tmp_path / "first"
    (tmp_path / "run" / "summary.json").unlink()
    finetune(flags)
    assert metrics(tmp_path / "run") == want
    shutil.copytree(tmp_path / "run" / "adapter", adapter)

    # Quantised while it is loaded, with the adapter in PEFT's format: the same evaluation.
    tensors, read = load_adapter(adapter, models.model_config(config))
    assert read.rank == 4 and len(tensors) == 2 * 7
    again = TrainConfig(
        model_name_or_path=str(source), dataset=str(rows), output_dir=str(tmp_path / "eval"), block_size=32,
        packing=True, sequence_length=96, eval_dataset_size=4, adapter=str(adapter), do_train=False,
        max_new_tokens=4, report_to="none",
    )  # fmt: skip
    assert finetune(again).summary["last_eval_loss"] == pytest.approx(want[-1]["eval_loss"], rel=1e-5)
