"""`scripts/finetune.py` from flags to files: all that a run writes, where it can start from, and how it refuses."""

import dataclasses
import json
import math
import re
import shlex
import shutil
import struct
import sys

import numpy as np
import pytest
from fixtures.checkpoint_helpers import hf_shapes
from fixtures.finetune_helpers import (
    SMALL_RUN,
    as_flags,
    assert_same_run,
    child_environment,
    file_digest,
    last_error,
    make_model,
    make_rows,
    only_error,
    read_metrics,
    run_captured,
    run_child,
    run_in_process,
    without_timings,
    write_jsonl,
)
from fixtures.tiny_configs import BYTE_LLAMA
from safetensors.numpy import load_file, save_file
from tensorboardX.proto.event_pb2 import Event

from qlora_jax.checkpoints.conversion import convert
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.commands import generate as generate_command
from qlora_jax.commands.finetune import report
from qlora_jax.models import model_config
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.datasets import load_datasets
from qlora_jax.training.step import TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = model_config(BYTE_LLAMA)
PROMPTS = ("say abcde", "say zyx please")
# 4 rows a step: 12 steps are exactly one pass over 48 rows.
MAIN = SMALL_RUN | {"report_to": "tensorboard"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, chat rows, plain rows and prompts."""
    directory = tmp_path_factory.mktemp("finetune")
    make_model(directory / "model")
    rows = make_rows(52)
    write_jsonl(directory / "rows.jsonl", rows)
    chats = [
        {"messages": [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]}
        for row in rows
    ]
    write_jsonl(directory / "chats.jsonl", chats)
    (directory / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return directory


def main_flags(place, **changes):
    named = {"model_name_or_path": place / "model", "dataset": place / "chats.jsonl", "prompts": place / "prompts.txt"}
    return as_flags(**(MAIN | named | {"output_dir": place / "out"} | changes))


@pytest.fixture(scope="module")
def finished(place):
    """Directory, stdout and stderr of a whole run."""
    status, out, err = run_captured(main_flags(place))
    assert status == 0, err
    return place / "out", out, err


@pytest.mark.e2e
def test_a_process_of_its_own_comes_to_the_same(finished, place):
    """With the same words; Python warnings are errors there too."""
    directory, out, _ = finished
    output = place / "child"
    argv = main_flags(place, output_dir=output)
    status, child_out, child_err = run_child(argv, env=child_environment(PYTHONWARNINGS="error"))
    assert status == 0, child_err
    assert_same_run(output, directory)

    def words(text):
        """Without paths, and without what a clock measured."""
        text = re.sub(r".* s so far\n", "", text)  # of a machine that is busy
        text = re.sub(r"python scripts/(\w+)\.py", r"qlora-jax \1", text.replace(str(output), str(directory)))
        return re.sub(r"[\d.:]+(?=s|it/s)|minutes .*|<.*?>", "", text)

    assert words(child_out) == words(out)
    assert "12/12" in child_err
    assert "Warning" not in child_err and "Traceback" not in child_err


def test_metrics_have_every_step_with_every_number(finished, place):
    lines = read_metrics(finished[0])
    train = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train] == list(range(1, 13))
    for line in train:
        assert list(line) == ["step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"]
        assert all(math.isfinite(value) for value in line.values())
        assert line["grad_norm"] > 0
        assert line["tokens_per_second"] > 0
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 4, 8, 12]
    for line in evaluations:
        assert list(line) == ["step", "eval_loss", "eval_perplexity", "eval_tokens"]
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))
    # One epoch: every token of every training row once.
    tokenizer = load_tokenizer(place / "model")
    rows = [json.loads(line)["messages"] for line in (place / "chats.jsonl").read_text().splitlines()]
    lengths = [len(tokenizer.apply_chat_template(row, tokenize=False)) for row in rows]
    special = len("<|im_start|>") + len("<|im_end|>") - 2  # a token each, not one a character
    total = sum(lengths) - len(rows) * 2 * special
    held_out = [json.loads(line) for line in (place / "chats.jsonl").read_text().splitlines()]
    assert len(held_out) == 52
    assert train[-1]["tokens"] + evaluation_tokens(place) == total
    for name in ("tokens", "seconds"):
        values = [line[name] for line in train]
        assert values == sorted(values)


def test_the_kernel_that_was_chosen_is_printed_once(finished):
    said = re.findall(r"^kernel: \w+ \(auto: .+\) for .+ at M=\d+$", finished[1], re.MULTILINE)
    assert said == [line for line in finished[1].splitlines() if line.startswith("kernel: ")] != []
    on_cpu = "kernel: xla (auto: this runs on cpu) for 7 of 7 linears, forward and backward, at M="
    assert said[0].startswith(on_cpu) or "runs on cpu" not in said[0]


def evaluation_tokens(place):
    config = TrainConfig(**MAIN, dataset=str(place / "chats.jsonl"))
    return sum(batch.n_tokens for batch in load_datasets(config, load_tokenizer(place / "model")).evaluation)


def test_the_learning_rate_is_the_schedule(finished):
    rates = [line["learning_rate"] for line in read_metrics(finished[0]) if "loss" in line]
    cosine = [1e-2 * (1 + math.cos(math.pi * i / 11)) / 2 for i in range(11)]
    assert rates == pytest.approx([0.0, *cosine], rel=1e-5)  # warm-up: ceil(0.03 * 12) = 1 step


def test_losses_fall(finished):
    lines = read_metrics(finished[0])
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses[0] == pytest.approx(math.log(BYTE_LLAMA["vocab_size"]), rel=0.3)
    assert np.mean(losses[-3:]) < losses[0] - 1
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < held_out[0] - 1


def test_the_adapter_is_peft_and_trained(finished):
    lora, config = load_adapter(finished[0] / "adapter", MODEL)
    assert (config.rank, config.alpha, config.dropout) == (4, 8.0, 0.0)
    assert len(lora) == 2 * 7
    for path, value in lora.items():
        assert np.isfinite(value).all()
        assert all(np.any(layer != 0) for layer in value), path
    # The same bytes as in the last checkpoint.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert file_digest(finished[0] / "adapter" / name) == file_digest(finished[0] / "checkpoint-000012" / name)


def test_summary_counts_what_there_is(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    shapes = hf_shapes(BYTE_LLAMA)
    linears = {n: s for n, s in shapes.items() if ".self_attn." in n or ".mlp." in n}
    parameters = {name: math.prod(shape) for name, shape in shapes.items()}
    packed = sum(parameters[name] for name in linears) // 2
    # 8-bit scale a block of 64, a float32 scale for every 256 of those, a float32 offset a tensor.
    blocks = [parameters[name] // 64 for name in linears]
    scales = sum(n + 4 * math.ceil(n / 256) + 4 for n in blocks)
    tensors = load_file(finished[0] / "adapter" / "adapter_model.safetensors")
    trainable = sum(tensor.size for tensor in tensors.values())
    assert trainable == sum(4 * (out + fan_in) for out, fan_in in linears.values())
    assert summary["trainable_parameters"] == trainable
    assert summary["total_parameters"] == sum(parameters.values()) + trainable
    sizes = summary["bytes"]
    assert sizes["base_packed"] == packed
    assert sizes["scales"] == scales
    assert sizes["unquantised"] == 4 * sum(size for name, size in parameters.items() if name not in linears)
    assert sizes["adapters"] == 4 * trainable
    # Two moments a parameter and two counters a matrix.
    assert sizes["optimizer_on_device"] == 8 * trainable + 8 * len(tensors)
    assert sizes["optimizer_on_host"] == 0
    assert summary["bits_per_quantized_parameter"] == pytest.approx(8 * (packed + scales) / (2 * packed))
    lines = read_metrics(finished[0])
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert (summary["first_loss"], summary["last_loss"]) == (losses[0], losses[-1])
    assert (summary["first_eval_loss"], summary["last_eval_loss"]) == (held_out[0], held_out[-1])
    assert (summary["steps"], summary["epochs"]) == (12, 1.0)
    assert summary["tokens"] == max(line.get("tokens", 0) for line in lines)
    assert 0 < summary["trained_tokens"] < summary["tokens"]
    assert summary["planned_peak_bytes"] > sum(summary["bytes"].values()) + summary["bytes"]["adapters"]  # gradients
    assert summary["measured_peak_bytes"] is None  # nobody counts on a CPU


def test_the_planned_peak_is_printed_beside_the_measured_one(finished, capsys):
    summary = json.loads((finished[0] / "summary.json").read_text())
    report({**summary, "planned_peak_bytes": 5 * 2**30, "measured_peak_bytes": 6 * 2**30}, [], TrainConfig(), "p")
    printed = capsys.readouterr().out
    assert re.search(r"training steps, planned by the compiler +5.0 GiB\n +the whole run, measured +6.0 GiB", printed)
    report(summary, [], TrainConfig(), "p")
    assert "planned by the compiler" not in capsys.readouterr().out


def test_one_compilation_for_each_shape(finished, place):
    config = TrainConfig(**MAIN, dataset=str(place / "chats.jsonl"))
    batches = load_datasets(config, load_tokenizer(place / "model")).train
    shapes = {next(batches).shape for _ in range(12)}
    assert len(shapes) == 2  # or the count would prove nothing
    assert json.loads((finished[0] / "summary.json").read_text())["step_shapes_compiled"] == len(shapes)


def test_plot_and_tensorboard(finished):
    png = (finished[0] / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert min(width, height) > 300
    assert png.endswith(b"IEND\xaeB`\x82")
    (file,) = (finished[0] / "tensorboard").glob("events.out.tfevents.*")
    logged = {(tag, step): value for tag, step, value in scalars(file.read_bytes())}
    lines = read_metrics(finished[0])
    assert len(logged) == sum(len(line) - 1 for line in lines)
    for line in lines:
        for name, value in line.items():
            if name != "step":
                assert logged[name, line["step"]] == np.float32(value)


def scalars(records):
    """(tag, step, value) of the scalars of a TensorBoard file: length, checksum, Event, checksum, ..."""
    at = 0
    while at < len(records):
        (length,) = struct.unpack_from("<Q", records, at)
        event = Event.FromString(records[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            yield value.tag, event.step, value.simple_value


def test_what_a_person_sees(finished):
    directory, out, err = finished
    answers = json.loads((directory / "answers.json").read_text())
    assert [answer["prompt"] for answer in answers] == list(PROMPTS)
    for answer in answers:
        assert f"> {answer['prompt']}" in out
    assert out.count("before:") == out.count("after:") == len(PROMPTS)
    logged = re.findall(r"^step (\d+): held-out loss \d\.\d{4} \(\d+ tokens\)$", out, re.MULTILINE)
    assert logged == ["0", "4", "8", "12"]
    for phrase in (
        "48 of 48 rows used", "4 of 52 rows held out", "training, first step", "held out, after", "base packed",
        "trainable parameters", "bits a quantised parameter", "step shapes compiled", f"Saved in {directory}",
    ):  # fmt: skip
        assert phrase in out
    listing = out.partition(f"Saved in {directory}")[2]
    for name in ("adapter", "checkpoint-*", "metrics.jsonl", "loss.png", "answers.json", "summary.json"):
        assert re.search(rf" {re.escape(name)}$", listing, re.MULTILINE)
        assert list(directory.glob(name))
    use = out.partition("Use the adapter")[2]
    assert f'PeftModel.from_pretrained(base, "{directory / "adapter"}")' in use
    assert f"qlora-jax merge {directory}\n" in use
    assert f"qlora-jax export {directory} DIRECTORY" in use.splitlines()[-1]
    assert "Warning" not in err
    assert "Traceback" not in err


def test_the_progress_bar_ends_where_the_summary_does(finished):
    directory, _, err = finished
    summary = json.loads((directory / "summary.json").read_text())
    last = read_metrics(directory)[-2]
    bar = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("training:")][-1]
    assert "12/12" in bar
    assert f"loss={summary['last_loss']:.4f}, tok/s={last['tokens_per_second']:.0f}]" in bar


@pytest.mark.e2e
def test_the_command_that_a_run_ends_with_answers_as_the_run_did(finished, place, capsys):
    directory, out, _ = finished
    (line,) = [line.strip() for line in out.splitlines() if line.endswith("--input FILE")]
    of_the_run = json.loads((directory / "answers.json").read_text())
    write_jsonl(place / "prompts.jsonl", [{"prompt": answer["prompt"]} for answer in of_the_run])
    argv = shlex.split(line.replace("FILE", str(place / "prompts.jsonl")))[2:]
    assert generate_command.main([*argv, "--max_new_tokens", "4"]) == 0
    answered = [json.loads(line)["answer"].strip() for line in capsys.readouterr().out.splitlines()]
    assert answered == [answer["after"] for answer in of_the_run]


def test_nothing_but_finished_files_is_left(finished):
    assert not [path for path in finished[0].rglob(".*")]
    assert sorted(path.name for path in finished[0].glob("checkpoint-*")) == [
        f"checkpoint-{step:06d}" for step in (3, 6, 9, 12)
    ]


def test_the_same_command_again_is_already_done(finished, place, monkeypatch, capsys):
    before = {path: file_digest(path) for path in finished[0].rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "qlora_jax.finetuning", None)  # it is not even loaded
        assert run_in_process(main_flags(place)) == 0
        out, err = capsys.readouterr()
    done = f"already done: {finished[0]} holds this run, finished after 12 steps; --overwrite_output_dir trains again\n"
    assert (out, err) == (done, "")
    assert {path: file_digest(path) for path in finished[0].rglob("*") if path.is_file()} == before


def test_a_finished_run_with_another_flag_is_refused(finished, place, capsys):
    assert run_in_process(main_flags(place, logging_steps=2)) == 1
    message = only_error(capsys.readouterr().err)
    assert "holds a finished run of 12 steps" in message
    assert "--overwrite_output_dir" in message


@pytest.mark.e2e
def test_a_converted_model_trains_to_the_same_bits(finished, place, capsys):
    convert(place / "model", place / "converted", QuantizationConfig(), "float32")
    assert (
        run_in_process(main_flags(place, model_name_or_path=place / "converted", output_dir=place / "out-converted"))
        == 0
    )
    assert f"base model: converted model {place / 'converted'}" in capsys.readouterr().out
    assert without_timings(read_metrics(place / "out-converted")) == without_timings(read_metrics(finished[0]))
    assert file_digest(place / "out-converted/adapter/adapter_model.safetensors") == file_digest(
        finished[0] / "adapter/adapter_model.safetensors"
    )
    assert (
        run_in_process(
            main_flags(place, model_name_or_path=place / "converted", bits=4, quant_type="fp4", output_dir=place / "x")
        )
        == 1
    )
    assert "was converted to" in only_error(capsys.readouterr().err)
    assert not (place / "x").exists()


@pytest.mark.e2e
def test_a_saved_adapter_is_where_another_run_starts(finished, place):
    """The adapter's own rank, alpha and modules win over the flags."""
    output = place / "out-continued"
    status = run_in_process(
        main_flags(place, adapter=finished[0] / "adapter", lora_r=7, output_dir=output, max_steps=4, learning_rate=1e-3)
    )
    assert status == 0
    before, after = read_metrics(finished[0]), read_metrics(output)
    # Read back from PEFT's format, the adapter does to held-out rows what it did when it was saved.
    assert after[0]["eval_loss"] == before[-1]["eval_loss"]
    assert after[-1]["eval_loss"] < before[-1]["eval_loss"]
    old, new = load_adapter(finished[0] / "adapter", MODEL), load_adapter(output / "adapter", MODEL)
    assert (new[1].rank, new[1].alpha) == (4, 8.0)
    assert new[0].keys() == old[0].keys()
    assert all(np.any(new[0][path] != old[0][path]) for path in old[0])


@pytest.mark.e2e
def test_two_devices_train_like_one_with_twice_the_batch(finished, place):
    environment = child_environment(XLA_FLAGS="--xla_force_host_platform_device_count=2")
    output = place / "out-devices"
    status, _, err = run_child(
        main_flags(place, per_device_train_batch_size=1, per_device_eval_batch_size=1, output_dir=output),
        env=environment,
    )
    assert status == 0, err
    one, two = read_metrics(finished[0]), read_metrics(output)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3)
        for name in ("tokens", "eval_tokens"):
            assert a.get(name) == b.get(name)
    assert json.loads((output / "summary.json").read_text())["step_shapes_compiled"] == 2


