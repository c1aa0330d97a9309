"""`qlora-jax finetune`: flags to a run, and what the run came to."""

import dataclasses
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from qlora_jax.cli import (
    RESUMABLE,
    command,
    flag,
    parse_flags,
    sigterm_as_ctrl_c,
    spellings,
    with_dashes,
    without_foreign_flags,
)
from qlora_jax.commands.foreign_flags import FOREIGN_FLAGS
from qlora_jax.environment import keep_compiled_programs, multiplies_bfloat16
from qlora_jax.errors import UserError
from qlora_jax.files import read_checked_json, user_path
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.idle_fields import changed_fields, idle_fields, idle_notes, idle_refusals
from qlora_jax.training.inputs import input_files
from qlora_jax.training.ownership import claimed
from qlora_jax.training.results import SUMMARY_FILE, changed_results, read_summary
from qlora_jax.training.signals import StoppedAtOnce

DESCRIPTION = """Fine-tune a language model with QLoRA: frozen 4-bit base weights, LoRA adapters as the only trainable
parameters. Without --model_name_or_path and --dataset it runs a small example: SmolLM2-135M-Instruct on an embedded
data set. A run that was interrupted is resumed by the same command."""


# What the command runs when neither a model nor a data set is named: small enough for two CPU cores.
EXAMPLE_FLAGS: Mapping[str, Any] = {
    "bits": 4,
    "lora_r": 16,
    "lora_alpha": 32.0,
    "packing": True,
    "sequence_length": 256,
    "source_max_len": 128,
    "target_max_len": 128,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "max_steps": 60,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "eval_steps": 20,
    "save_steps": 20,
    "save_total_limit": 2,
    "logging_steps": 1,
    "max_new_tokens": 64,
}


SILENCE_SECONDS = 9.0
"""Most time without a line, longer than what the library leaves between the reminders of its own."""


@dataclasses.dataclass(frozen=True)
class Flags(TrainConfig):
    """Flags of a run, and those that plan it instead."""

    plan: bool = flag(False, "Say what the run would take of a GPU, and do not run it.", group="plan")
    gpu: str | None = flag(
        None, "With --plan: the GPU, such as rtx4090 or h100, which need not be here; by default the one that is.",
        group="plan",
    )  # fmt: skip
    compilation_cache: str = flag(
        "auto", "Directory that keeps compiled programs, with which a run starts and resumes sooner; none: keep none.",
        group="output",
    )  # fmt: skip


def configure(argv: Sequence[str], prog: str) -> tuple[TrainConfig, Flags]:
    """Parse flags into a config; a run that names neither model nor data is the example, with its own defaults."""
    spelling = spellings(Flags)
    pasted = without_foreign_flags(argv, FOREIGN_FLAGS)
    refusals = [with_dashes(text, spelling) for text in pasted.refusals]
    flags, given = parse_flags(
        Flags, pasted.argv, prog=prog, description=DESCRIPTION, refusals=refusals, check=contradictions
    )
    config = TrainConfig(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(TrainConfig)})
    for note in [*(with_dashes(text, spelling) for text in pasted.notes), *notes_on(config, given)]:
        print(note)
    if given & {"model_name_or_path", "dataset"}:
        return config, flags
    # On such a processor the example takes two thirds of the time; a GPU computes in bfloat16 anyway.
    defaults = {**EXAMPLE_FLAGS, "bf16": True} if multiplies_bfloat16() else EXAMPLE_FLAGS
    example = {name: value for name, value in defaults.items() if name not in given}
    # Without those that a given flag makes void, as --num_train_epochs does --max_steps.
    void = idle_fields(types.SimpleNamespace(**{**vars(config), **example}))
    example = {name: value for name, value in example.items() if name not in void}
    spelled_out = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in example.items())
    print(
        f"No model and no data set named: running the example, which is\n  {prog} "
        f"--model_name_or_path {config.model_name_or_path} --dataset {config.dataset} {spelled_out}\n"
    )
    return dataclasses.replace(config, **example), flags


