"""The command line: types of flags, defaults, errors, help, and what it prints for the library."""

import dataclasses
import errno
import json
import logging
import os
import pkgutil
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_jax import commands
from qlora_jax.cli import (
    argument,
    command,
    flag,
    names_where,
    parse_flags,
    run,
    sigterm_as_ctrl_c,
    spellings,
    with_dashes,
)
from qlora_jax.commands import convert as convert_command
from qlora_jax.commands import finetune as finetune_command
from qlora_jax.commands.finetune import EXAMPLE_FLAGS
from qlora_jax.commands.foreign_flags import FOREIGN_FLAGS
from qlora_jax.device_memory import CONTEXT_BYTES
from qlora_jax.environment import let_jax_fill_the_gpu, multiplies_bfloat16
from qlora_jax.errors import UserError
from qlora_jax.files import write_checked_json
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.idle_fields import IDLE, changed_fields, idle_notes

SCRIPTS = Path(__file__).parents[2] / "scripts"


def parse(*argv):
    return parse_flags(TrainConfig, argv, prog="finetune.py", description="d")


def test_defaults_are_the_reference_programs():
    config, given = parse()
    assert given == frozenset()
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (64, 16, 0.0)
    assert (config.source_max_len, config.target_max_len) == (1024, 256)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 16)
    assert (config.max_steps, config.learning_rate, config.max_grad_norm) == (10000, 2e-4, 0.3)
    assert (config.warmup_ratio, config.save_steps, config.save_total_limit) == (0.03, 250, 40)
    assert (config.bits, config.quant_type, config.double_quant, config.output_dir) == (4, "nf4", True, "./output")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--packing"], "packing", True),
        (["--packing", "True"], "packing", True),
        (["--packing=false"], "packing", False),
        (["--no-double_quant"], "double_quant", False),
        (["--no-double-quant"], "double_quant", False),
        (["--double-quant", "False"], "double_quant", False),
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--max-steps=7"], "max_steps", 7),
        (["--bf16"], "bf16", True),
        (["--max_eval_samples", "3"], "max_eval_samples", 3),
        (["--optim", "lion_8bit"], "optim", "lion_8bit"),
        (["--optim_placement", "host"], "optim_placement", "host"),
    ],
)
def test_values(argv, field, value):
    config, given = parse(*argv)
    assert getattr(config, field) == value
    assert given == {field}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_modulez", "all"], "unknown flag --lora_modulez. Did you mean --lora_modules?"),
        (["--learning-rat", "1"], "Did you mean --learning_rate?"),
        (["--lora", "1"], "unknown flag --lora"),  # no abbreviations: they change meaning when flags are added
        (["--merge"], "unknown flag --merge. See"),  # like no flag at all
        # What is not near is not offered.
        (["--batch_size", "4"], "unknown flag --batch_size. See"),  # --block_size
        (["--export", "x"], "unknown flag --export. See"),  # --report_to
        (["--num_epochs", "4"], "unknown flag --num_epochs. Did you mean --num_train_epochs?"),
        (["--max_steps", "many"], "--max_steps: invalid int value: 'many'"),
        (["--packing", "maybe"], "--packing: expected True or False, not 'maybe'"),
        (["--quant_type", "int4"], "--quant_type: invalid choice: 'int4'"),
        (["stray"], "'stray' is not a flag"),
        (
            ["--sequence_length", "64"],
            "--sequence_length 64 has no effect without --packing; give that too, or leave it out.",
        ),
        (
            ["--eval_dataset", "x", "--do_eval", "False"],
            "--eval_dataset x has no effect with --do_eval False; leave out one of them.",
        ),
        (["--bits", "3"], "--bits 3: choose 4, 8 or 16."),
        (["--block_size", "100"], "--block_size 100: choose a power of two from 32 to 4096."),
        (["--optim", "adamw_torch"], "choose from 'paged_adamw_32bit', 'adamw_32bit'"),
        (["--max_steps", "0"], "--max_steps 0: must be at least 1."),
        (["--lora_dropout", "1"], "--lora_dropout 1.0: must be at least 0 and below 1."),
        (["--learning_rate", "nan"], "--learning_rate nan: must be positive."),
        (["--warmup_steps", "-1"], "--warmup_steps -1: must not be negative."),
    ],
)
def test_errors_name_the_flag(argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (
            "--max_steps many --merge x --packing maybe --no-merge --quant_type int4 --bits 3",
            [
                "--max_steps: invalid int value: 'many'.",
                "--packing: expected True or False, not 'maybe'.",
                "--quant_type: invalid choice: 'int4' (choose from 'nf4', 'fp4').",
                "unknown flag --merge.",
                "unknown flag --no-merge.",
                "--bits 3: choose 4, 8 or 16.",
            ],
        ),
        ("--merge --bits 3", ["unknown flag --merge.", "--bits 3: choose 4, 8 or 16."]),
        ("--merge --max_steps", ["--max_steps: expected one argument.", "unknown flag --merge."]),
        (
            "--seed -1 --top_p 2 --lora_r 0 --max_steps 5 --num_train_epochs 2 --temperature 0.7",
            [
                "--lora_r 0: must be at least 1.",
                "--seed -1: must not be negative.",
                "--top_p 2.0: must be above 0 and at most 1.",
                "--max_steps 5 has no effect with --num_train_epochs 2.0; leave out one of them.",
                "--temperature 0.7 has no effect without --do_sample; give that too, or leave it out.",
                "--top_p 2.0 has no effect without --do_sample; give that too, or leave it out.",
            ],
        ),
        # What could not be read contradicts nothing.
        ("--packing maybe --sequence_length 64", ["--packing: expected True or False, not 'maybe'."]),
        (
            "--sequence_length 64 --optim",
            [
                "--optim: expected one argument.",
                "--sequence_length 64 has no effect without --packing; give that too, or leave it out.",
            ],
        ),
    ],
)
def test_everything_that_is_wrong_is_told_at_once(argv, lines):
    with pytest.raises(UserError) as error:
        parse(*argv.split())
    first, *rest = str(error.value).splitlines()
    if len(lines) == 1:
        assert (first, rest) == (f"{lines[0]} See finetune.py --help.", [])
    else:
        assert first == f"{len(lines)} things are wrong with the flags; see finetune.py --help."
        assert rest == [f"  {line}" for line in lines]