@pytest.mark.e2e
def test_int8_bfloat16_attention_only_and_no_evaluation(place, capsys):
    named = {name: value for name, value in MAIN.items() if name not in ("eval_dataset_size", "max_steps")}
    changes = {
        "bits": 8, "bf16": True, "lora_modules": "attention", "do_eval": False, "max_grad_norm": 0.0,
        "output_dir": place / "out-int8", "num_train_epochs": 0.05, "dataset": place / "rows.jsonl",
        "model_name_or_path": place / "model",
    }  # fmt: skip
    assert run_in_process(as_flags(**(named | changes))) == 0
    lines = read_metrics(place / "out-int8")
    assert [line["step"] for line in lines] == [1]  # ceil(0.05 * 52 / 4)
    _, config = load_adapter(place / "out-int8" / "adapter", MODEL)
    assert config.target_modules == ("k_proj", "o_proj", "q_proj", "v_proj")
    summary = json.loads((place / "out-int8" / "summary.json").read_text())
    linears = [shape for name, shape in hf_shapes(BYTE_LLAMA).items() if ".self_attn." in name or ".mlp." in name]
    assert summary["bytes"]["base_packed"] == sum(math.prod(shape) for shape in linears)
    assert summary["bytes"]["scales"] == 4 * sum(shape[0] for shape in linears)
    assert summary["last_eval_loss"] is None
    out = capsys.readouterr().out
    assert "held out, " not in out
    assert "\n--eval_steps has no effect with --do_eval False.\n" in f"\n{out}"


