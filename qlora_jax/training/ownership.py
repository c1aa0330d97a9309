"""Ownership of an output directory: one writer at a time, and only runs of this program, of the same settings.

The command line asks before JAX is loaded, so that a refusal takes no time: this imports light things only.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax import files
from qlora_jax.errors import UserError
from qlora_jax.training.config import FREE_FLAGS, TrainConfig
from qlora_jax.training.results import SUMMARY_FILE

RUN_FILE = "run.json"
POSITION_FILE = "position.json"
RESULT_FILES = ("metrics.jsonl", "answers.json", "answers_before.json", SUMMARY_FILE, "loss.png")
"""Names that every run writes; run.json proves which are a run's own."""
logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Those that some runs write.
_DIRECTORIES: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "adapter": lambda flags: flags.get("do_train", True),
    "tensorboard": lambda flags: flags.get("report_to") in ("tensorboard", "all"),
    "wandb": lambda flags: flags.get("report_to") in ("wandb", "all"),
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A run's hold on its directory; make it with `claimed`.

    Attributes:
        config: of the run, its `output_dir` an absolute path.
        record: contents of run.json; {} if there is none.
    """

    config: TrainConfig
    record: Mapping[str, Any]


@contextlib.contextmanager
def claimed(config: TrainConfig) -> Iterator[Claim]:
    """Hold a run's directory during the block, against other processes and other runs.

    Raises:
        UserError: as `files.exclusive` and `check_output_dir`; or the disk is full.
    """
    output = files.user_path(config.output_dir)
    config = dataclasses.replace(config, output_dir=str(output))
    with files.exclusive(output, f"`output_dir={output}`"):
        record = check_output_dir(config)
        if config.do_train and not config.overwrite_output_dir:
            files.check_room(
                output,
                1 if config.adapter else least_checkpoint_bytes(config),
                f"the disk of `output_dir={output}`",
                "a checkpoint",
            )
        yield Claim(config, record)


# Of the optimizers' state, for each parameter, without scales of blocks.
_STATE_BYTES = {"adamw_32bit": 8, "adamw_8bit": 2, "lion_8bit": 1, "adafactor": 0, "sgd": 0}


def least_checkpoint_bytes(config: TrainConfig) -> int:
    """Return the bytes of a checkpoint, or up to 6 % fewer, by a model's config.json alone; 1 if unknown.

    JAX is not loaded for it: `run_state.check_free_space` counts them exactly once it is.
    """
    try:
        contents = json.loads((files.user_path(config.model_name_or_path) / "config.json").read_bytes())
        text = contents.get("text_config", contents)
        hidden, heads, wide = text["hidden_size"], text["num_attention_heads"], text["intermediate_size"]
        width = text.get("head_dim") or hidden // heads
        queries, keys = heads * width, (text.get("num_key_value_heads") or heads) * width
        sides = {"attention": 4 * hidden + 2 * queries + 2 * keys, "mlp": 3 * (hidden + wide)}
        chosen = sides.values() if config.lora_modules == "all" else [sides[config.lora_modules]]
        parameters = config.lora_r * text["num_hidden_layers"] * sum(chosen)
        # Adapters twice: in PEFT's format too.
        return max(1, int(parameters * (2 * 4 + _STATE_BYTES[config.optim.removeprefix("paged_")])))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        return 1


def check_output_dir(config: TrainConfig) -> Mapping[str, Any]:
    """Refuse an `output_dir` of another run, or one in which this run would overwrite what other programs wrote.

    Everything under the names that a run writes must be proven by its run.json to be a run's own. That it is no file is
    for `files.exclusive` to say, which a run enters first.

    Returns:
        The contents of run.json; {} if there is none.

    Raises:
        UserError: names what is in the way.
    """
    path = Path(config.output_dir)
    record = _read_record(path)
    checkpoints = numbered(path)
    if not record and any(map(is_own, checkpoints)):
        raise UserError(
            f"`output_dir={path}` holds checkpoints without a {RUN_FILE}, so that nothing says whose they are; give "
            "another `output_dir`."
        )
    foreign = [entry.name for entry in checkpoints if not is_own(entry)]
    names = set(RESULT_FILES) if not record else set()
    names |= own_directories({"flags": dataclasses.asdict(config)}) - own_directories(record)
    foreign += sorted(name for name in names if os.path.lexists(path / name))
    if foreign:
        raise UserError(
            f"`output_dir={path}` holds {', '.join(foreign)}, not written by a run of this program, which would "
            "overwrite it; give another `output_dir`."
        )
    if not config.overwrite_output_dir and any(map(is_own, checkpoints)):
        refuse_other_run(path, _changed_flags(record, dataclasses.asdict(config)))
    return record


def check_identity(config: TrainConfig, record: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse an `output_dir` whose run has another identity in any of these respects; see `RunDirectory.open`.

    Args:
        config: of the run.
        record: what `check_output_dir` returned.
        identity: some of what must be the same to resume.

    Raises:
        UserError: names what differs.
    """
    path = Path(config.output_dir)
    if not config.overwrite_output_dir and any(map(is_own, numbered(path))):
        refuse_other_run(path, changed_identity(record, identity))