def test_what_contradicts_by_being_given_is_told_with_the_rest():
    with pytest.raises(UserError) as error:
        finetune_command.configure("--gpu h100 --gradient_checkpointing --remat none --lora_r 0".split(), "finetune.py")
    assert str(error.value).splitlines()[1:] == [
        "  --lora_r 0: must be at least 1.",
        "  --gpu names the GPU to plan for; give --plan too.",
        "  --gradient_checkpointing True has no effect with --remat none, which says the opposite; leave "
        "out one of them.",
    ]


def test_three_wrong_flags_are_told_in_no_time_without_jax():
    program = """
import sys
from qlora_jax import commands
try:
    commands.entry()
finally:
    assert "jax" not in sys.modules and "numpy" not in sys.modules
"""
    argv = "finetune --bits 3 --sequence_length 64 --lora_modulez all".split()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: 3 things are wrong with the flags; see qlora-jax finetune --help.",
        "  unknown flag --lora_modulez. Did you mean --lora_modules?",
        "  --bits 3: choose 4, 8 or 16.",
        "  --sequence_length 64 has no effect without --packing; give that too, or leave it out.",
    ]
    # Of the processor: a busy machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


GUANACO_7B = """
--model_name_or_path huggyllama/llama-7b --output_dir ./output/guanaco-7b --logging_steps 10 --save_strategy steps
--data_seed 42 --save_steps 500 --save_total_limit 40 --evaluation_strategy steps --eval_dataset_size 1024
--max_eval_samples 1000 --per_device_eval_batch_size 1 --max_new_tokens 32 --dataloader_num_workers 3 --group_by_length
--logging_strategy steps --remove_unused_columns False --do_train --do_eval --do_mmlu_eval --lora_r 64 --lora_alpha 16
--lora_modules all --double_quant --quant_type nf4 --bf16 --bits 4 --warmup_ratio 0.03 --lr_scheduler_type constant
--gradient_checkpointing --dataset oasst1 --source_max_len 16 --target_max_len 512 --per_device_train_batch_size 1
--gradient_accumulation_steps 16 --max_steps 1875 --eval_steps 187 --learning_rate 0.0002 --adam_beta2 0.999
--max_grad_norm 0.3 --lora_dropout 0.1 --weight_decay 0.0 --seed 0
""".split()
"""scripts/finetune_guanaco_7b.sh of artidoro/qlora, whole."""

