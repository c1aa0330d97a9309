"""Flags that have no effect beside others, and the example, which leaves such flags out."""

import dataclasses

import pytest

from qlora_jax.commands import convert as convert_command
from qlora_jax.commands import finetune as finetune_command
from qlora_jax.commands.finetune import EXAMPLE_FLAGS
from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.idle_fields import IDLE, changed_fields, idle_notes


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


def test_demo_is_made_of_real_flags():
    dataclasses.replace(TrainConfig(), **EXAMPLE_FLAGS)


@pytest.mark.parametrize(
    ("multiplies", "argv", "bf16"), [(True, [], True), (False, [], None), (True, ["--bf16", "False"], False)]
)
def test_the_example_computes_in_what_the_processor_multiplies(multiplies, argv, bf16, monkeypatch, capsys):
    monkeypatch.setattr(finetune_command, "multiplies_bfloat16", lambda: multiplies)
    config, _ = finetune_command.configure(argv, "finetune.py")
    assert config.bf16 is bf16
    assert ("--bf16 True" in capsys.readouterr().out) is (bf16 is True)
