"""Flags from dataclasses: types, defaults, help, and all that is wrong with them at once."""

import dataclasses
import resource
import subprocess
import sys

import pytest

from qlora_jax.cli import argument, flag, names_where, parse_flags
from qlora_jax.commands import finetune as finetune_command
from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig


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
    assert (config.bits, config.quant_type, config.double_quant, config.output_dir) == ("auto", "nf4", True, "./output")


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
        (["--quant_type", "q5_1"], "--quant_type: invalid choice: 'q5_1'"),
        (["stray"], "'stray' is not a flag"),
        (
            ["--sequence_length", "64"],
            "--sequence_length 64 has no effect without --packing; give that too, or leave it out.",
        ),
        (
            ["--eval_dataset", "x", "--do_eval", "False"],
            "--eval_dataset x has no effect with --do_eval False; leave out one of them.",
        ),
        (["--bits", "3"], "--bits: invalid choice: '3' (choose from 'auto', 4, 8, 16)"),
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
            "--max_steps many --merge x --packing maybe --no-merge --quant_type q5_1 --lora_r 0",
            [
                "--max_steps: invalid int value: 'many'.",
                "--packing: expected True or False, not 'maybe'.",
                "--quant_type: invalid choice: 'q5_1' (choose from 'nf4', 'fp4', 'int4', 'q4_0', 'q4_1').",
                "unknown flag --merge.",
                "unknown flag --no-merge.",
                "--lora_r 0: must be at least 1.",
            ],
        ),
        ("--merge --lora_r 0", ["unknown flag --merge.", "--lora_r 0: must be at least 1."]),
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
    argv = "finetune --lora_r 0 --sequence_length 64 --lora_modulez all".split()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: 3 things are wrong with the flags; see qlora-jax finetune --help.",
        "  unknown flag --lora_modulez. Did you mean --lora_modules?",
        "  --lora_r 0: must be at least 1.",
        "  --sequence_length 64 has no effect without --packing; give that too, or leave it out.",
    ]
    # Of the processor: a busy machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


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