OF_THE_SCRIPT = ["data_seed", "evaluation_strategy", "dataloader_num_workers", "logging_strategy",
                 "remove_unused_columns", "do_mmlu_eval"]  # fmt: skip
"""Its flags that are none here, in its order."""


def test_a_command_line_of_the_reference_program_is_taken_as_it_is(capsys):
    config, _ = finetune_command.configure(GUANACO_7B, "finetune.py")
    assert (config.max_steps, config.eval_dataset_size, config.target_max_len) == (1875, 1024, 512)
    assert (config.bits, config.bf16, config.lora_dropout) == (4, True, 0.1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].removeprefix("--") for line in lines] == OF_THE_SCRIPT
    assert lines[:2] == [
        "--data_seed changes nothing here: --seed shuffles the rows.",
        "--evaluation_strategy steps changes nothing here: held-out rows are evaluated every --eval_steps steps.",
    ]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--use_auth", "--use_auth changes nothing here: the hub's token is found by itself, after `hf auth login`."),
        ("--fp16 False", "--fp16 False changes nothing here: float16 is not computed in, it overflows in training."),
        ("--fp16=no", "--fp16 no changes nothing here: float16"),
        ("--no_fp16", "--fp16 False changes nothing here: float16"),
        ("--trust-remote-code False", "--trust_remote_code False changes nothing here: no code"),
        ("--full_finetune False", "--full_finetune False changes nothing here: only adapters are trained."),
        (
            "--max_memory_MB 24000",
            "--max_memory_MB changes nothing here: a run takes what it needs of a GPU; see --plan",
        ),
        ("--cache_dir /models", "--cache_dir changes nothing here: the hub's files are kept where"),
        ("--ddp_find_unused_parameters False", "--ddp_find_unused_parameters changes nothing here: one process"),
        ("--local_rank -1", "--local_rank changes nothing here: one process drives all GPUs."),
        ("--num_beams 1", "--num_beams 1 changes nothing here: answers are greedy or sampled."),
        ("--repetition_penalty 1.0", "--repetition_penalty 1.0 changes nothing here: answers are greedy or sampled."),
        ("--label_smoothing_factor 0.0", "--label_smoothing_factor 0.0 changes nothing here: labels are not smoothed."),
        ("--debug a b", "--debug changes nothing here: messages and a progress bar are always shown."),
        ("--hub_token hf_secret", "--hub_token changes nothing here: nothing is uploaded."),
    ],
)
def test_what_changes_no_result_is_told_in_a_line(argv, line, capsys):
    finetune_command.configure(["--dataset", "x", *argv.split(), "--report_to", "none"], "finetune.py")
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith(line)
    assert "hf_secret" not in told


def test_what_would_change_the_result_is_refused_all_at_once(capsys):
    argv = "--fp16 --full_finetune True --num_beams 4 --evaluation_strategy epoch --use_auth --deepspeed ds.json --meow"
    with pytest.raises(UserError) as error:
        finetune_command.configure([*GUANACO_7B, *argv.split()], "finetune.py")
    assert str(error.value).splitlines() == [
        "6 things are wrong with the flags; see finetune.py --help.",
        "  --fp16 True is not available: float16 is not computed in, it overflows in training; use --bf16.",
        "  --full_finetune True is not available: only adapters are trained; leave it out.",
        "  --num_beams 4 is not available: answers are greedy or sampled; "
        "see --do_sample, --temperature, --top_k, --top_p and --max_new_tokens.",
        "  --evaluation_strategy epoch is not available: held-out rows are evaluated every --eval_steps steps; "
        "give --eval_steps N, or --do_eval False.",
        "  --deepspeed ds.json is not available: weights are on every GPU, and the batch is split; leave it out.",
        "  unknown flag --meow.",
    ]
    assert not capsys.readouterr().out


