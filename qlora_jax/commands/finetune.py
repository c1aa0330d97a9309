"""`qlora-jax finetune`: flags to a run, and what the run came to."""

import dataclasses
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_jax.cli import command, flag, parse_flags, spellings, with_dashes
from qlora_jax.environment import multiplies_bfloat16
from qlora_jax.errors import UserError
from qlora_jax.training.config import EXAMPLE_FLAGS, UNSUPPORTED_FLAGS, TrainConfig

DESCRIPTION = """Fine-tune a language model with QLoRA: frozen 4-bit base weights, LoRA adapters as the only trainable
parameters. Without --model_name_or_path and --dataset it runs a small example: SmolLM2-135M-Instruct on an embedded
data set. A run that was interrupted is resumed by the same command."""


@dataclasses.dataclass(frozen=True)
class Flags(TrainConfig):
    """Flags of a run, and those that plan it instead."""

    plan: bool = flag(False, "Say what the run would take of a GPU, and do not run it.", group="plan")
    gpu: str | None = flag(
        None, "With --plan: the GPU, such as rtx4090 or h100, which need not be here; by default the one that is.",
        group="plan",
    )  # fmt: skip


def configure(argv: Sequence[str], prog: str) -> tuple[TrainConfig, Flags]:
    """Parse flags into a config; a run that names neither model nor data is the example, with its own defaults."""
    flags, given = parse_flags(Flags, argv, prog=prog, description=DESCRIPTION, unavailable=UNSUPPORTED_FLAGS)
    if flags.gpu is not None and not flags.plan:
        raise UserError("--gpu names the GPU to plan for; give --plan too.")
    config = TrainConfig(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(TrainConfig)})
    if given & {"model_name_or_path", "dataset"}:
        return config, flags
    # On such a processor the example takes two thirds of the time; a GPU computes in bfloat16 anyway.
    defaults = {**EXAMPLE_FLAGS, "bf16": True} if multiplies_bfloat16() else EXAMPLE_FLAGS
    example = {name: value for name, value in defaults.items() if name not in given}
    spelled_out = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in example.items())
    print(
        f"No model and no data set named: running the example, which is\n  {prog} "
        f"--model_name_or_path {config.model_name_or_path} --dataset {config.dataset} {spelled_out}\n"
    )
    return dataclasses.replace(config, **example), flags


def report(summary: dict[str, Any], answers: Sequence[tuple[str, str, str]], output_dir: str) -> None:
    """Print what a finished run came to."""
    from qlora_jax.formatting import format_bytes, table

    for prompt, before, after in answers:
        print(f"\n> {prompt}")
        for name, answer in (("before", before), ("after", after)):
            first, *rest = answer.splitlines() or [""]
            for line in [f"{name}: {first}", *rest]:
                print(textwrap.fill(line, 110, initial_indent="  ", subsequent_indent="  "))
    if "answers_in_style_after" in summary:
        before, after = summary["answers_in_style_before"], summary["answers_in_style_after"]
        print(f"\nAnswers in the data's style: {before} of {len(answers)} before, {after} of {len(answers)} after")
    print("\nLoss (nats a token)")
    losses = [
        (name, summary[key])
        for name, key in (
            ("training, first step", "first_loss"),
            ("training, last step", "last_loss"),
            ("held out, before", "first_eval_loss"),
            ("held out, after", "last_eval_loss"),
        )
    ]
    print(table((name, f"{value:.4f}") for name, value in losses if value is not None))
    print("\nMemory held by buffers")
    print(table((name.replace("_", " "), format_bytes(count)) for name, count in summary["bytes"].items()))
    if summary["measured_peak_bytes"] is not None:
        planned, measured = summary["planned_peak_bytes"], summary["measured_peak_bytes"]
        print("\nMost on the device at once")
        rows = [("training steps, planned by the compiler", planned), ("the whole run, measured", measured)]
        print(table((name, format_bytes(count)) for name, count in rows if count is not None))
    print("\nRun")
    rows = [
        ("trainable parameters", f"{summary['trainable_parameters']:,}"),
        ("total parameters", f"{summary['total_parameters']:,}"),
        ("steps", f"{summary['steps']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        ("minutes", f"{summary['seconds'] / 60:.1f}"),
        ("step shapes compiled", str(summary["step_shapes_compiled"])),
    ]
    if summary["bits_per_quantized_parameter"] is not None:
        rows.insert(2, ("bits a quantised parameter", f"{summary['bits_per_quantized_parameter']:.3f}"))
    print(table(rows))
    print(f"\nSaved in {output_dir}")
    written = {
        "adapter (PEFT's format)": "adapter",
        "checkpoints": "checkpoint-*",
        "metrics": "metrics.jsonl",
        "loss plot": "loss.png",
        "answers": "answers.json",
        "summary": "summary.json",
    }
    print(table((name, pattern) for name, pattern in written.items() if any(Path(output_dir).glob(pattern))))
    adapter = Path(output_dir) / "adapter"
    if adapter.exists():
        print(f'Use it: PeftModel.from_pretrained(model, "{adapter}"), or --do_train False --adapter {adapter} here')


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
    with command(spellings(Flags)):
        if flags.plan:
            plan_run(config, flags.gpu)
            return 0
        # Imported once the flags are known to be good: loading JAX takes seconds.
        from qlora_jax.finetuning import finetune

        result = finetune(config)
    if result.interrupted:
        steps = result.summary["steps"]
        print(f"interrupted after step {steps}; run the same command again to resume", file=sys.stderr)
        return 0
    report(result.summary, result.answers, config.output_dir)
    return 0