def test_no_rows_held_out(place):
    config = TrainConfig(**MAIN | {"eval_dataset_size": 0}, dataset=str(place / "rows.jsonl"))
    datasets = load_datasets(config, load_tokenizer(place / "model"))
    assert datasets.evaluation == []
    assert datasets.train.rows_per_epoch == 52


# --- a loss that is not finite


@pytest.mark.e2e
def test_divergence_names_step_rows_and_the_last_good_checkpoint(place, capsys):
    output = place / "out-diverged"
    argv = main_flags(
        place, dataset=place / "rows.jsonl", output_dir=output, learning_rate=1e30, lr_scheduler_type="constant",
        warmup_steps=2, save_steps=1, eval_steps=0, report_to="none",
    )  # fmt: skip
    for _ in range(2):  # the same command meets the same rows again
        assert run_in_process(argv) == 1
        message = last_error(capsys.readouterr().err)
        assert message.startswith("loss nan and gradient norm ")
        assert f"the last good checkpoint is {output / 'checkpoint-000002'}" in message
        config = TrainConfig(**MAIN, dataset=str(place / "rows.jsonl"))
        batches = load_datasets(config, load_tokenizer(place / "model")).train
        rows = [next(batches).example_ids for _ in range(3)][-1]
        assert f"at step 3 (rows: {', '.join(rows)})" in message
        assert all(row.startswith("rows.jsonl line ") for row in rows)
        assert [line["step"] for line in read_metrics(output)] == [0, 1, 2]
        assert sorted(path.name for path in output.glob("*checkpoint-*")) == ["checkpoint-000001", "checkpoint-000002"]
        lora, _ = load_adapter(output / "checkpoint-000002", MODEL)
        assert all(np.isfinite(value).all() for value in lora.values())
    assert not (output / "adapter").exists()
    assert not (output / "summary.json").exists()