# Fields of transformers' Seq2SeqTrainingArguments: of 4.31, which the reference program pins, and of 5.24.
OF_THE_TRAINER = """
output_dir overwrite_output_dir do_train do_eval do_predict evaluation_strategy prediction_loss_only
per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size
gradient_accumulation_steps eval_accumulation_steps eval_delay learning_rate weight_decay adam_beta1 adam_beta2
adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type warmup_ratio warmup_steps log_level
log_level_replica log_on_each_node logging_dir logging_strategy logging_first_step logging_steps logging_nan_inf_filter
save_strategy save_steps save_total_limit save_safetensors save_on_each_node no_cuda use_mps_device seed data_seed
jit_mode_eval use_ipex bf16 fp16 fp16_opt_level half_precision_backend bf16_full_eval fp16_full_eval tf32 local_rank
ddp_backend tpu_num_cores tpu_metrics_debug debug dataloader_drop_last eval_steps dataloader_num_workers past_index
run_name disable_tqdm remove_unused_columns label_names load_best_model_at_end metric_for_best_model greater_is_better
ignore_data_skip sharded_ddp fsdp fsdp_min_num_params fsdp_config fsdp_transformer_layer_cls_to_wrap deepspeed
label_smoothing_factor optim optim_args adafactor group_by_length length_column_name report_to
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers dataloader_pin_memory skip_memory_metrics
use_legacy_prediction_loop push_to_hub resume_from_checkpoint hub_model_id hub_strategy hub_token hub_private_repo
gradient_checkpointing include_inputs_for_metrics fp16_backend push_to_hub_model_id push_to_hub_organization
push_to_hub_token mp_parameters auto_find_batch_size full_determinism torchdynamo ray_scope ddp_timeout torch_compile
torch_compile_backend torch_compile_mode xpu_backend sortish_sampler predict_with_generate generation_max_length
generation_num_beams generation_config
lr_scheduler_kwargs optim_target_modules average_tokens_across_devices activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing_kwargs use_liger_kernel liger_kernel_config use_cache
neftune_noise_alpha torch_empty_cache_steps include_num_input_tokens_seen project trackio_space_id trackio_bucket_id
trackio_static_space_id eval_strategy eval_on_start eval_do_concat_batches eval_use_gather_object include_for_metrics
batch_eval_metrics save_only_model enable_jit_checkpoint hub_always_push hub_revision
restore_callback_states_from_checkpoint use_cpu accelerator_config parallelism_config dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy
ddp_static_graph
""".split()
# Those of its own, with what its scripts call use_auth_token and what no program reads (lora_modules).
OF_THE_REFERENCE = """
model_name_or_path trust_remote_code use_auth_token use_auth eval_dataset_size max_train_samples max_eval_samples
source_max_len target_max_len dataset dataset_format cache_dir train_on_source mmlu_split mmlu_dataset do_mmlu_eval
max_mmlu_samples mmlu_source_max_len full_finetune adam8bit double_quant quant_type bits lora_r lora_alpha lora_dropout
lora_modules max_memory_MB max_new_tokens min_new_tokens do_sample num_beams num_beam_groups penalty_alpha use_cache
temperature top_k top_p typical_p diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size
""".split()


def test_every_flag_of_the_reference_program_is_known():
    ours = {field.name for field in dataclasses.fields(finetune_command.Flags)}
    assert {*OF_THE_TRAINER, *OF_THE_REFERENCE} - ours <= set(FOREIGN_FLAGS)
    assert not ours & set(FOREIGN_FLAGS)


def test_what_is_said_of_foreign_flags_names_flags():
    ours = {field.name for field in dataclasses.fields(finetune_command.Flags)}
    for name, foreign in FOREIGN_FLAGS.items():
        assert bool(foreign.advice) is (foreign.harmless is not None), name
        words = set(re.findall(r"`(\w+)(?:=[^`]*)?`", foreign.here + foreign.advice))
        assert words <= ours, name


