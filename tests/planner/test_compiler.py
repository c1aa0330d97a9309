"""Training steps compiled for a GPU that is not here, and the child process that compiles them."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fixtures import compile_in_child
from fixtures.tiny_configs import SMALL

from qlora_jax import models
from qlora_jax.errors import UserError
from qlora_jax.extras import install_command
from qlora_jax.gpus import CHIPS, ahead_of_time, chip_named
from qlora_jax.planner import Plan, compiler
from qlora_jax.planner.compiler import CompilationFailed, CompiledStep, Compiler
from qlora_jax.planner.scopes import OTHER
from qlora_jax.training.config import TrainConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "plan.py"
GIB = 2**30


# Without Pallas kernels, and with fewer shapes of adapters, both of which take the compiler long.
SHARED = {"gradient_accumulation_steps": 1, "lora_r": 16, "lora_modules": "attention", "kernel": "xla"}


def compiled(gpu: str, cases: list[dict[str, Any]]) -> list[Any]:
    """Compiled steps of a small model; runs in a child."""
    found, model = [], models.model_config(SMALL)
    for case in cases:
        flags = {**SHARED, **case}
        length = flags.pop("length", 256)
        found.append(dataclasses.asdict(compiler.compile_step(TrainConfig(**flags), model, chip_named(gpu), length)))
    return found


CASES = [
    {},
    {"length": 1024},
    {"per_device_train_batch_size": 4},
    {"lora_r": 64},
    {"bits": 16, "optim_placement": "host", "gradient_accumulation_steps": 2, "packing": True, "lora_dropout": 0.1},
]


@pytest.fixture(scope="session")
def steps() -> list[CompiledStep]:
    """Compiled steps, one for each of CASES."""
    with ThreadPoolExecutor(2) as pool:  # of children
        parts = [
            pool.submit(compile_in_child.call, "test_compiler:compiled", "a6000", CASES[start::2], timeout=600)
            for start in (0, 1)
        ]
        first, second = (part.result() for part in parts)
    in_order = [value for pair in itertools.zip_longest(first, second) for value in pair if value is not None]
    return [CompiledStep.from_json(value) for value in in_order]


@pytest.mark.compile
def test_totals_are_the_sum_of_the_compiled_parts(steps):
    for found in steps:
        plan = Plan(CHIPS["a6000"], found.phases, found.host)
        gradients, update = found.phases
        assert plan.device_bytes == sum(plan.by_class.values())
        assert all(count >= 0 for phase in found.phases for count in phase.by_class.values())
        # No arguments of the gradients' program: the optimizer's state, and what it does not read of the batch and the
        # number of the step.
        rest = gradients.device_bytes - gradients.program.peak - gradients.resident["optimizer_device"]
        assert 0 <= rest <= (gradients.resident["batch"] - 4) / 4 + 4
        assert gradients.results["gradients"] <= gradients.program.outputs
        # The update takes the largest chunk at a time.
        assert update.program.arguments < update.device_bytes
        assert update.resident["gradients"] == gradients.results["gradients"]


@pytest.mark.compile
def test_temporaries_belong_to_named_scopes(steps):
    for found in steps:
        program = found.phases[0].program
        assert 0.9 * program.temporaries <= sum(program.scopes.values()) <= program.temporaries
        assert program.scopes.get(OTHER, 0) < 0.1 * program.temporaries


@pytest.mark.compile
def test_more_tokens_rows_and_rank_take_more_memory(steps):
    totals = [Plan(CHIPS["a6000"], found.phases, found.host).device_bytes for found in steps]
    assert totals[0] < totals[1]
    assert totals[0] < totals[2]
    assert totals[0] < totals[3]
    smallest, longer, wider, *_ = (found.work for found in steps)
    assert (longer.tokens, wider.tokens) == (4 * smallest.tokens, 4 * smallest.tokens)
    assert 4 * smallest.flops < longer.flops  # attention grows with the square
    assert wider.flops == pytest.approx(4 * smallest.flops)


@pytest.mark.compile
def test_the_classes_are_those_of_the_flags(steps):
    plain, _, _, higher, on_host = steps
    adapted = [(576, 576)] * 2 + [(192, 576)] * 2
    adapters = 2 * sum(16 * (n + k) for n, k in adapted)
    resident = plain.phases[0].resident
    assert resident["adapters"] == 2 * adapters  # a copy in bfloat16
    assert plain.phases[0].results["gradients"] == 4 * adapters
    assert 12 * adapters <= resident["optimizer_device"] < 12.1 * adapters  # two moments and the masters
    assert higher.phases[0].resident["adapters"] == 4 * resident["adapters"]
    assert resident["base_packed"] == (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536) * 2 // 2
    assert resident["unquantised_embedding"] == 2 * 1024 * 576
    assert on_host.phases[0].resident["optimizer_device"] == 0
    assert on_host.host["optimizer_host"] == resident["optimizer_device"]
    assert 0 < on_host.phases[1].resident["optimizer_passing"] < on_host.host["optimizer_host"]
    assert on_host.work.host_bytes == on_host.host["optimizer_host"]
    assert plain.work.host_bytes == 0
    assert on_host.phases[0].resident["unquantised_linear"] == 4 * resident["base_packed"]
    assert "base_packed" not in on_host.phases[0].resident
    assert {found.cudnn for found in steps} == {bool(importlib.util.find_spec("nvidia.cudnn"))}


def plan_7b(*flags: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "llama-7b", "--gpu", "rtx4090", "--seq", "512", *flags, "--json"]
    # Without what tests set: the script finds out by itself that no GPU is here.
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.compile
def test_a_plan_of_a_7b():
    found = plan_7b("--optim_placement", "host", "--dataset_rows", "52000")
    assert found["model"] == "llama-7b"
    assert (found["gpu"], found["seq"], found["batch"]) == ("rtx4090", 512, 1)
    assert found["device_limit_bytes"] == 24 * GIB
    assert found["fits"] is True
    assert found["max_seq"] is None
    on_device = {name: count for name, count in found["by_class"].items() if not name.startswith("host_")}
    assert sum(on_device.values()) == found["device_bytes"]
    on_host = sum(found["by_class"].values()) - found["device_bytes"]
    assert on_host == found["host_bytes"] > 0
    assert found["by_class"]["base_packed"] == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) // 2
    assert found["by_class"]["allowance"] == 512 * 2**20 + math.ceil(0.02 * 24 * GIB)
    # The paper's 6.9 GB, of a run with these flags.
    assert found["device_bytes"] - found["by_class"]["allowance"] < 6.9e9
    assert [program["name"] for program in found["programs"]] == ["gradients", "optimizer update"]
    update = found["programs"][1]["by_class"]
    assert 0 < update["optimizer_passing"] <= 0.05 * found["by_class"]["host_optimizer_host"]
    # Two to three passes over 6.5 billion weights, a multiply-add each, by a card of 165 TFLOP/s; adapters too.
    one_pass = 2 * 6.5e9 * 512 * 16 / 165.2e12
    assert 2 * one_pass < found["seconds_a_step_at_least"] < 3.2 * one_pass
    assert found["tokens_per_second_at_most"] == pytest.approx(16 * 512 / found["seconds_a_step_at_least"])
    assert found["seconds_for_the_dataset_at_least"] == pytest.approx(52000 / 16 * found["seconds_a_step_at_least"])
    assert (found["attention"] == "cudnn") == (not found["warnings"])


# --- the child process


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "import os, sys; sys.stdin.readline(); sys.stderr.write('LLVM ERROR: no such instruction\\n'); os.abort()",
            r"ended its process \(SIGABRT: LLVM ERROR: no such instruction\) over the step of 128 tokens for a6000",
        ),
        ("import sys; sys.exit(3)", r"ended its process \(exit status 3\)"),
    ],
)  # fmt: skip
def test_a_compiler_that_aborts_is_one_sentence(program, message, monkeypatch):
    monkeypatch.setattr(compiler, "_COMMAND", (sys.executable, "-c", program))
    with Compiler(CHIPS["a6000"]) as compile_step:
        for _ in range(2):  # and is started again
            with pytest.raises(CompilationFailed, match=message):
                compile_step(TrainConfig(), models.model_config(SMALL), 128)


def test_what_the_child_says_comes_back(monkeypatch):
    for answer, kind in (({"error": "no plugin"}, UserError), ({"failed": "no memory"}, CompilationFailed)):
        program = f"import sys; sys.stdin.readline(); print({json.dumps(answer)!r})"
        monkeypatch.setattr(compiler, "_COMMAND", (sys.executable, "-c", program))
        with Compiler(CHIPS["a6000"]) as compile_step, pytest.raises(kind, match=next(iter(answer.values()))):
            compile_step(TrainConfig(), models.model_config(SMALL), 128)


def request(**changes: Any) -> dict[str, Any]:
    config = dataclasses.asdict(TrainConfig(gradient_accumulation_steps=1))
    return {"config": config, "model": SMALL, "stored": [], "gpu": "a6000", "length": 128, **changes}


def test_the_child_answers_what_cannot_be_planned(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "_PLUGINS", ("jax_plugins.no_such_plugin",))
    ahead_of_time.topology.cache_clear()
    assert install_command("plan") in compiler._answer(request())["error"]
    assert "vocab_size should be" in compiler._answer(request(model={**SMALL, "vocab_size": 0}))["error"]
    assert "No GPU is called" in compiler._answer(request(gpu="a5000"))["error"]

    def fails(*_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: too much\nand a page of it")

    monkeypatch.setattr(compiler, "compile_step", fails)
    assert compiler._answer(request()) == {"failed": "RESOURCE_EXHAUSTED: too much"}
