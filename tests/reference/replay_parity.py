"""Train on the parity rows with qlora-jax and compare every loss with the reference stack's (project environment).

    python replay_parity.py --model smollm2-hf-f32 --golden ../golden --run fp32_random [--output ours.json]

Model, adapter, rows and settings are those of parity.py, whose losses are in `parity_smollm2.json`; the adapter is made
again from its seed. Any form of the same weights will do: the float32 directory or the GGUF file.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from random_weights import random_adapter

from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.checkpoints.peft import AdapterConfig, save_adapter
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.models import DecoderConfig, base_tensors
from qlora_jax.training.config import StepConfig, TrainConfig
from qlora_jax.training.model import load_model
from qlora_jax.training.run_state import initial_state
from qlora_jax.training.schedule import make_optimizer
from qlora_jax.training.setup import compute_dtype, declare, make_devices
from qlora_jax.training.step import make_train_step


def load_rows(path: Path) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
    """One batch a step, each array int32 [1, B, S], and the adapters' settings."""
    rows = np.load(path)
    settings = {name: rows[name].item() for name in rows.files if rows[name].ndim == 0}
    positions = np.arange(rows["input_ids"].shape[-1], dtype=np.int32)
    batches = []
    for ids, lengths, sources in zip(rows["input_ids"], rows["lengths"], rows["source_lengths"], strict=True):
        real = positions < lengths[:, None]
        labels = np.where(real & (positions >= sources[:, None]), ids.astype(np.int32), -100)
        arrays = {
            "input_ids": ids,
            "labels": labels,
            "positions": np.where(real, positions, 0),
            "segment_ids": real,
        }
        batches.append({name: values.astype(np.int32)[None] for name, values in arrays.items()})
    return batches, settings


def linears(config: DecoderConfig) -> dict[tuple[str, ...], tuple[int, int, int]]:
    """Stacked shapes (L, out, in) of every linear but the head."""
    shapes: dict[tuple[str, ...], tuple[int, int, int]] = {}
    for spec in base_tensors(config):
        if spec.kind == "linear":
            shapes[spec.path[:-1]] = (config.num_hidden_layers, *spec.shape)
    return shapes


def replay(model: Path, rows_path: Path, run: dict, kernel: str = "auto") -> tuple[list[float], list[float]]:
    """Losses and gradient norms (before clipping) of every step of a run of parity.py."""
    batches, settings = load_rows(rows_path)
    name = run["adapter"].removeprefix("adapter-")
    model_config = open_source(model).config
    shapes = linears(model_config)
    lora = random_adapter(shapes, settings["rank"], settings["adapter_seed"], settings[f"b_scale_{name}"])
    with tempfile.TemporaryDirectory() as directory:
        adapter = save_adapter(
            directory,
            lora,
            AdapterConfig(
                int(settings["rank"]), float(settings["alpha"]), 0.0, tuple(path[-1] for path in shapes), None
            ),
            model_config,
        )
        config = TrainConfig(
            bits=4,
            model_name_or_path=str(model),
            adapter=str(adapter),
            bf16=run["compute_dtype"] == "bf16",
            lora_dropout=0.0,
            learning_rate=run["learning_rate"],
            max_grad_norm=run["max_grad_norm"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            adam_beta2=0.999,
            kernel=kernel,
        )
        devices = make_devices(config)
        loaded = load_model(config, model, declare(config, resolve_config(model)), devices)
        optimizer = make_optimizer(config, len(batches), loaded.parts.lora, dtype=compute_dtype(config))
        state = initial_state(config, loaded, optimizer, devices).state
    step = make_train_step(loaded.parts.graphdef, optimizer, StepConfig(max_grad_norm=config.max_grad_norm))
    losses, grad_norms = [], []
    for batch in batches[: len(run["losses"])]:
        begin = time.perf_counter()
        state, report = step(state, loaded.parts.frozen, jax.device_put(batch))
        losses.append(float(report.loss))
        grad_norms.append(float(report.grad_norm))
        print(f"step {len(losses):3} loss {losses[-1]:.6f} {time.perf_counter() - begin:.1f} s", flush=True)
    return losses, grad_norms


def main() -> None:
    """Replay one run and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    run = json.loads((args.golden / "parity_smollm2.json").read_text())[args.run]
    losses, grad_norms = replay(args.model, args.golden / "parity_smollm2_rows.npz", run)
    print("step   reference        ours   loss differs by   gradient norm by")
    for index, (theirs, ours) in enumerate(zip(run["losses"], losses, strict=True)):
        norms = grad_norms[index] / run["grad_norms"][index] - 1
        print(f"{index + 1:4} {theirs:11.6f} {ours:11.6f} {100 * (ours / theirs - 1):+15.4f} % {100 * norms:+15.4f} %")
    worst = np.abs(np.array(losses) / np.array(run["losses"]) - 1).max()
    print(f"largest difference of a loss: {100 * worst:.4f} %")
    if args.output:
        args.output.write_text(json.dumps({"losses": losses, "grad_norms": grad_norms}, indent=1) + "\n")


if __name__ == "__main__":
    main()