@pytest.mark.parametrize(
    ("added", "lines"),
    [
        # Defaults that it spells out are told.
        ("--bits 8", ["quant_type has no effect with --bits 8.", "double_quant has no effect with --bits 8."]),
        ("--packing", ["group_by_length has no effect with --packing."]),
        ("--warmup_steps 5", ["warmup_ratio has no effect with --warmup_steps 5."]),
        ("--optim sgd", ["adam_beta2 has no effect with --optim sgd."]),
        ("--temperature 1.0", ["temperature has no effect without --do_sample."]),
    ],
)
def test_redundant_flags_are_told(added, lines, capsys):
    finetune_command.configure(GUANACO_7B + added.split(), "finetune.py")
    assert capsys.readouterr().out.splitlines()[len(OF_THE_SCRIPT) :] == [f"--{line}" for line in lines]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--quant_type fp4 --bits 8", "--quant_type fp4 has no effect with --bits 8; leave it out."),
        ("--block_size 128 --bits 16", "--block_size 128 has no effect with --bits 16;"),
        ("--double_quant False --bits 8", "--double_quant False has no effect with --bits 8;"),
        (
            "--eval_dataset x --eval_dataset_size 4",
            "--eval_dataset_size 4 has no effect with --eval_dataset; leave out",
        ),
        ("--do_eval False --eval_dataset_size 4", "--eval_dataset_size 4 has no effect with --do_eval False;"),
        (
            "--dataset default --eval_dataset_size 4",
            "--eval_dataset_size 4 has no effect with --dataset default, which",
        ),
        (
            "--max_steps 5 --num_train_epochs 2",
            "--max_steps 5 has no effect with --num_train_epochs 2.0; leave out one",
        ),
        ("--warmup_ratio 0.1 --warmup_steps 5", "--warmup_ratio 0.1 has no effect with --warmup_steps 5;"),
        ("--group_by_length False --packing", "--group_by_length False has no effect with --packing;"),
        ("--temperature 0.7", "--temperature 0.7 has no effect without --do_sample; give that too, or leave it out."),
        ("--top_k 5", "--top_k 5 has no effect without --do_sample;"),
        ("--top_p 0.9", "--top_p 0.9 has no effect without --do_sample;"),
        ("--adam_epsilon 1e-6 --optim lion_8bit", "--adam_epsilon 1e-06 has no effect with --optim lion_8bit;"),
        ("--adam_beta1 0.8 --optim sgd", "--adam_beta1 0.8 has no effect with --optim sgd;"),
        (
            "--gradient_checkpointing --remat none",
            "--gradient_checkpointing True has no effect with --remat none, which",
        ),
        (
            "--gradient_checkpointing False --remat full",
            "--gradient_checkpointing False has no effect with --remat full",
        ),
    ],
)
def test_flags_without_an_effect_are_refused(argv, message):
    with pytest.raises(UserError) as error:
        finetune_command.configure(["--dataset", "x", *argv.split()], "finetune.py")
    assert str(error.value).startswith(message)


def test_what_is_off_for_a_while_is_told():
    config = TrainConfig(dataset="x", do_eval=False, eval_steps=7, save_strategy="no", save_steps=3, run_name="n")
    assert idle_notes(config, changed_fields(config)) == [
        "`eval_steps` has no effect with `do_eval=False`.",
        "`save_steps` has no effect with `save_strategy=no`.",
        "`run_name` has no effect with `report_to=tensorboard`.",
    ]


def test_rules_name_fields():
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for rule in IDLE:
        assert set(rule.fields) <= set(fields)
        assert not rule.why.format(**fields).startswith("`")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        ("--num_train_epochs 1", "max_steps", 10000),
        ("--packing False", "sequence_length", None),
        ("--remat full", "gradient_checkpointing", True),
        ("--warmup_steps 3", "max_steps", 60),
    ],
)
def test_the_example_leaves_out_what_a_flag_makes_void(argv, field, value, capsys):
    config, _ = finetune_command.configure(argv.split(), "finetune.py")
    assert getattr(config, field) == value
    assert (f"--{field} " in capsys.readouterr().out) is (value == 60)


@pytest.mark.parametrize("flags", ["--block_size 64", "--double_quant"])
def test_converting_refuses_flags_without_an_effect(flags, tmp_path):
    name = flags.split()[0]
    with pytest.raises(UserError, match=f"^{name} has no effect with --quant_type int8; leave it out"):
        convert_command.main(["m", str(tmp_path), "--quant_type", "int8", *flags.split()])