def contradictions(values: Any, given: Set[str]) -> list[str]:
    """List a sentence for every flag that says another thing than the rest, be it with its default.

    Such as --gradient_checkpointing with --remat none.
    """
    without_a_plan = values.gpu is not None and not values.plan
    gpu = ["`gpu` names the GPU to plan for; give `plan` too."] if without_a_plan else []
    return gpu + idle_refusals(values, given)


def notes_on(config: TrainConfig, given: Set[str]) -> list[str]:
    """List a line for every flag that was given with its default and has no effect; the library tells the others."""
    spelling = spellings(TrainConfig)
    return [with_dashes(note, spelling) for note in idle_notes(config, given - changed_fields(config))]


def report(summary: dict[str, Any], answers: Sequence[tuple[str, str, str]], config: TrainConfig, prog: str) -> None:
    """Print what a finished run came to, and how to use its adapter."""
    output_dir = config.output_dir
    print_answers(answers)
    if "answers_in_style_after" in summary:
        before, after = summary["answers_in_style_before"], summary["answers_in_style_after"]
        print(f"\nAnswers in the data's style: {before} of {len(answers)} before, {after} of {len(answers)} after")
    losses = {
        "training, first step": summary["first_loss"],
        "training, last step": summary["last_loss"],
        "held out, before": summary["first_eval_loss"],
        "held out, after": summary["last_eval_loss"],
    }
    print_section("Loss (nats a token)", {n: f"{value:.4f}" for n, value in losses.items() if value is not None})
    print_section("Memory held by buffers", in_bytes({n.replace("_", " "): c for n, c in summary["bytes"].items()}))
    if summary["measured_peak_bytes"] is not None:
        peaks = {
            "training steps, planned by the compiler": summary["planned_peak_bytes"],
            "the whole run, measured": summary["measured_peak_bytes"],
        }
        print_section("Most on the device at once", in_bytes(peaks))
    bits = summary["bits_per_quantized_parameter"]
    rows = {
        "trainable parameters": f"{summary['trainable_parameters']:,}",
        "total parameters": f"{summary['total_parameters']:,}",
        "bits a quantised parameter": None if bits is None else f"{bits:.3f}",
        "steps": f"{summary['steps']:,}",
        "tokens": f"{summary['tokens']:,}",
        "minutes": f"{summary['seconds'] / 60:.1f}",
        "step shapes compiled": str(summary["step_shapes_compiled"]),
    }
    print_section("Run", {name: value for name, value in rows.items() if value is not None})
    written = {
        "adapter (PEFT's format)": "adapter",
        "checkpoints": "checkpoint-*",
        "metrics": "metrics.jsonl",
        "loss plot": "loss.png",
        "answers": "answers.json",
        "summary": "summary.json",
    }
    found = {name: pattern for name, pattern in written.items() if any(Path(output_dir).glob(pattern))}
    print_section(f"Saved in {output_dir}", found)
    adapter = Path(output_dir) / "adapter"
    if adapter.exists():
        commands = (prog.replace("finetune", name) for name in ("chat", "generate", "merge", "export"))
        chat, generate, merge, export = (f"{command} {shlex.quote(output_dir)}" for command in commands)
        print(
            "\nUse the adapter\n"
            f"  talk to it:\n    {chat}\n"
            f'  answer {{"prompt": ...}}, one a line in FILE:\n    {generate} --input FILE\n'
            f'  in PEFT, with the base as transformers loads it:\n    PeftModel.from_pretrained(base, "{adapter}")\n'
            f"  merged: what that costs, in every format:\n    {merge}\n"
            f"  merged, in DIRECTORY, for transformers and vLLM:\n    {export} DIRECTORY\n"
            f"  as GGUF, for llama.cpp and Ollama:\n    {export} DIRECTORY --to gguf-q8_0"
        )


def print_answers(answers: Sequence[tuple[str, str, str]]) -> None:
    """Print prompts with the answers before and after training."""
    for prompt, before, after in answers:
        print(f"\n> {prompt}")
        for name, answer in (("before", before), ("after", after)):
            first, *rest = answer.splitlines() or [""]
            for line in [f"{name}: {first}", *rest]:
                print(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="  "))