def test_a_held_out_loss_that_is_not_finite_stops_the_run(finished, place, capsys):
    """... before that state is saved as a checkpoint."""
    huge = place / "huge"
    shutil.copytree(finished[0] / "adapter", huge, ignore=shutil.ignore_patterns("SHA256SUMS"))
    tensors = load_file(huge / "adapter_model.safetensors")
    save_file(
        {name: np.full_like(tensor, 1e38) for name, tensor in tensors.items()}, huge / "adapter_model.safetensors"
    )
    assert run_in_process(main_flags(place, adapter=huge, output_dir=place / "out-huge")) == 1
    message = last_error(capsys.readouterr().err)
    assert message.startswith("held-out loss nan at step 0 (rows: chats.jsonl line ")
    assert "no checkpoint had been saved" in message
    assert read_metrics(place / "out-huge") == []


# --- bad input


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"model_name_or_path": "{}/nowhere"}, ["{}/nowhere does not exist"]),
        ({"model_name_or_path": "nobody/nothing"}, ["nobody/nothing", "hub cannot be reached"]),
        ({"model_name_or_path": "{}/corrupt"}, ["{}/corrupt/model.safetensors"]),
        ({"model_name_or_path": "{}/truncated"}, ["{}/truncated/model.safetensors"]),
        ({"model_name_or_path": "{}/no-eos"}, ["no end-of-sequence token", "eos_token in tokenizer_config.json"]),
        ({"dataset": "{}/nowhere.jsonl"}, ["--dataset {}/nowhere.jsonl: there is no such file"]),
        ({"dataset": "{}/empty.jsonl"}, ["{}/empty.jsonl holds no rows"]),
        ({"dataset": "{}/malformed.jsonl"}, ["{}/malformed.jsonl line 3: not valid JSON"]),
        (
            {"dataset": "{}/column.jsonl", "dataset_format": "input-output"},
            ["column.jsonl line", "column 'output' is missing"],
        ),
        ({"dataset": "{}/columns.jsonl", "eval_dataset_size": 1}, ["the columns 'query', 'reply' fit no format"]),
        ({"dataset": "{}/one.jsonl"}, ["--eval_dataset_size 4 leaves nothing to train on"]),
        ({"dataset_format": "alpacca"}, ["--dataset_format alpacca is unknown; use one of"]),
        ({"dataset_format": "alpaca"}, ["column 'instruction' is missing"]),
        ({"eval_dataset": "{}/rows.jsonl"}, ["--eval_dataset_size 4 has no effect with --eval_dataset"]),
        ({"eval_dataset_size": 52}, ["--eval_dataset_size 52 leaves nothing to train on"]),
        ({"bits": 5}, ["--bits: invalid choice: '5'"]),
        ({"block_size": 100}, ["--block_size 100: choose a power of two"]),
        ({"block_size": 128}, ["--block_size 128 does not divide the 64 inputs of "]),
        ({"max_step": 3}, ["unknown flag --max_step. Did you mean --max_steps?"]),
        ({"lora_modules": "q_proj,wrong"}, ["wrong"]),
        ({"kernel": "wrong"}, ["--kernel: invalid choice: 'wrong' (choose from 'auto', 'xla'"]),
        ({"adapter": "{}/nowhere"}, ["{}/nowhere does not exist"]),
        ({"adapter": "{}/model"}, ["{}/model is no PEFT adapter"]),
        ({"prompts": "{}/nowhere.txt"}, ["--prompts {}/nowhere.txt cannot be read"]),
        ({"prompts": "{}/empty.jsonl"}, ["--prompts {}/empty.jsonl holds no prompt"]),
        ({"output_dir": "{}/rows.jsonl"}, ["--output_dir {}/rows.jsonl is a file"]),
        ({"output_dir": "{}/rows.jsonl/below"}, ["--output_dir {}/rows.jsonl/below cannot be written"]),
        ({"report_to": "wandb"}, ["W&B is not installed"]),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()).replace("{}/", "") if isinstance(value, dict) else ""
    ),
)
def test_bad_input_is_one_sentence(bad, capsys, changes, messages):
    changes = {name: str(value).replace("{}", str(bad)) for name, value in changes.items()}
    named = {"dataset": bad / "rows.jsonl", "output_dir": bad / "out-bad"}
    assert run_in_process(main_flags(bad, **(named | changes))) == 1
    captured = capsys.readouterr()
    said = only_error(captured.err)
    for message in messages:
        assert message.replace("{}", str(bad)) in said
    # Nothing to resume was made.
    assert not list(bad.glob("out-bad/checkpoint-*"))


