"""Flags of the reference program (artidoro/qlora) and of its trainer (transformers) that are not flags here.

Command lines are carried over by pasting them: a flag that changes nothing of the result is told in a line, one that
would change it is refused.
"""

from collections.abc import Mapping

from qlora_jax.cli import ForeignFlag

_OFF = ("false", "none")


def _told(here: str, *names: str) -> dict[str, ForeignFlag]:
    """Flags of which no value changes a result."""
    return dict.fromkeys(names, ForeignFlag(here))


def _only(values: tuple[str, ...], here: str, advice: str, *names: str) -> dict[str, ForeignFlag]:
    """Flags that change nothing with some values only."""
    return dict.fromkeys(names, ForeignFlag(here, values, advice))


FOREIGN_FLAGS: Mapping[str, ForeignFlag] = {
    # The model.
    **_only(_OFF, "no code from a model repository is ever run", "leave it out", "trust_remote_code"),
    **_told("the hub's token is found by itself, after `hf auth login`", "use_auth", "use_auth_token"),
    **_told("the hub's files are kept where the variable HF_HOME says", "cache_dir"),
    **_only(_OFF, "only adapters are trained", "leave it out", "full_finetune"),
    **_told(
        "a run takes what it needs of a GPU; see `plan`, `optim_placement` and `remat`",
        "max_memory_MB", "auto_find_batch_size", "torch_empty_cache_steps",
    ),
    **_only(_OFF, "float16 is not computed in, it overflows in training", "use `bf16`", "fp16", "fp16_full_eval"),
    **_only(_OFF, "evaluation computes in the type of training", "use `bf16`", "bf16_full_eval"),
    **_told("float16 is not computed in", "fp16_opt_level", "fp16_backend", "half_precision_backend"),
    **_told("the precision of float32 products is XLA's default", "tf32"),
    # Data.
    **_told("`seed` shuffles the rows", "data_seed"),
    **_told("unused columns are reported and left alone", "remove_unused_columns"),
    **_told(
        "rows are tokenised once, before training", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "dataloader_in_order", "length_column_name", "label_names",
    ),
    **_only(_OFF, "no row is dropped, the last batch of a pass is smaller", "leave it out", "dataloader_drop_last"),
    **_only(_OFF, "a resumed run goes on at the row where it stopped", "leave it out", "ignore_data_skip"),
    **_only(_OFF, "rows come in a random order", "see `group_by_length`", "sortish_sampler"),
    **_only(
        ("random", "group_by_length"), "rows come in a random order", "see `group_by_length`",
        "train_sampling_strategy",
    ),
    # Evaluation and prediction.
    **_told(
        "MMLU is not evaluated in this release",
        "do_mmlu_eval", "mmlu_dataset", "mmlu_split", "max_mmlu_samples", "mmlu_source_max_len",
    ),
    **_only(
        ("steps",), "held-out rows are evaluated every `eval_steps` steps", "give `eval_steps=N`, or `do_eval=False`",
        "evaluation_strategy", "eval_strategy",
    ),
    **_only(("0",), "evaluation begins before the first step", "leave it out", "eval_delay"),
    **_told(
        "held-out rows are evaluated before training and every `eval_steps` steps; their mean loss is logged",
        "eval_on_start", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
        "batch_eval_metrics", "prediction_loss_only", "include_inputs_for_metrics", "include_for_metrics",
    ),
    **_only(_OFF, "no predictions are written", "see `prompts`", "do_predict", "predict_with_generate"),
    **_only(
        _OFF, "the adapter of the last step is kept, and checkpoints beside it",
        "take the checkpoint with the lowest eval_loss in metrics.jsonl", "load_best_model_at_end",
    ),
    **_told("no checkpoint is chosen by a metric", "metric_for_best_model", "greater_is_better"),
    **_only(
        ("0", *_OFF), "answers are greedy or sampled",
        "see `do_sample`, `temperature`, `top_k`, `top_p` and `max_new_tokens`",
        "min_new_tokens", "penalty_alpha", "diversity_penalty", "no_repeat_ngram_size", "generation_config",
        "generation_max_length",
    ),
    **_only(
        ("1", "none"), "answers are greedy or sampled",
        "see `do_sample`, `temperature`, `top_k`, `top_p` and `max_new_tokens`",
        "num_beams", "num_beam_groups", "generation_num_beams", "typical_p", "repetition_penalty", "length_penalty",
    ),
    **_told("answers are generated with a key-value cache", "use_cache"),
    # Log and checkpoints.
    **_only(("steps",), "a line is logged every `logging_steps` steps", "give `logging_steps=N`", "logging_strategy"),
    **_told("the first step is always logged", "logging_first_step"),
    **_told("TensorBoard's files go to tensorboard/ in `output_dir`", "logging_dir"),
    **_told("a loss that is not finite stops the run", "logging_nan_inf_filter"),
    **_told(
        "messages and a progress bar are always shown", "log_level", "log_level_replica", "log_on_each_node",
        "disable_tqdm", "debug",
    ),
    **_told("memory is counted from the buffers", "skip_memory_metrics"),
    **_told("tokens are always counted", "include_num_input_tokens_seen"),
    **_told(
        "a checkpoint has all that a run needs to be resumed, its adapter in safetensors",
        "save_safetensors", "save_on_each_node", "save_only_model", "enable_jit_checkpoint",
        "restore_callback_states_from_checkpoint",
    ),
    **_only(
        (*_OFF, "true"), "a run resumes by itself from the last checkpoint in `output_dir`",
        "give the directory of that run as `output_dir`", "resume_from_checkpoint",
    ),
    **_only(
        _OFF, "nothing is uploaded", "upload the adapter with `hf upload`", "push_to_hub",
    ),
    **_told(
        "nothing is uploaded", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push",
        "hub_revision", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
    ),
    **_told(
        "metrics go to TensorBoard and W&B alone, see `report_to`", "project", "trackio_space_id", "trackio_bucket_id",
        "trackio_static_space_id",
    ),
    # Optimizer and step.
    **_told("the reference program does not read it either; 8-bit AdamW is `optim=adamw_8bit`", "adam8bit"),
    **_only(_OFF, "the optimizer is `optim`", "give `optim=adafactor`", "adafactor"),
    **_only(_OFF, "optimizers have no further settings", "leave it out", "optim_args", "optim_target_modules"),
    **_only(_OFF, "schedules have no further settings", "see `lr_scheduler_type`", "lr_scheduler_kwargs"),
    **_only(("0", *_OFF), "labels are not smoothed", "leave it out", "label_smoothing_factor"),
    **_only(("0", *_OFF), "no noise is added to embeddings", "leave it out", "neftune_noise_alpha"),
    **_only(
        (), "batches are counted for each device", "give `per_device_train_batch_size`", "per_gpu_train_batch_size"
    ),
    **_only((), "batches are counted for each device", "give `per_device_eval_batch_size`", "per_gpu_eval_batch_size"),
    **_only(
        (), "activations are recomputed as `remat` says", "give `gradient_checkpointing`", "activation_checkpointing"
    ),
    **_told(
        "activations are recomputed as `remat` says", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"
    ),
    **_told("a CPU repeats a run bit for bit, a GPU but for the order of sums", "full_determinism"),
    **_told(
        "XLA compiles every step; see `kernel`", "torch_compile", "torch_compile_backend", "torch_compile_mode",
        "torchdynamo", "jit_mode_eval", "use_ipex", "xpu_backend", "use_liger_kernel", "liger_kernel_config",
    ),
    # Devices.
    **_only(_OFF, "a run takes the GPU if there is one", "set the variable JAX_PLATFORMS=cpu", "no_cuda", "use_cpu"),
    **_only(_OFF, "Apple's GPUs are not used", "leave it out", "use_mps_device"),
    **_only(
        (*_OFF, ""), "weights are on every GPU, and the batch is split", "leave it out",
        "fsdp", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "sharded_ddp", "deepspeed",
        "parallelism_config",
    ),
    **_told(
        "one process drives all GPUs", "local_rank", "ddp_backend", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout", "accelerator_config", "ray_scope",
        "mp_parameters", "tpu_num_cores", "tpu_metrics_debug", "average_tokens_across_devices", "past_index",
        "use_legacy_prediction_loop",
    ),
}  # fmt: skip
"""By name. Names that are flags here are not in it."""