def test_flags_are_listed_by_their_properties():
    @dataclasses.dataclass(frozen=True)
    class Schema:
        model: str = argument("A positional argument.")
        rank: int = flag(1, "", shapes_step=True)
        remat: str = flag("full", "", shapes_step=True, resume="free")
        name: str = flag("", "", resume="free")

    assert names_where(Schema, shapes_step=True) == ("rank", "remat")
    assert names_where(Schema, shapes_step=True, resume="free") == ("remat",)
    assert names_where(Schema, resume="same") == ("rank",)


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in text


def test_demo_is_made_of_real_flags():
    dataclasses.replace(TrainConfig(), **EXAMPLE_FLAGS)


def test_a_full_disk_is_one_line(capsys):
    def main(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: metrics.jsonl cannot be written: No space left on device; free space.\n"


# --- what a status says


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_training_steps_is_resumable(handlers, number, monkeypatch, capsys):
    def finetune(config):
        signal.raise_signal(number)

    monkeypatch.setitem(sys.modules, "qlora_jax.finetuning", SimpleNamespace(finetune=finetune))
    assert finetune_command.train(TrainConfig(), "finetune.py") == 75
    assert "run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):  # which is status 130: there is nothing to resume
        finetune_command.train(TrainConfig(do_train=False), "finetune.py")


def test_what_the_parent_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with sigterm_as_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.fixture
def finished(tmp_path):
    """The configuration of a run that is finished, and a function that writes its files."""
    config = TrainConfig(output_dir=str(tmp_path), learning_rate=3e-4)

    def write(flags=None, summary='{"steps": 7}'):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        record = {"flags": dataclasses.asdict(config) if flags is None else flags, "facts": {"inputs": {}}}
        write_checked_json(tmp_path / "run.json", record)
        (tmp_path / "summary.json").write_text(summary)

    return config, write


def test_a_finished_run_is_known_by_its_files(finished, tmp_path):
    config, write = finished
    assert finetune_command.finished_steps(config) is None
    write()
    assert finetune_command.finished_steps(config) == 7
    write({"learning_rate": 3e-4})  # of a version without the other flags
    assert finetune_command.finished_steps(config) == 7
    for change in ({"learning_rate": 1e-4}, {"prompts": "more"}, {"overwrite_output_dir": True}, {"do_train": False}):
        assert finetune_command.finished_steps(dataclasses.replace(config, **change)) is None
    for damaged in ("", "[]", '{"steps": null}', "{}", "[" * 100_000):
        write(summary=damaged)
        assert finetune_command.finished_steps(config) is None
    write([])
    assert finetune_command.finished_steps(config) is None
    write()
    (tmp_path / "adapter").rmdir()
    assert finetune_command.finished_steps(config) is None


# --- what the library logs and raises


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`max_steps=0`: must be at least 1.", "--max_steps 0: must be at least 1."),
        ("give `packing` too", "give --packing too"),
        ("`dataset=my rows.jsonl` is missing", "--dataset my rows.jsonl is missing"),
        (
            "log in with `hf auth login`; `hidden_size` is missing",
            "log in with `hf auth login`; `hidden_size` is missing",
        ),
        ("`model` is no model", "MODEL is no model"),
    ],
)
def test_fields_are_shown_as_flags(message, shown):
    assert with_dashes(message, {**spellings(TrainConfig), "model": "MODEL"}) == shown


def test_positional_arguments_are_not_given_dashes():
    @dataclasses.dataclass(frozen=True)
    class Schema:
        model: str = argument("")
        rank: int = flag(1, "")

    assert spellings(Schema) == {"model": "MODEL", "rank": "--rank"}


def test_a_command_prints_what_the_library_logs(capsys):
    logger = logging.getLogger("qlora_jax.somewhere")
    before = logging.getLogger("qlora_jax").level, list(logging.getLogger("qlora_jax").handlers)
    with command({"packing": "--packing"}):
        logger.info("%d rows; see `packing`", 3)
        logger.warning("odd")
        logger.debug("never shown")
    logger.info("after it")
    captured = capsys.readouterr()
    assert captured.out == "3 rows; see --packing\n"
    assert captured.err == "odd\n"
    assert (logging.getLogger("qlora_jax").level, logging.getLogger("qlora_jax").handlers) == before
    assert logging.getLogger("qlora_jax").propagate