@pytest.fixture(scope="module")
def bad(place):
    """The same place with everything that can be wrong in it."""
    rows = make_rows(3)
    (place / "empty.jsonl").write_text("\n")
    (place / "malformed.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1]) + '\n{"input": "say\n')
    write_jsonl(place / "column.jsonl", [{"input": "x"}] * 6)
    write_jsonl(place / "columns.jsonl", [{"query": "x", "reply": "y"}] * 4)
    write_jsonl(place / "one.jsonl", rows[:1])
    make_model(place / "no-eos", eos=False)
    for name, keep in (("corrupt", None), ("truncated", 5000)):
        shutil.copytree(place / "model", place / name)
        weights = place / name / "model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[:keep] if keep else b"\xff" * 64 + content[64:])
    return place


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "malformed.jsonl"}, "malformed.jsonl line 3: not valid JSON"),
        ({"bits": 3}, "--bits: invalid choice: '3' (choose from 'auto', 4, 8, 16)"),
        ({"model_name_or_path": "truncated"}, "truncated/model.safetensors"),
    ],
    ids=["data", "flag", "model"],
)
def test_bad_input_through_a_process(bad, changes, message):
    argv = as_flags(**{"model_name_or_path": "model", "dataset": "rows.jsonl", "output_dir": "out-bad"} | changes)
    status, out, err = run_child(argv, cwd=bad, env=child_environment(PYTHONWARNINGS="error"))
    assert status == 1
    assert message in only_error(err)
    assert "Traceback" not in out


