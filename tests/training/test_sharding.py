"""A whole run under another sharding rule: nothing but the rule changes, and neither does a bit of the result."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from fixtures import tiny_model
from fixtures.compile_in_child import call

from qlora_jax.quantization import QuantizationConfig
from qlora_jax.sharding import ShardingRules, specs


def runs(directory: str) -> list[list[dict[str, float]]]:
    """Metrics of a run with whole weights, of one with weights cut over two devices, and of that one resumed.

    In a child.
    """
    from fixtures.finetune_helpers import make_model, make_rows, write_jsonl

    from qlora_jax import TrainConfig, finetune
    from qlora_jax.sharding import ShardingRules
    from qlora_jax.training import model, setup

    root = Path(directory)
    source = make_model(root / "model")
    rows = write_jsonl(root / "rows.jsonl", make_rows(16))
    found, whole, held = [], setup.sharding_rules, {}
    real = model.load_base

    def watched(*args, **kwargs):
        base = real(*args, **kwargs)
        codes = base.tensors["layers", "mlp", "up_proj", "weight"].codes
        held[len(held)] = codes.addressable_data(0).size / codes.size
        return base

    model.load_base = watched

    def cut(config):
        return ShardingRules(rows="data", vocabulary="data")

    for name, rules in (("whole", whole), ("cut", cut), ("cut", cut)):
        setup.sharding_rules = rules
        if (root / name).exists():
            shutil.rmtree(root / name / "checkpoint-000003")
            (root / name / "summary.json").unlink()
        config = TrainConfig(
            model_name_or_path=str(source), dataset=str(rows), output_dir=str(root / name), lora_r=4, lora_alpha=8.0,
            source_max_len=64, target_max_len=32, eval_dataset_size=4, max_steps=3, save_steps=2, logging_steps=1,
            eval_steps=0, gradient_accumulation_steps=1, max_new_tokens=2, report_to="none",
        )  # fmt: skip
        finetune(config)
        lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        keep = ("step", "loss", "grad_norm", "eval_loss")
        found.append([{key: line[key] for key in keep if key in line} for line in lines])
    return [*found, list(held.values())]


@pytest.mark.parametrize("quantization", [QuantizationConfig(), QuantizationConfig("none")])
def test_rows_are_cut_of_quantised_weights_only(quantization):
    """Nothing gathers the rows of others, adapters and 16-bit weights among them."""
    _, trained, frozen = tiny_model.build(quantization=quantization)
    rules = ShardingRules(rows="data")
    quantised = quantization.quant_type != "none"
    assert any("data" in spec for spec in jax.tree.leaves(specs(frozen, rules))) == quantised
    assert not any("data" in spec for spec in jax.tree.leaves(specs(trained, rules)))


@pytest.mark.e2e
def test_another_rule_trains_the_same(tmp_path):
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "HF_HUB_OFFLINE": "1"}
    whole, cut, resumed, held = call("test_sharding:runs", str(tmp_path), environment=two, timeout=600)
    assert held == [1.0, 0.5, 0.5]
    assert len(whole) >= 4
    assert cut == resumed == whole
