"""Command lines of the reference program, pasted as they are."""

import dataclasses
import re

import pytest

from qlora_jax.commands import finetune as finetune_command
from qlora_jax.commands.foreign_flags import FOREIGN_FLAGS
from qlora_jax.errors import UserError

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
