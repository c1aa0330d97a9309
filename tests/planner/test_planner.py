"""Plans of training steps: what the compiler says adds up, what is advised helps, and how it is all asked for."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fixtures import families
from fixtures.finetune_helpers import make_model, make_rows, write_jsonl
from fixtures.tiny_configs import SMALL

from qlora_jax import finetuning, gpus, models
from qlora_jax.commands import plan as plan_command
from qlora_jax.errors import UserError
from qlora_jax.extras import install_command
from qlora_jax.gpus import CHIPS
from qlora_jax.planner import Phase, Program, StepCost, advice, comparison, planning
from qlora_jax.planner.compiler import AttentionKind, CompilationFailed, CompiledStep
from qlora_jax.planner.planning import Planner, length_fields
from qlora_jax.training.config import STEP_FLAGS, TrainConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "plan.py"
MODEL = models.model_config(SMALL)
GIB = 2**30


# --- the planner, with a compiler that is not there


class FakeCompiler:
    """Memory linear in the tokens, in the rank, and in what a setting costs."""

    def __init__(self, *, a_token=120_000, obstacle=None, cudnn=True, fails_above=None, offloaded=0):
        self.a_token, self.obstacle, self.cudnn, self.fails_above = a_token, obstacle, cudnn, fails_above
        self.offloaded = offloaded
        self.asked: list[tuple[TrainConfig, int]] = []

    def __call__(self, config: TrainConfig, model_config: Any, length: int) -> CompiledStep:
        self.asked.append((config, length))
        if self.fails_above is not None and length > self.fails_above:
            raise CompilationFailed("too long")
        tokens = config.per_device_train_batch_size * length
        costs = {"none": 10, "full": 1, "offload": 0.5}[config.remat_policy] * (1 if config.kernel == "fused" else 1.1)
        state = 100_000_000 * config.lora_r // (1 if "32bit" in config.optim else 4)
        on_host = config.optim_placement == "host"
        resident = {"base_packed": 5 * GIB, "optimizer_device": 0 if on_host else state}
        offloaded = self.offloaded * tokens if config.remat_policy == "offload" else 0
        program = Program(5 * GIB, 0, 0, int(costs * self.a_token * tokens), 0, offloaded, name="gradients")
        update = Program(0, 0, 0, 0, 0, 0, name="optimizer update")
        host = {"optimizer_host": state if on_host else 0, "offloaded_activations": offloaded}
        work = StepCost(tokens * config.gradient_accumulation_steps, 1e12, 1, 1)
        rows = config.per_device_train_batch_size
        kinds = (
            AttentionKind(20, 512, (rows, 4, length, length), self.obstacle),
            AttentionKind(6, None, (rows, 4, length, length), None if self.cudnn else self.obstacle),
        )
        return CompiledStep((Phase(program, resident), Phase(update, resident)), host, work, kinds, self.cudnn)


def planner(gpu: str = "rtx4090", host_limit: int | None = None, **options: Any) -> tuple[Planner, FakeCompiler]:
    compiler = FakeCompiler(**options)
    return Planner(CHIPS[gpu], MODEL, compiler, host_limit), compiler


LEAN = TrainConfig(optim_placement="host", kernel="fused", remat="offload", lora_r=16)


def test_the_longest_sequence_is_found_with_few_compilations():
    plans, compiler = planner()
    found = plans.longest(LEAN, 1280)
    assert plans.plan(LEAN, found.length).plan.fits
    assert not plans.plan(LEAN, found.next_length).plan.fits
    assert found.next_length == found.length + 1024
    assert len(compiler.asked) == len(found.evaluations) <= 6
    said = planning.describe_longest(found, plans.plan(LEAN, found.length))
    assert re.fullmatch(
        rf"Longest sequence that fits: {found.length:,} tokens, with [\d.]+ GB of host memory, at least [\d.]+ s a "
        r"step; "
        rf"{found.next_length:,} do not \({len(found.evaluations)} compiled\)\.",
        said,
    )


def test_a_host_limit_bounds_the_sequence_too():
    free, _ = planner()
    bound, _ = planner(host_limit=10**9)
    assert bound.longest(LEAN, 1280).length == 0
    assert free.longest(LEAN, 1280).length > 0
    assert planning.describe_longest(bound.longest(LEAN, 1280), None) == "Not even 64 tokens a sequence fit."


def test_what_does_not_compile_does_not_fit():
    plans, _ = planner(fails_above=9000)
    assert plans.longest(LEAN, 1280).length == 8192


def test_advice_keeps_what_helps_and_stops_at_what_fits():
    plans, compiler = planner()
    config = TrainConfig(gradient_checkpointing=False, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    advice = plans.advice(config, 90_000)
    assert advice.planned.plan.fits
    # On the host, recomputed, fused: and still the batch is too large.
    names = ["optim_placement", "gradient_checkpointing", "remat", "kernel", "per_device_train_batch_size"]
    assert list(advice.changes)[:5] == names
    assert advice.changes["remat"] == "offload"
    with_less = plans.advice(dataclasses.replace(config, per_device_train_batch_size=1), 1024)
    assert with_less.changes == {"optim_placement": "host"}
    assert re.fullmatch(r"It would fit with `optim_placement=host`: [\d.]+ of 25\.77 GB\.", with_less.sentence())
    assert with_less.sentence("-o host").startswith("It would fit with -o host: ")
    assert len(compiler.asked) <= 12


def test_a_smaller_batch_keeps_the_sequences_of_a_step():
    plans, _ = planner()
    config = dataclasses.replace(LEAN, per_device_train_batch_size=16, gradient_accumulation_steps=2)
    advice = plans.advice(config, 30_000)
    rows = advice.changes["per_device_train_batch_size"]
    assert rows * advice.changes["gradient_accumulation_steps"] == 32
    assert "--batch 8 " in plan_command.advised_flags(plans.advice(config, 20_000))


def test_at_last_advice_is_a_shorter_sequence_or_a_larger_gpu():
    plans, _ = planner(a_token=1_200_000)
    advice = plans.advice(dataclasses.replace(LEAN, lora_r=8, optim="adamw_8bit"), 100_000)
    assert not advice.changes
    assert plans.plan(advice.planned.config, advice.length).plan.fits
    assert plan_command.advised_flags(advice) == f"--seq {advice.length}"
    assert advice.fields == length_fields(LEAN, advice.length)
    hopeless, _ = planner("rtx3090", a_token=2 * 10**9)
    advice = hopeless.advice(LEAN, 256)
    assert not advice.planned.plan.fits
    assert advice.sentence().endswith("it takes more than any GPU known here has.")
    larger, _ = planner("rtx3090", a_token=10**9)
    assert re.search(r"No setting .* it takes a GPU like \S+\.", larger.advice(LEAN, 64).sentence())


@pytest.mark.parametrize(("source", "target", "length"), [(1024, 256, 640), (16, 4096, 64), (512, 512, 63)])
def test_a_shorter_sequence_keeps_the_proportion_of_source_and_target(source, target, length):
    config = dataclasses.replace(LEAN, source_max_len=source, target_max_len=target)
    fields = length_fields(config, length)
    assert set(fields) == {"source_max_len", "target_max_len"}
    assert sum(fields.values()) == length
    assert fields["target_max_len"] == pytest.approx(length * target / (source + target), abs=1)
    assert length_fields(dataclasses.replace(config, packing=True), length) == {"sequence_length": length}


def test_a_host_that_lacks_memory_is_advised_to_hold_less():
    plans, _ = planner(host_limit=8 * 10**9, offloaded=100_000, a_token=1000)
    planned = plans.plan(LEAN, 100_000)
    assert planned.plan.device_excess < 0 < planned.plan.host_excess
    assert plans.advice(LEAN, 100_000).changes == {"remat": "full"}
    # The state alone is too much, and nothing here moves it away.
    hopeless, _ = planner(host_limit=10**6)
    advice = hopeless.advice(dataclasses.replace(LEAN, lora_r=8, optim="adamw_8bit", remat="full"), 64)
    assert advice.sentence() == "No setting here makes it fit: it takes 0.2 GB of host memory."


def test_xla_attention_is_warned_of():
    assert not planner()[0].plan(LEAN, 512).warnings
    without, _ = planner(obstacle="cuDNN is not detected.", cudnn=False)
    planned = without.plan(LEAN, 512)
    local, full = planned.warnings
    assert local == (
        "Attention of 20 of 26 layers was compiled as XLA's, which keeps float32 scores [1 x 4 x 512 x 512], 4.0 MiB "
        "at a time, because cuDNN is not installed here; a GPU run has cuDNN's, which keeps none: "
        f"{install_command('plan')}."
    )
    assert full.startswith("Attention of 6 of 26 layers was compiled as XLA's")
    assert f"Note: {local}" in planning.describe_run(planned)
    assert (
        without.plan(dataclasses.replace(LEAN, bf16=False), 512).warnings[0].endswith("cannot: cuDNN is not detected.")
    )
    cannot, _ = planner(obstacle="The head dim must be <= 128.")
    (warning,) = cannot.plan(LEAN, 512).warnings
    assert warning.startswith("Attention of 20 of 26 layers is XLA's, which keeps float32 scores ")
    assert warning.endswith("; cuDNN cannot: The head dim must be <= 128.")


def test_more_positions_than_the_model_has_are_noted():
    plans = Planner(CHIPS["h100"], MODEL, FakeCompiler())
    assert not plans.plan(LEAN, 8192).warnings
    (warning,) = plans.plan(LEAN, 8704).warnings
    assert warning.startswith("config.json gives the model 8,192 positions;")
    # Where the field is the text part's.
    nested = families.config("gemma3_conditional")
    (warning,) = Planner(CHIPS["h100"], nested, FakeCompiler()).plan(LEAN, nested.max_position_embeddings + 1).warnings
    assert warning.startswith(f"config.json gives the model {nested.max_position_embeddings} positions;")


def test_tiles_are_told():
    plans, _ = planner()
    assert plans.plan(LEAN, 4096).tile is None
    long = plans.plan(LEAN, 16384)
    request = comparison.Request("m", MODEL, LEAN, 16384)
    assert comparison.as_json(comparison.GPUPlan(request, long))["tile"] == long.tile == 2048
    assert "All but attention takes 2,048 tokens at a time." in planning.describe_run(long)
    kept = dataclasses.replace(LEAN, gradient_checkpointing=False, remat="none")
    assert plans.plan(kept, 16384).tile is None
    uneven = plans.plan(LEAN, 5000)
    assert uneven.tile is None
    assert any("do not divide into tiles" in warning for warning in uneven.warnings)
    assert not any("tiles" in warning for planned in (long, plans.plan(kept, 5000)) for warning in planned.warnings)


def test_json_holds_a_search_and_advice():
    plans, _ = planner()
    planned = plans.plan(LEAN, 512_000)
    longest = plans.longest(LEAN, 512)
    at_longest = plans.plan(LEAN, longest.length)
    request = comparison.Request("m", MODEL, LEAN, 512_000, find_longest=True)
    found = comparison.GPUPlan(request, planned, longest, at_longest, plans.advice(LEAN, 512_000))
    value = json.loads(json.dumps(comparison.as_json(found)))
    assert value["fits"] is False
    assert value["max_seq"] > 100_000
    assert value["max_seq_device_bytes"] == at_longest.plan.device_bytes <= value["device_limit_bytes"]
    assert value["max_seq_host_bytes"] == at_longest.plan.host_bytes > 0
    assert value["advice"]["fits"] is True
    assert value["advice"]["flags"]


# --- command lines


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["llama-7b"], r"Give --gpu NAME, one of a100, .*, or --all_gpus\."),
        (["llama-7b", "--gpu", "a6000", "--all-gpus"], "Give --gpu NAME"),
        (["llama-7b", "--gpu", "a5000"], r"No GPU is called 'a5000' here: choose one of a100"),
        (["llama-7b", "--gpu", "a6000", "--seq", "0"], r"--seq 0: must be positive\."),
        (["llama-7b", "--gpu", "a6000", "--bits", "3"], r"--bits: invalid choice: '3'"),
        (["llama-7b", "--gpu", "a6000", "--seqq", "3"], r"unknown flag --seqq\. Did you mean --seq\?"),
        (["llama-7b", "--gpu", "a6000", "--quant_type", "fp4", "--bits", "8"], r"--quant_type fp4 has no effect with"),
        (["llama-9b", "--gpu", "a6000"], "llama-9b is neither a file nor a directory"),
        (["llama-7b", "--gpu", "l4", "--dataset_rows", "1", "--dataset_tokens", "1"], "give one of them"),
    ],
)
def test_bad_flags_are_one_sentence(argv, message):
    with pytest.raises(UserError, match=message):
        plan_command.main(argv)


def test_flags_of_the_step_are_those_of_training():
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    shown = {field.name: field for field in dataclasses.fields(plan_command.schema())}
    for name in STEP_FLAGS:
        assert shown[name].default == fields[name].default
        assert shown[name].metadata == fields[name].metadata


def fake_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(FakeCompiler):
        def __init__(self, chip: Any):
            super().__init__()
            self.chip = chip

        def __enter__(self) -> "Fake":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def __call__(self, *arguments: Any) -> CompiledStep:
            if self.chip.name == "b200":
                raise CompilationFailed("the compiler ended its process")
            return super().__call__(*arguments)

    monkeypatch.setattr(planning, "Compiler", Fake)


def test_a_table_of_all_gpus(monkeypatch, capsys):
    fake_compilers(monkeypatch)
    plan_command.main(["llama-7b", "--all-gpus", "--max-seq", "--lora_r", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama-7b: 1 x 1,280 tokens in a forward pass"
    assert [line.split()[0].rstrip(":") for line in lines[2:]] == [*(n for n in CHIPS if n != "b200"), "b200"]
    assert lines[-1].endswith("the compiler ended its process")
    plan_command.main(["llama-7b", "--all-gpus", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(CHIPS)
    assert found["b200"] == {"error": "the compiler ended its process"}
    assert found["h100"]["device_limit_bytes"] == 80 * GIB


def test_what_one_plan_prints(monkeypatch, capsys):
    fake_compilers(monkeypatch)
    flags = ["--seq", "9000", "--batch", "64", "--max_seq", "--dataset_tokens", "1000000"]
    plan_command.main(["llama-7b", "--gpu", "rtx3090", *flags])
    text = capsys.readouterr().out
    assert "llama-7b on NVIDIA GeForce RTX 3090: 64 x 9,000 tokens in a forward pass" in text
    assert "does not fit" in text
    assert "It would fit with --optim_placement host --kernel fused --remat offload --batch" in text
    assert "Longest sequence that fits" in text
    assert "a bound from data-sheet peaks, not a prediction; the dataset at least" in text


def test_a_run_is_planned_for_its_longest_batch(tmp_path, monkeypatch):
    fake_compilers(monkeypatch)
    model, rows = make_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", make_rows(24))
    flags = {"model_name_or_path": str(model), "dataset": str(rows), "per_device_train_batch_size": 2}
    config = TrainConfig(**flags, gradient_accumulation_steps=2, packing=True, sequence_length=128)
    planned, remedy = finetuning.plan(config, "l4")
    assert planned.length == 128
    assert planned.config == config
    assert remedy is None
    with pytest.raises(UserError, match="no GPU that is known by its data sheet is here: give `gpu`, one of"):
        finetuning.plan(config)


def test_out_of_memory_is_told_with_the_plan(monkeypatch):
    fake_compilers(monkeypatch)
    on = {"a": "rtx3090"}
    monkeypatch.setattr(gpus, "chip_of", lambda device: CHIPS.get(on["a"]))
    lines = advice.planned_advice(LEAN, (2, 8, 100_000), model_config=MODEL)
    assert any(line.startswith("Device: ") and "does not fit" in line for line in lines)
    assert lines[-2].startswith("It would fit with `per_device_train_batch_size=")
    rows = "`per_device_train_batch_size` and `gradient_accumulation_steps`"
    elsewhere = "a run that has checkpoints needs another `output_dir` for that"
    assert lines[-1].startswith(f"As to {rows}") and lines[-1].endswith(f": {elsewhere}.")
    packed = dataclasses.replace(LEAN, packing=True, lora_r=8, optim="adamw_8bit")
    lines = advice.planned_advice(packed, (1, 1, 1_000_000), model_config=MODEL)
    assert re.fullmatch(r"It would fit with `sequence_length=\d+`: .* GB\.", lines[-2])
    assert lines[-1] == f"As to `sequence_length`: {elsewhere}."
    # What a run that is resumed may change needs no other directory.
    kept = dataclasses.replace(LEAN, remat="full")
    lines = advice.planned_advice(kept, (1, 1, 175_000), model_config=MODEL)
    assert lines[-1].startswith("It would fit with `remat=offload`: ")
    lines = advice.planned_advice(LEAN, (2, 1, 128), model_config=MODEL)
    assert "it had 24.0 GiB of 24.0 GiB, and XLA_PYTHON_CLIENT_MEM_FRACTION sets that" in lines[-1]
    # Nothing to plan with: the reason, and what helps in general.
    for name, reason in (("b200", "the compiler ended its process"), (None, "cpu is none of the GPUs known")):
        on["a"] = name
        first, *others = advice.planned_advice(LEAN, (2, 8, 128), model_config=MODEL)
        assert first.startswith(f"No plan of this step: {reason}")
        assert others == advice.memory_advice(LEAN, (2, 8, 128))
    # Settings that a run with checkpoints may change come first.
    keeping = TrainConfig(optim="adamw_32bit", gradient_checkpointing=False)
    kinds = [line.endswith(elsewhere) for line in advice.memory_advice(keeping, (2, 8, 128))]
    assert kinds == [False, False, False, True, True]


def test_free_settings_are_advised_first():
    config = TrainConfig(gradient_checkpointing=False, per_device_train_batch_size=4)
    fixed = [bool(advice.fixed_fields(remedy)) for remedy in planning.remedies(config)]
    assert fixed == sorted(fixed) and set(fixed) == {False, True}
