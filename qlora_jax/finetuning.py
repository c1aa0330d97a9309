"""Fine-tuning from a configuration to saved adapters, and the plan of the same run."""

import contextlib
import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax import gpus, kernels
from qlora_jax.checkpoints.hub import resolve_config, resolve_model
from qlora_jax.checkpoints.tokenizer import ensure_pad, load_tokenizer, tokenizer_digest
from qlora_jax.device_memory import device_limit, pinned_limit
from qlora_jax.errors import UserError
from qlora_jax.planner.advice import planned_advice
from qlora_jax.planner.planning import Advice, Planner, StepPlan
from qlora_jax.training import setup
from qlora_jax.training.answers import Answer, Questionnaire, read_prompts
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.datasets import Datasets, load_datasets, longest_batch
from qlora_jax.training.failures import advised_out_of_memory
from qlora_jax.training.idle_fields import changed_fields, idle_notes
from qlora_jax.training.inputs import input_files
from qlora_jax.training.model import Model, kernel_choices, load_model, product_rows
from qlora_jax.training.ownership import Claim, check_identity, claimed
from qlora_jax.training.progress import announced
from qlora_jax.training.reporting import MetricsLog, check_reporters, plot_losses, read_metrics
from qlora_jax.training.results import SUMMARY_FILE, write_summary
from qlora_jax.training.run_directory import RunDirectory
from qlora_jax.training.run_environment import changed_environment, current_environment
from qlora_jax.training.run_state import check_free_space, initial_state, refuse_finished, restored_state
from qlora_jax.training.summary import summarize
from qlora_jax.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of a run.

    Attributes:
        summary: the contents of summary.json.
        answers: prompts with their answers before and after training, empty if the run was interrupted.
        interrupted: stopped by a signal; the same configuration resumes it.
    """

    summary: dict[str, Any]
    answers: list[Answer]
    interrupted: bool


def finetune(config: TrainConfig) -> Result:
    """Run, or resume, a fine-tuning run and save everything it makes.

    Raises:
        UserError: bad input, told in one sentence; NonFiniteLoss if training diverged, OutOfMemory if a step did not
            fit.
    """
    with claimed(config) as claim:
        return finetune_in(claim)


def finetune_in(claim: Claim) -> Result:
    """Run `finetune` in a directory that is claimed already."""
    config = claim.config
    with contextlib.ExitStack() as stack:
        # Resolve: what can be refused is refused before anything large is read.
        kernels.check_implementation(config.kernel)
        check_reporters(config)
        for note in idle_notes(config, changed_fields(config)):
            logger.info("%s", note)
        prompts = read_prompts(config)
        path = resolve_model(config.model_name_or_path)
        declared = setup.declare(config, resolve_config(path))
        for note in setup.quantization_notes(config, declared.model_config):
            logger.info("%s", note)
        check_free_space(config, declared.parts.lora)
        tokenizer = ensure_pad(load_tokenizer(path))

        # Data.
        with announced("reading the data", at_once=False):
            datasets = load_datasets(config, tokenizer)
        for report in datasets.reports:
            logger.info("%s", report)
        identity = _data_identity(datasets, tokenizer)
        check_identity(config, claim.record, identity)
        refuse_finished(config, datasets.total_steps)

        # Model: the frozen base on the devices, and the shapes of what is trained.
        devices = setup.make_devices(config)
        model = load_model(config, path, declared, devices)
        logger.info("base model: %s", model.base.description)

        # Run directory: of a new run, or of one to resume, which keeps the kernels it began with.
        rows = product_rows(config, datasets)
        facts = {
            "kernels": kernels.choices_to_json(kernel_choices(config, model, rows)),
            "environment": current_environment(),
            "inputs": input_files(config),
            "dataset_format": datasets.dataset_format,
        }
        directory = RunDirectory.open(config, identity | _model_identity(config, model), facts, claim.record)
        stack.enter_context(kernels.pinned(kernels.choices_from_json(directory.facts["kernels"])))
        for line in kernels.describe(kernel_choices(config, model, rows[:1])):
            logger.info("%s", line)

        # Optimizer and step, then their state: restored or initialised. Devices hold the same: one is counted.
        limit = device_limit(jax.local_devices()[0])
        programs = setup.make_programs(config, model.parts, datasets.total_steps, limit=limit, devices=devices)
        optimizer = programs.train.optimizer
        if directory.checkpoints():
            start = restored_state(config, directory, optimizer, datasets.train, devices)
            logger.info("resuming %s after step %d of %d", config.output_dir, start.step, datasets.total_steps)
            for warning in changed_environment(directory.facts.get("environment", {})):
                logger.warning("%s", warning)
        else:
            start = initial_state(config, model, optimizer, devices)
        (directory.path / SUMMARY_FILE).unlink(missing_ok=True)  # of a shorter run that this one continues

        # Loop, between the answers before and after it. TensorBoard and W&B hold lines back until they are closed.
        log = stack.enter_context(contextlib.closing(MetricsLog(directory.path, config, start.step)))
        trainer = Trainer(config, model, programs, datasets, directory, log, start)
        questions = Questionnaire(prompts, config, model, tokenizer, datasets.dataset_format)
        before = questions.recorded(directory) if start.step else None
        if before is None:
            before = questions.ask(trainer.adapters_alone())
            questions.record(directory, before)
            trainer.evaluate(0)
        after = before
        if config.do_train:
            advise = functools.partial(planned_advice, config, model_config=model.base.config)
            with advised_out_of_memory(directory, advise):
                finished = trainer.train()
            if not finished:
                return Result(summarize(trainer), [], interrupted=True)
            model.write_adapter(trainer.masters, directory.path / "adapter", config.model_name_or_path)
            after = questions.ask(trainer.adapters_alone())

        # Report. summary.json is last: without it the same configuration completes the run.
        answers = questions.answers(before, after)
        summary = summarize(trainer, answers)
        directory.write_json("answers.json", [answer._asdict() for answer in answers])
        plot_losses(read_metrics(log.path), directory.path / "loss.png")
        write_summary(directory.path, summary)
        return Result(summary, answers, interrupted=False)


def _data_identity(datasets: Datasets, tokenizer: Any) -> dict[str, Any]:
    """Return what a resumed run must share with the one before, beside its configuration and its model."""
    return {"tokenizer": tokenizer_digest(tokenizer), "data": datasets.train.fingerprint}


def _model_identity(config: TrainConfig, model: Model) -> dict[str, Any]:
    """Return what it must share of the model."""
    return {
        "base weights": model.base.digest,
        "compute_dtype": jnp.dtype(setup.compute_dtype(config)).name,
        "devices": jax.device_count(),
        "adapters": [model.adapters.rank, model.adapters.alpha, *model.adapters.modules],
    }


def plan(config: TrainConfig, gpu: str | None = None) -> tuple[StepPlan, Advice | None]:
    """Plan a step of the run of a configuration on its longest training batch; weights are not read.

    Args:
        config: of the run.
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