def test_another_runs_directory_is_refused_and_names_what_differs(finished, place, capsys):
    for changes, message in (
        ({"learning_rate": 0.02}, "--learning_rate was 0.01, now 0.02"),
        ({"max_steps": 20}, "--max_steps was 12, now 20"),
        ({"model_name_or_path": place / "converted"}, "--model_name_or_path was "),
    ):
        if not (place / "converted").exists():
            convert(place / "model", place / "converted", QuantizationConfig(), "float32")
        assert run_in_process(main_flags(place, **changes)) == 1
        said = only_error(capsys.readouterr().err)
        assert "holds the checkpoints of another run" in said
        assert message in said
        assert "--overwrite_output_dir" in said
    # The data behind the same file name has changed.
    rows = (place / "chats.jsonl").read_text()
    try:
        (place / "chats.jsonl").write_text(rows.replace("abcde", "edcba") + rows.splitlines()[0] + "\n")
        assert run_in_process(main_flags(place)) == 1
        assert "data was " in only_error(capsys.readouterr().err)
    finally:
        (place / "chats.jsonl").write_text(rows)


def test_overwrite_deletes_the_other_run(finished, place):
    output = place / "out-overwritten"
    shutil.copytree(finished[0], output)
    changes = {"max_steps": 1, "eval_steps": 0, "save_strategy": "no", "report_to": "none"}
    assert run_in_process([*main_flags(place, output_dir=output, **changes), "--overwrite_output_dir"]) == 0
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-000001"]
    assert [line["step"] for line in read_metrics(output)] == [0, 1, 1]


