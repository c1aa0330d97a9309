"""Configuration of a fine-tuning run: the one schema of its flags, with the reference program's names."""

import dataclasses
import math
from typing import Any, Literal

from qlora_jax.choices import Bits, Kernel, OnBadRow, QuantType, Remat
from qlora_jax.cli import flag, names_where
from qlora_jax.defaults import DEFAULT_DATASET, DEFAULT_MODEL
from qlora_jax.errors import refuse_all
from qlora_jax.training.idle_fields import changed_fields, idle_refusals


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Settings of the compiled training step, beside the model, the mesh and the shape of a batch.

    Attributes:
        remat: activations kept for the backward pass, see `qlora_jax.nn.remat`.
        dropout: draw dropout masks, keyed by (seed, step, micro-batch, device), so that a resumed run draws the same.
            The tiles of a long batch draw masks of their own, and `remat` "none" has no tiles: there it draws others.
        seed: of the dropout masks.
        max_grad_norm: the mean gradient is clipped to this global norm (Pascanu et al. 2013); 0 for no clipping.
        micro_batches: forward passes of an optimizer step, the leading axis A of its batch [A, B, S].
    """

    remat: Remat = "none"
    dropout: bool = False
    seed: int = 0
    max_grad_norm: float = 0.0
    micro_batches: int = 1


_AT_LEAST_ONE = frozenset((
    "lora_r", "source_max_len", "target_max_len", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_steps", "per_device_eval_batch_size", "max_new_tokens", "logging_steps", "save_steps", "save_total_limit",
    "max_train_samples", "max_eval_samples", "sequence_length",
))  # fmt: skip
_NOT_NEGATIVE = frozenset((
    "weight_decay", "max_grad_norm", "eval_steps", "top_k", "eval_dataset_size", "warmup_steps", "seed",
))  # fmt: skip
_POSITIVE = frozenset(("learning_rate", "lora_alpha", "adam_epsilon", "temperature", "num_train_epochs"))
_BELOW_ONE = frozenset(("lora_dropout", "adam_beta1", "adam_beta2", "warmup_ratio"))


def _complaint(name: str, value: Any) -> str | None:
    """Say what the value of a field of `TrainConfig` has to be, if it is not; None if it is, or is not given."""
    if name == "bits" and value not in ("auto", 4, 8, 16):
        return "choose auto, 4, 8 or 16"
    if name == "block_size" and (not 32 <= value <= 4096 or value & (value - 1)):
        return "choose a power of two from 32 to 4096"
    if name == "top_p" and not 0 < value <= 1:
        return "must be above 0 and at most 1"
    if name in _BELOW_ONE and not 0 <= value < 1:
        return "must be at least 0 and below 1"
    if not isinstance(value, int | float):
        return None
    if name in _AT_LEAST_ONE and value < 1:
        return "must be at least 1"
    if name in _POSITIVE and not value > 0:
        return "must be positive"
    if name in _NOT_NEGATIVE and value < 0:
        return "must not be negative"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    if isinstance(value, int) and value >= 2**31:
        return "must be below 2147483648"
    return None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One fine-tuning run. Defaults are the reference QLoRA program's where it has the flag."""

    model_name_or_path: str = flag(
        DEFAULT_MODEL,
        "Hub id, Hugging Face directory, GGUF file, or a directory made by qlora-jax convert.",
        group="model",
    )
    bits: Bits = flag(
        "auto",
        "Bits of the frozen linear weights: 4, 8 (row-wise int8) or 16 (not quantised); auto keeps those of a "
        "checkpoint that is quantised already as they are, and stores others in 4.",
        group="model",
        shapes_step=True,
    )
    quant_type: QuantType = flag(
        "nf4",
        "4-bit data type: nf4 (the paper's), fp4, int4, or GGUF's q4_0 and q4_1.",
        group="model",
        shapes_step=True,
    )
    double_quant: bool = flag(
        True, "Quantise the quantisation constants too (0.373 bits a parameter less).", group="model", shapes_step=True
    )
    block_size: int = flag(64, "Weights that share one quantisation constant.", group="model", shapes_step=True)
    bf16: bool | None = flag(
        None,
        "Compute in bfloat16 (True) or float32 (False); by default bfloat16 on a GPU, float32 on a CPU.",
        group="model",
        shapes_step=True,
    )
    kernel: Kernel = flag(
        "auto",
        "How 4-bit weights are multiplied: xla dequantizes them with XLA (anywhere); fused dequantizes inside the "
        "product and unfused with a kernel before it (CUDA GPUs); auto takes what should be fastest on the device. "
        "dequantize: the former name of unfused.",
        group="model",
        shapes_step=True,
        resume="free",
    )

    lora_r: int = flag(64, "Rank of the adapters.", group="adapters", shapes_step=True)
    lora_alpha: float = flag(16.0, "Adapters are scaled by lora_alpha / lora_r.", group="adapters", shapes_step=True)
    lora_dropout: float = flag(0.0, "Dropout on the adapters' input.", group="adapters", shapes_step=True)
    lora_modules: str = flag(
        "all",
        "Linears that get an adapter: all, attention, mlp, or names such as q_proj,v_proj.",
        group="adapters",
        shapes_step=True,
    )
    adapter: str | None = flag(
        None,
        "Start from this adapter directory (PEFT's format) instead of a fresh one.",
        group="adapters",
        shapes_step=True,
    )

    dataset: str = flag(
        DEFAULT_DATASET,
        "Local .json/.jsonl/.csv/.tsv/.parquet file or directory, hub id, or one of alpaca, alpaca-clean, oasst1; "
        "'default' is the small set that ships with the package.",
        group="data",
    )
    dataset_format: str | None = flag(
        None,
        "alpaca, alpaca-clean, input-output, prompt-completion, question-answer, oasst1, messages or sharegpt; by "
        "default told from the columns.",
        group="data",
    )
    split: str | None = flag(
        None,
        "Split of the data set to train on (of a directory: its files of that name); by default train.",
        group="data",
    )
    on_bad_row: OnBadRow = flag(
        "error",
        "A row that cannot be used: error refuses the data and names the first twenty, skip leaves such rows out.",
        group="data",
        resume="free",
    )
    max_train_samples: int | None = flag(None, "Use only this many training rows.", group="data")
    max_eval_samples: int | None = flag(None, "Use only this many held-out rows.", group="data")
    eval_dataset: str | None = flag(None, "A separate data set to evaluate on instead of rows held out.", group="data")
    eval_split: str | None = flag(
        None,
        "Split to evaluate on, of eval_dataset or else of dataset; by default test, else validation.",
        group="data",
    )
    eval_dataset_size: int | None = flag(
        None,
        "Rows of the training data held out for evaluation; by default none if dataset has a split to evaluate on, "
        "else 1024, or a tenth of a data set below 2048 rows.",
        group="data",
    )
    source_max_len: int = flag(1024, "Source tokens kept of a row.", group="data")
    target_max_len: int = flag(256, "Target tokens kept of a row.", group="data")
    train_on_source: bool = flag(False, "Train on the source tokens as well.", group="data")
    packing: bool = flag(
        False,
        "Pack several rows into one sequence, with attention and positions of their own.",
        group="data",
        shapes_step=True,
    )
    sequence_length: int | None = flag(
        None, "Length of a packed sequence; by default source_max_len + target_max_len.", group="data"
    )
    group_by_length: bool = flag(True, "Batch rows of similar length together (without packing).", group="data")

    do_train: bool = flag(True, "Train; False evaluates and answers the prompts only.", group="training")
    optim: Literal[
        "paged_adamw_32bit", "adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "paged_lion_8bit", "lion_8bit",
        "adafactor", "sgd",
    ] = flag(
        "paged_adamw_32bit",
        "Optimizer; a paged one keeps its state on the device while it fits and on the host otherwise.",
        group="training", shapes_step=True,
    )  # fmt: skip
    optim_placement: Literal["device", "host", "auto"] | None = flag(
        None,
        "Where the optimizer's state lives: on the device, on the host, or on the host as far as the device is full; "
        "by default auto for paged optimizers, device for others.",
        group="training",
        shapes_step=True,
        resume="free",
    )
    per_device_train_batch_size: int = flag(1, "Sequences in a forward pass on each device.", group="training")
    gradient_accumulation_steps: int = flag(
        16, "Forward passes in an optimizer step.", group="training", shapes_step=True
    )
    max_steps: int = flag(10000, "Optimizer steps; or give num_train_epochs.", group="training")
    num_train_epochs: float | None = flag(
        None, "Passes over the training data, instead of max_steps.", group="training"
    )
    learning_rate: float = flag(2e-4, "Peak learning rate.", group="training")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = flag(
        "constant", "Course of the learning rate after the warm-up.", group="training"
    )
    warmup_ratio: float = flag(0.03, "Share of the steps over which the learning rate rises from 0.", group="training")
    warmup_steps: int | None = flag(None, "Warm-up in steps, instead of warmup_ratio.", group="training")
    weight_decay: float = flag(0.0, "Decoupled weight decay.", group="training", shapes_step=True)
    adam_beta1: float = flag(0.9, "First-moment decay of AdamW and Lion.", group="training")
    adam_beta2: float = flag(0.999, "Second-moment decay of AdamW and Lion.", group="training")
    adam_epsilon: float = flag(1e-8, "Epsilon of AdamW.", group="training")
    max_grad_norm: float = flag(
        0.3, "Clip the gradient to this global norm (0: no clipping).", group="training", shapes_step=True
    )
    gradient_checkpointing: bool = flag(
        True,
        "Recompute activations in the backward pass to save memory; False is remat none.",
        group="training",
        shapes_step=True,
        resume="free",
    )
    remat: Remat | None = flag(
        None,
        "What the backward pass finds of a layer: its input (full, the default), that and what attention returned "
        "(save_attention), its input in host memory (offload), or everything that is costly to compute (none).",
        group="training",
        shapes_step=True,
        resume="free",
    )
    seed: int = flag(0, "Seed of adapters, shuffles and dropout.", group="training")

    do_eval: bool = flag(
        True, "Evaluate on held-out rows during and after training.", group="evaluation", resume="free"
    )
    eval_steps: int = flag(
        250, "Steps between evaluations (0: only before and after training).", group="evaluation", resume="free"
    )
    per_device_eval_batch_size: int = flag(
        1, "Sequences in a forward pass of evaluation.", group="evaluation", resume="free"
    )
    prompts: str | None = flag(
        None, "Text file, one prompt a line, answered before and after training.", group="evaluation", resume="free"
    )
    max_new_tokens: int = flag(256, "Longest answer to a prompt, in tokens.", group="evaluation", resume="free")
    do_sample: bool = flag(
        False, "Sample the answers instead of taking the likeliest token.", group="evaluation", resume="free"
    )
    temperature: float = flag(1.0, "Sampling temperature.", group="evaluation", resume="free")
    top_k: int = flag(50, "Sample among the k likeliest tokens (0: all).", group="evaluation", resume="free")
    top_p: float = flag(
        1.0, "Sample among the likeliest tokens that hold this much probability.", group="evaluation", resume="free"
    )

    output_dir: str = flag(
        "./output", "Where adapters, checkpoints, metrics and the plot go.", group="output", resume="free"
    )
    overwrite_output_dir: bool = flag(
        False, "Delete what another run left in output_dir.", group="output", resume="free"
    )
    strict_resume: bool = flag(
        False,
        "Refuse to resume if the newest checkpoint is damaged, instead of going on from the one before it.",
        group="output",
        resume="free",
    )
    logging_steps: int = flag(10, "Steps between lines of metrics.jsonl.", group="output", resume="free")
    save_strategy: Literal["steps", "no"] = flag(
        "steps", "Save checkpoints every save_steps, or only at the end.", group="output", resume="free"
    )
    save_steps: int = flag(250, "Steps between checkpoints.", group="output", resume="free")
    save_total_limit: int = flag(40, "Checkpoints kept; the oldest are deleted.", group="output", resume="free")
    report_to: Literal["tensorboard", "wandb", "all", "none"] = flag(
        "tensorboard", "Where metrics go besides metrics.jsonl.", group="output", resume="free"
    )
    run_name: str | None = flag(None, "Name of the run in W&B.", group="output", resume="free")

    def __post_init__(self) -> None:
        """Reject values that no run could use, or that have no effect beside others; UserError names every field."""
        refuse_all(self.refusals())

    def refusals(self) -> list[str]:
        """List a sentence for every field with such a value."""
        changed = changed_fields(self)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        wrong = ((name, value, _complaint(name, value)) for name, value in values.items())
        return [
            *(f"`{name}={value}`: {complaint}." for name, value, complaint in wrong if complaint is not None),
            *idle_refusals(self, changed, changed),
        ]

    @property
    def remat_policy(self) -> Remat:
        """The activations of a layer that are kept for the backward pass, see `qlora_jax.nn.remat`."""
        return self.remat or ("full" if self.gradient_checkpointing else "none")

    @property
    def packed_length(self) -> int | None:
        """Tokens of a packed sequence; None without packing."""
        return (self.sequence_length or self.source_max_len + self.target_max_len) if self.packing else None

    def step_config(self) -> StepConfig:
        """Derive the settings of the training step."""
        return StepConfig(
            remat=self.remat_policy,
            dropout=self.lora_dropout > 0,
            seed=self.seed,
            max_grad_norm=self.max_grad_norm,
            micro_batches=self.gradient_accumulation_steps,
        )


FREE_FLAGS = frozenset(names_where(TrainConfig, resume="free"))
"""Fields that a run which is resumed may change: neither its losses nor how its state is stored depend on them."""

STEP_FLAGS = names_where(TrainConfig, shapes_step=True)
"""Fields of a run that shape the programs of its step; a plan has them under the same names."""
