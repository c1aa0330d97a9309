"""A fine-tuning run from flags to saved adapters: load, adapt, train, evaluate, save, resume."""

import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from qlora_jax import data, gpus, kernels
from qlora_jax.checkpoints.hub import resolve_config, resolve_model
from qlora_jax.checkpoints.tokenizer import ensure_pad, load_tokenizer
from qlora_jax.defaults import DEFAULT_DATASET
from qlora_jax.device_memory import pinned_limit
from qlora_jax.errors import UserError
from qlora_jax.planner.advice import planned_advice
from qlora_jax.planner.planning import Advice, Planner, StepPlan
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.reporting import plot_losses, read_metrics
from qlora_jax.training.run_directory import read_json, write_json
from qlora_jax.training.trainer import (
    Result,
    Trainer,
    kernel_choices,
    load_datasets,
    load_model,
    longest_batch,
    make_mesh,
)

logger = logging.getLogger(__name__)


def read_prompts(config: TrainConfig) -> tuple[str, ...]:
    """Return the prompts to answer before and after training: those of `prompts`, or the embedded data's own."""
    if config.prompts is None:
        return data.default_prompts() if config.dataset == DEFAULT_DATASET else ()
    try:
        lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`prompts={config.prompts}` cannot be read: {error}.") from error
    prompts = tuple(line for line in lines if line.strip())
    if not prompts:
        raise UserError(f"`prompts={config.prompts}` holds no prompt; write one a line.")
    return prompts


def finetune(config: TrainConfig) -> Result:
    """Run, or resume, a fine-tuning run and save everything it makes.

    Raises:
        UserError: bad input, told in one sentence; NonFiniteLoss if training diverged.
    """
    kernels.check_implementation(config.kernel)
    prompts = read_prompts(config)
    path = resolve_model(config.model_name_or_path)
    tokenizer = ensure_pad(load_tokenizer(path))
    datasets = load_datasets(config, tokenizer)
    for report in datasets.reports:
        logger.info("%s", report)
    mesh = make_mesh()
    model = load_model(config, path, mesh)
    logger.info("base model: %s", model.base.description)
    for line in kernel_choices(config, model, datasets):
        logger.info("%s", line)
    advise = functools.partial(planned_advice, model_config=model.base.config)
    trainer = Trainer(config, model, datasets, tokenizer, mesh, advise)
    # Closed however the run ends: TensorBoard and W&B hold lines back.
    with contextlib.closing(trainer.log):
        return _train_and_save(trainer, prompts)


def plan(config: TrainConfig, gpu: str | None = None) -> tuple[StepPlan, Advice | None]:
    """What the run of exactly these flags would take of one GPU in its longest training batch; weights are not read.

    Args:
        config: the flags.
        gpu: short name of the GPU (`qlora_jax.gpus.CHIPS`); by default the one that is here.

    Returns:
        The plan, and if it does not fit what would make it fit.

    Raises:
        UserError: as `finetune`; or no GPU is named and none that is known is here.
    """
    chip = gpus.chip_of(jax.devices()[0]) if gpu is None else gpus.chip_named(gpu)
    if chip is None:
        names = ", ".join(gpus.CHIPS)
        raise UserError(f"no GPU that is known by its data sheet is here: give `gpu`, one of {names}.")
    path = resolve_model(config.model_name_or_path, weights=False)
    tokenizer = ensure_pad(load_tokenizer(path))
    _, length = longest_batch(config, load_datasets(config, tokenizer))
    # Of a GPU that need not be here, the host is not known either.
    host_limit = pinned_limit() if gpu is None else None
    with Planner.open(chip, resolve_config(path), host_limit=host_limit) as planner:
        planned = planner.plan(config, length)
        return planned, None if planned.plan.fits else planner.advice(config, length)


def _train_and_save(trainer: Trainer, prompts: Sequence[str]) -> Result:
    if trainer.start_step:
        logger.info(
            "resuming %s after step %d of %d", trainer.config.output_dir, trainer.start_step, trainer.total_steps
        )
    trainer.summary_file.unlink(missing_ok=True)  # of a shorter run that this one continues
    before_file = trainer.directory.path / "answers_before.json"
    if trainer.start_step and before_file.exists():
        known = dict(read_json(before_file))
        before = [known.get(prompt, "(not asked before training)") for prompt in prompts]
    else:
        before = trainer.answer(prompts)
        write_json(before_file, list(zip(prompts, before, strict=True)))
        trainer.evaluate(0)
    after = before
    if trainer.config.do_train:
        if not trainer.train():
            return Result(trainer.summary(), [], interrupted=True)
        trainer.write_adapter(trainer.directory.path / "adapter")
        after = trainer.answer(prompts)
    answers = list(zip(prompts, before, after, strict=True))
    summary = trainer.summary()
    if trainer.config.dataset == DEFAULT_DATASET:
        summary["answers_in_style_before"] = sum(map(data.follows_style, before))
        summary["answers_in_style_after"] = sum(map(data.follows_style, after))
    write_json(trainer.directory.path / "answers.json", [{"prompt": p, "before": b, "after": a} for p, b, a in answers])
    plot_losses(read_metrics(trainer.log.path), trainer.directory.path / "loss.png")
    # Last: without it the run is not finished, and the same command completes it.
    write_json(trainer.summary_file, summary)
    return Result(summary, answers, interrupted=False)