def test_evaluating_without_training(finished, place, capsys):
    changes = {"adapter": finished[0] / "adapter", "do_train": False, "output_dir": place / "out-evaluated"}
    assert run_in_process(main_flags(place, **changes)) == 0
    lines = read_metrics(place / "out-evaluated")
    assert [line["step"] for line in lines] == [0]
    last = [line["eval_loss"] for line in read_metrics(finished[0]) if "eval_loss" in line][-1]
    assert lines[0]["eval_loss"] == pytest.approx(last, rel=1e-6)
    assert not (place / "out-evaluated" / "adapter").exists()
    assert not list((place / "out-evaluated").glob("checkpoint-*"))


def test_the_state_that_is_saved_is_all_there_is():
    """A field added to the state must be thought of in saving and resuming."""
    assert [field.name for field in dataclasses.fields(TrainState)] == ["lora", "opt_state", "step"]


@pytest.mark.e2e
def test_secrets_are_written_nowhere(place, monkeypatch, capsys):
    """Tokens in the environment, after a run and after one that is refused."""
    secrets = {"HF_TOKEN": "hf_SeCrEtOne", "HUGGING_FACE_HUB_TOKEN": "hf_SeCrEtTwo", "WANDB_API_KEY": "SeCrEtThree"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    output = place / "secret"
    flags = {"output_dir": output, "max_steps": 1, "eval_steps": 0, "report_to": "tensorboard"}
    assert run_in_process(main_flags(place, **flags)) == 0
    assert run_in_process(main_flags(place, **{**flags, "learning_rate": 1.0})) == 1
    said = "".join(capsys.readouterr()).encode()
    written = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not any(b"SeCrEt" in content for content in [said, *written])


@pytest.mark.e2e
def test_compiled_programs_are_kept_for_the_next_run(place):
    """Also where entries of the directory are damaged, which costs their compilation."""
    environment = child_environment(XDG_CACHE_HOME=str(place / "cache"))
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # of itself JAX keeps what took it a second
    programs = place / "cache" / "qlora-jax" / "programs"

    def run(name, *flags):
        argv = main_flags(place, output_dir=place / name, max_steps=2, eval_steps=0, report_to="none")
        status, _, err = run_child([*argv, *flags], env=environment)
        assert status == 0, err
        return without_timings(read_metrics(place / name)), file_digest(
            place / name / "adapter/adapter_model.safetensors"
        )

    first = run("kept-0")
    entries = {path.name for path in programs.glob("*-cache")}
    assert any("gradients" in name for name in entries)
    assert run("kept-1") == first
    assert {path.name for path in programs.glob("*-cache")} == entries
    for path in programs.glob("*-cache"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert run("kept-2") == first
    shutil.rmtree(programs)
    assert run("kept-3", "--compilation_cache", "none") == first
    assert not programs.exists()