class FakeBars:
    """Stands for the module of the progress bars, of which there are some."""

    class tqdm:
        _instances = frozenset({"a bar"})

        @staticmethod
        def write(text, file):
            print(text, file=file)


def test_long_silence_is_broken(capsys, monkeypatch):
    said, logger = "", logging.getLogger("qlora_jax.somewhere")
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    with command({}, silence=0.05):
        deadline = time.monotonic() + 10
        while said.count("still at work, 0 s so far\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().out
    assert said.count("still at work, 0 s so far\n") >= 2
    monkeypatch.setitem(sys.modules, "tqdm", FakeBars)
    with command({}, silence=0.05):
        time.sleep(0.3)
        logger.info("a line")
    assert capsys.readouterr().out == "a line\n"
    monkeypatch.delitem(sys.modules, "tqdm")
    with command({}, silence=5.0):
        time.sleep(0.3)
    assert capsys.readouterr().out == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "signs-of-life"]


def test_an_error_of_the_library_names_the_flag():
    class Special(UserError):
        pass

    with pytest.raises(UserError, match=r"^--remat full is enough$"), command({"remat": "--remat"}):
        raise Special("`remat=full` is enough")


def test_a_reader_that_leaves_ends_it_quietly():
    program = "import sys; from qlora_jax.cli import run; run(lambda argv: print('x' * 2**20))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()


# --- commands


@pytest.mark.parametrize("argv", [(), ("-h",), ("--help",)])
def test_without_a_command_they_are_listed(argv, capsys):
    assert commands.main(argv) == 0
    text = capsys.readouterr().out
    for name, description in commands.COMMANDS.items():
        assert f"  {name} " in text and description in text


@pytest.mark.parametrize("argv", [["--version"], ["finetune", "--version"], ["plan", "--version"]])
def test_the_version(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        sys.exit(commands.main(argv))
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qlora-jax {version('qlora-jax')}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetun"], r"^unknown command 'finetun'; choose from finetune, .*\. Did you mean finetune\? See qlora-jax"),
        (["--packing"], r"^unknown command '--packing'; choose from finetune, plan, convert, benchmark\. See"),
        (
            ["benchmark", "kernel"],
            r"^unknown command .*Did you mean kernels\? See qlora-jax benchmark --help",
        ),
        (["plan"], r"arguments are required: MODEL\. See qlora-jax plan --help\.$"),
        (["convert", "a", "b", "--block", "3"], r"^unknown flag --block\. .*See qlora-jax convert --help\.$"),
    ],
)
def test_an_unknown_command_is_told_in_one_sentence(argv, message):
    with pytest.raises(UserError, match=message):
        commands.main(argv)


@pytest.mark.parametrize("name", ["rows", "models", "implementations", "direction", "tuning"])
def test_flags_of_timing_are_not_ignored_where_kernels_are_counted(name, tmp_path):
    argv = ["benchmark", "kernels", "--static", "--output_dir", str(tmp_path), f"--{name}", "both"]
    if name == "tuning":
        argv[-1] = "False"
    with pytest.raises(UserError, match=f"^--{name} is for timing, .*instructions are counted; leave it out"):
        commands.main(argv)


def test_the_installed_program_is_the_one_tested_here():
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["qlora-jax"]) is commands.entry


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_script_is_the_command_of_its_name(name, capsys, monkeypatch):
    if name == "benchmark":
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "step", "--help"])
    else:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    script = capsys.readouterr().out
    with pytest.raises(SystemExit):
        commands.main([name, *sys.argv[1:]])
    usage, _, flags = script.partition("\n\n")
    assert usage.startswith(f"usage: python scripts/{name}.py ")
    assert flags == capsys.readouterr().out.partition("\n\n")[2]