def print_section(title: str, rows: Mapping[str, str]) -> None:
    """Print a heading and a table of two columns; nothing without rows."""
    from qlora_jax.formatting import table

    if rows:
        print(f"\n{title}\n{table(rows.items())}")


def in_bytes(counts: Mapping[str, int | None]) -> dict[str, str]:
    """Format counts of bytes, without those that are not known."""
    from qlora_jax.formatting import format_bytes

    return {name: format_bytes(count) for name, count in counts.items() if count is not None}


def plan_run(config: TrainConfig, gpu: str | None) -> None:
    """Print what the run would take of a GPU."""
    from qlora_jax.finetuning import plan
    from qlora_jax.planner.planning import describe_run

    planned, advice = plan(config, gpu)
    rows = planned.config.per_device_train_batch_size
    print(f"{config.model_name_or_path} on {planned.plan.chip.title}: {rows} x {planned.length:,} tokens at once")
    print(describe_run(planned))
    if advice is not None:
        print(with_dashes(advice.sentence(), spellings(TrainConfig)))


def main(argv: Sequence[str], *, prog: str = "qlora-jax finetune") -> int:
    """Fine-tune, or plan to."""
    config, flags = configure(argv, prog)
    with command(spellings(Flags), silence=SILENCE_SECONDS):
        if flags.plan:
            plan_run(config, flags.gpu)
            return 0
        summary = finished_summary(config)
        if summary is not None:
            print(
                f"already done: {config.output_dir} holds this run, finished after {summary['steps']:,} steps; "
                "--overwrite_output_dir trains again"
            )
            directory = user_path(config.output_dir)
            hint = f"delete {directory / SUMMARY_FILE} and run the same command again to have it made again"
            for name in changed_results(directory, summary):
                print(f"warning: {directory / name} is missing or not as it was written; {hint}", file=sys.stderr)
            return 0
        keep_compiled_programs(flags.compilation_cache)
        return train(config, prog)


def train(config: TrainConfig, prog: str) -> int:
    """Run or resume, and report; return the exit status, `RESUMABLE` if a signal interrupted the run.

    Raises:
        KeyboardInterrupt: a second signal did, or there is nothing to resume.
    """
    try:
        with sigterm_as_ctrl_c():
            with claimed(config) as claim:
                # Imported once flags and directory are known to be good: loading JAX takes seconds.
                from qlora_jax.finetuning import finetune_in

                result = finetune_in(claim)
    except StoppedAtOnce:
        raise
    except KeyboardInterrupt:
        if not config.do_train:
            raise
        print("interrupted outside the training steps; run the same command again to go on", file=sys.stderr)
        return RESUMABLE
    if result.interrupted:
        steps = result.summary["steps"]
        print(f"interrupted after step {steps}; run the same command again to resume", file=sys.stderr)
        return RESUMABLE
    report(result.summary, result.answers, config, prog)
    return 0


def finished_summary(config: TrainConfig) -> dict[str, Any] | None:
    """Return the summary of the finished run of exactly this configuration in `output_dir`; None if there is none.

    It reads what the run wrote and loads neither JAX nor the model nor the data, which are told by size and time of
    their files. Whatever cannot be read is no finished run here: the run itself says what is wrong.
    """
    directory = user_path(config.output_dir)
    if config.overwrite_output_dir or not config.do_train or not (directory / "adapter").is_dir():
        return None
    try:
        record = read_checked_json(directory / "run.json")
        flags, inputs = record["flags"], record["facts"]["inputs"]
        summary = read_summary(directory)
        # A flag that is younger than the run had its default.
        same = all(flags.get(name, default) == value for name, value, default in _values(config))
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return summary if same and inputs == input_files(config) else None


def _values(config: TrainConfig) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of every field that a run depends on."""
    for field in dataclasses.fields(config):
        if field.name not in ("output_dir", "overwrite_output_dir"):
            yield field.name, getattr(config, field.name), field.default