def _read_record(path: Path) -> dict[str, Any]:
    """Return a directory's run.json, or a checkpoint's copy where that is damaged or missing; {} if there is none.

    Raises:
        UserError: a run.json that is damaged or another program's.
    """
    file = path / RUN_FILE
    try:
        return files.read_checked_json(file)
    except (OSError, ValueError) as error:
        damage = files.reason(error)
    for copy in (checkpoint / RUN_FILE for checkpoint in reversed(numbered(path))):
        with contextlib.suppress(OSError, ValueError):
            record = files.read_checked_json(copy)
            logger.warning("%s cannot be used (%s); its copy %s is.", file, damage, copy)
            return record
    if os.path.lexists(file):
        raise UserError(
            f"{file} is damaged or not of a run of this version of qlora-jax ({damage}); give another `output_dir`, or "
            "go on with the version that began the run."
        )
    return {}


def is_checkpoint_name(name: str) -> bool:
    """Tell if a name is that of a complete checkpoint, of this program or of another."""
    return _CHECKPOINT.fullmatch(name) is not None


def numbered(path: Path) -> list[Path]:
    """Return everything called checkpoint-N in a directory."""
    return sorted(entry for entry in path.iterdir() if is_checkpoint_name(entry.name)) if path.is_dir() else []


def is_own(checkpoint: Path) -> bool:
    """Tell if a run of this program wrote a checkpoint: others number theirs in the same way."""
    return any((checkpoint / name).is_file() for name in (POSITION_FILE, RUN_FILE))


def own_directories(record: Mapping[str, Any]) -> set[str]:
    """Return the directories that the runs recorded in a run.json may have written."""
    if not record:
        return set()
    flags = record["flags"]
    return {name for name, writes in _DIRECTORIES.items() if writes(flags)} | set(record.get("wrote", ()))


def refuse_other_run(path: Path, changed: list[str]) -> None:
    """Raise UserError if anything is said to have changed since the run in a directory began."""
    if changed:
        raise UserError(
            f"`output_dir={path}` holds the checkpoints of another run ({'; '.join(changed)}); give another "
            "`output_dir`, the same settings to resume it, or `overwrite_output_dir` to delete it."
        )


def _changed_flags(before: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """Name the settings that keep a run from continuing the recorded one, a phrase each."""
    # A field that is younger than the run had its default.
    flags_before = {field.name: field.default for field in dataclasses.fields(TrainConfig)} | before["flags"]
    return [
        f"`{name}` was {flags_before.get(name)!r}, now {value!r}"
        for name, value in flags.items()
        if name not in FREE_FLAGS
        and flags_before.get(name) != value
        and not _may_extend(name, flags_before)
        and not (name == "optim" and _same_rule(value, flags_before.get(name)))
        # Both are 4 bits, or not: the digest of the base weights says so, and a run is refused where that changed.
        and not (name == "bits" and {value, flags_before.get(name)} == {"auto", 4})
    ]


def changed_identity(before: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Name what else does, a phrase each."""
    recorded = before["identity"]
    return [
        f"{name} was {recorded.get(name)!r}, now {value!r}"
        for name, value in identity.items()
        if recorded.get(name) != value
    ]


def _same_rule(optim: Any, other: Any) -> bool:
    """Tell if two optimizers differ in paging only, which moves their state and changes no bit of it."""
    return str(optim).removeprefix("paged_") == str(other).removeprefix("paged_")


def _may_extend(name: str, flags: Mapping[str, Any]) -> bool:
    """Tell if the run may be made longer: a constant schedule with a fixed warm-up does not depend on its steps."""
    fixed = flags.get("lr_scheduler_type") == "constant" and (
        flags.get("warmup_steps") is not None or flags.get("warmup_ratio") == 0
    )
    return fixed and name in ("max_steps", "num_train_epochs")