def test_help_is_quick_and_loads_no_jax():
    program = """
import json, sys
from qlora_jax import commands
for argv in (["finetune"], ["plan"], ["convert"], ["benchmark", "step"], ["benchmark", "kernels"]):
    try:
        commands.main([*argv, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"jax", "jaxlib", "flax", "numpy", "orbax", "transformers", "datasets", "torch", "matplotlib"}
    # Of the processor, all five together: a busy machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


SUMMARY = {
    "first_loss": 4.0, "last_loss": 1.5, "first_eval_loss": 4.5, "last_eval_loss": None,
    "bytes": {"base_packed": 2**20},
    "measured_peak_bytes": None, "planned_peak_bytes": None, "bits_per_quantized_parameter": 4.127, "steps": 1200,
    "tokens": 5, "trainable_parameters": 8192, "total_parameters": 10**6, "seconds": 90.0, "step_shapes_compiled": 1,
}  # fmt: skip


def test_the_report_of_a_run(capsys, tmp_path):
    (tmp_path / "adapter").mkdir()
    config = TrainConfig(model_name_or_path="my model", dataset="rows.jsonl", bits=8, output_dir=str(tmp_path))
    finetune_command.report(SUMMARY, [("Who?", "I.", "Aye,\ncaptain!")], config, "qlora-jax finetune")
    assert (
        capsys.readouterr().out
        == f"""
> Who?
  before: I.
  after: Aye,
  captain!

Loss (nats a token)
  training, first step  4.0000
  training, last step   1.5000
  held out, before      4.5000

Memory held by buffers
  base packed  1.0 MiB

Run
  trainable parameters            8,192
  total parameters            1,000,000
  bits a quantised parameter      4.127
  steps                           1,200
  tokens                              5
  minutes                           1.5
  step shapes compiled                1

Saved in {tmp_path}
  adapter (PEFT's format)  adapter

Use the adapter
  to answer prompts, one a line in FILE:
    qlora-jax finetune --do_train False --do_eval False --model_name_or_path 'my model' --bits 8 --dataset rows.jsonl \
--adapter {tmp_path}/adapter --output_dir {tmp_path}-answers --prompts FILE
  in PEFT, with the base as transformers loads it:
    PeftModel.from_pretrained(base, "{tmp_path}/adapter")
"""
    )


def test_the_report_of_a_run_that_only_answered(capsys, tmp_path):
    losses = dict.fromkeys(("first_loss", "last_loss", "first_eval_loss", "last_eval_loss"))
    summary = {**SUMMARY, **losses, "bits_per_quantized_parameter": None}
    finetune_command.report(summary, [], TrainConfig(output_dir=str(tmp_path)), "qlora-jax finetune")
    text = capsys.readouterr().out
    assert text.startswith("\nMemory held by buffers\n") and text.endswith("step shapes compiled          1\n")
    assert "bits a quantised" not in text


# --- the process


@pytest.mark.parametrize(
    ("answer", "fraction"),
    [("24564", 0.969), ("81559\n24564", 0.969), ("8192", 0.927), ("[N/A]", None), ("", None)],
)
def test_jax_takes_the_gpu_but_for_the_allowance(answer, fraction, tmp_path, monkeypatch):
    """Of the smallest GPU: the planner counts on the rest being there."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text(f"#!/bin/sh\necho '{answer}'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")  # so that what it was comes back
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    let_jax_fill_the_gpu()
    assert os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == (fraction and str(fraction))
    if fraction:
        left = (1 - fraction) * min(map(int, answer.split())) * 2**20
        assert abs(left - CONTEXT_BYTES - 0.01 * min(map(int, answer.split())) * 2**20) < 2**26
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    let_jax_fill_the_gpu()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx512f avx512_bf16 avx512vbmi\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu sse2 avx2\nbugs\t\t: avx512_bf16\n", False),
        ("Features\t: asimd bf16\n", False),
    ],
)
def test_processors_that_multiply_bfloat16(cpuinfo, found):
    assert multiplies_bfloat16(cpuinfo) is found


@pytest.mark.parametrize(
    ("multiplies", "argv", "bf16"), [(True, [], True), (False, [], None), (True, ["--bf16", "False"], False)]
)
def test_the_example_computes_in_what_the_processor_multiplies(multiplies, argv, bf16, monkeypatch, capsys):
    monkeypatch.setattr(finetune_command, "multiplies_bfloat16", lambda: multiplies)
    config, _ = finetune_command.configure(argv, "finetune.py")
    assert config.bf16 is bf16
    assert ("--bf16 True" in capsys.readouterr().out) is (bf16 is True)
