"""A run's directory: whose run it is, its checkpoints, and exact resume.

    output_dir/run.json             flags and data fingerprint; written once, before the first step
    output_dir/checkpoint-000250/   state/ (orbax: adapters, optimizer, step), position.json (data and counters),
                                    adapter_config.json + adapter_model.safetensors (PEFT's format)

A checkpoint is written under a temporary name and renamed when complete: a directory called checkpoint-N is whole.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from qlora_jax.cli import names_where
from qlora_jax.errors import UserError
from qlora_jax.files import file_sizes
from qlora_jax.optimizers import OPTIMIZERS
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.step import TrainState

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Everything a run writes, as patterns; run.json last.
_WRITTEN = (
    "checkpoint-*", ".checkpoint-*", "adapter", "tensorboard", "wandb", "metrics.jsonl", "answers.json",
    "answers_before.json", "summary.json", "loss.png", "run.json",
)  # fmt: skip
# Fields that change neither the losses of a run nor how its state is stored: a resumed run may set them anew.
_FREE = frozenset(names_where(TrainConfig, resume="free"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it: the file is whole or absent."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read JSON; UserError names the file if it is not readable as such."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete {path.parent} or give another `output_dir`."
        ) from error


def _by_name(tree: Any) -> dict[str, Any]:
    """{key path: leaf}: what is stored does not depend on the Python types that hold the state."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax's threads log what they raise as well, in hundreds of lines; what is raised is told in one sentence."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("absl", "asyncio"))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # when a load fails
    yield
    # Only if all went well: the threads of a save that failed go on, and fail, after it.
    for logger, level in levels.items():
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """First line of an error without the pages of settings that tensorstore adds to it."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(" [tensorstore_spec")[0]


@contextlib.contextmanager
def _saving(directory: Path, temporary: Path) -> Iterator[None]:
    """Turn a failure to write into one sentence, and leave nothing half-written behind."""
    try:
        with _quiet_orbax():
            yield
    except (OSError, ValueError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # tensorstore reports a full disk as ValueError with the operating system's text.
        full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
        reason = "the disk is full" if full else _reason(error)
        raise UserError(
            f"{directory} could not be saved: {reason}; earlier checkpoints are intact. "
            "Free space and run the same command again to resume."
        ) from error


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The directory of one run; make it with `RunDirectory.open`."""

    path: Path
    save_total_limit: int = 40

    @classmethod
    def open(cls, config: TrainConfig, identity: Mapping[str, Any]) -> "RunDirectory":
        """Create the directory, or take up the run that is in it.

        Args:
            config: the run's flags.
            identity: whatever else must be the same to resume (model, data fingerprint); JSON values.

        Raises:
            UserError: the directory holds another run's checkpoints; names what differs.
        """
        path = Path(config.output_dir)
        record = {"flags": dataclasses.asdict(config), "identity": dict(identity)}
        run_file = path / "run.json"
        if path.exists() and not path.is_dir():
            raise UserError(f"`output_dir={path}` is a file; give a directory.")
        directory = cls(path, config.save_total_limit)
        if config.overwrite_output_dir and (run_file.exists() or directory.checkpoints()):
            directory.clear()
        if run_file.exists():
            before = read_json(run_file)
            changed = _differences(before, record)
            if changed and directory.checkpoints():
                raise UserError(
                    f"`output_dir={path}` holds the checkpoints of another run ({'; '.join(changed)}); give another "
                    "`output_dir`, the same settings to resume it, or `overwrite_output_dir` to delete it."
                )
        elif directory.checkpoints():
            raise UserError(f"`output_dir={path}` holds checkpoints without a run.json; give another `output_dir`.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_json(run_file, record)
        except OSError as error:
            raise UserError(f"`output_dir={path}` cannot be written: {error.strerror}.") from error
        for leftover in path.glob(".checkpoint-*"):
            shutil.rmtree(leftover)
        return directory

    def clear(self) -> None:
        """Delete what runs have written here, and nothing else; what says whose they are goes last."""
        for name in _WRITTEN:
            for entry in self.path.glob(name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.path / f"checkpoint-{step:06d}"

    def save(
        self, step: int, state: TrainState, position: Mapping[str, Any], write_adapter: Callable[[Path], None]
    ) -> Path:
        """Save a checkpoint and delete the oldest beyond `save_total_limit`.

        Args:
            step: optimizer steps done.
            state: adapters, optimizer state and step, as `PagedOptimizer` gathers them: the same wherever they lived.
            position: JSON values that put the data iterator and the counters where they are now.
            write_adapter: writes the adapter in PEFT's format into a directory.

        Raises:
            UserError: it could not be written; nothing half-written is left and earlier checkpoints are untouched.
        """
        final = self.checkpoint_path(step)
        if not final.exists():
            self._write(final, state, position, write_adapter)
        for old in self.checkpoints()[: -self.save_total_limit]:
            # Renamed first: a checkpoint that is being deleted must not look complete.
            doomed = self.path / f".checkpoint-{old:06d}.old"
            os.replace(self.checkpoint_path(old), doomed)
            shutil.rmtree(doomed)
        return final

    def _write(
        self, final: Path, state: TrainState, position: Mapping[str, Any], write_adapter: Callable[[Path], None]
    ) -> None:
        temporary = self.path / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with _saving(final, temporary):
            temporary.mkdir(parents=True)
            # As arrays of JAX's CPU: when the disk is full, orbax's writes of NumPy arrays print a traceback each.
            named = jax.device_put(_by_name(state), jax.local_devices(backend="cpu")[0])
            ocp.save((temporary / "state").absolute(), named)
            write_adapter(temporary)
            write_json(temporary / "position.json", {**position, "files": file_sizes(temporary)})
            os.replace(temporary, final)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state, in NumPy arrays, and position that `save` was given at that step, bit for bit.

        Args:
            step: one of `checkpoints()`.
            abstract: shapes, dtypes and structure of the state.

        Raises:
            UserError: the checkpoint does not fit the state.
        """
        path = self.checkpoint_path(step)
        position = read_json(path / "position.json")
        # Found here, a damaged file is one sentence; found by tensorstore, it is a traceback for each of its arrays.
        for name, size in position.pop("files", {}).items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise UserError(
                    f"{path} cannot be restored: its file {name} is missing or does not have its {size} bytes; "
                    "delete it to resume from the one before."
                )
        # Whatever is trained on: the whole state need not fit on a device.
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        named = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in _by_name(abstract).items()
        }
        try:
            with _quiet_orbax():
                values = ocp.load((path / "state").absolute(), named)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} cannot be restored: {_reason(error)}; delete it to resume from the one before."
            ) from error
        restored = [np.asarray(values[name]) for name in named]
        return jax.tree.unflatten(jax.tree.structure(abstract), restored), position


def _differences(before: Any, now: Mapping[str, Any]) -> list[str]:
    """What keeps a run from continuing another, one phrase each."""
    try:
        flags, identity = before["flags"], before["identity"]
    except (KeyError, TypeError):
        return ["its run.json is of another format"]
    changed = [
        f"`{name}` was {flags.get(name)!r}, now {value!r}"
        for name, value in now["flags"].items()
        if name not in _FREE
        and flags.get(name) != value
        and not _may_extend(name, flags)
        and not (name == "optim" and _same_rule(value, flags.get(name)))
    ]
    return changed + [
        f"{name} was {identity.get(name)!r}, now {value!r}"
        for name, value in now["identity"].items()
        if identity.get(name) != value
    ]


def _same_rule(optim: Any, other: Any) -> bool:
    """Whether two optimizers differ in paging only, which moves their state and changes no bit of it."""
    rules = {OPTIMIZERS[name].transformation if name in OPTIMIZERS else None for name in (optim, other)}
    return len(rules) == 1 and None not in rules


def _may_extend(name: str, flags: Mapping[str, Any]) -> bool:
    """A constant schedule with a fixed warm-up does not depend on the number of steps: the run may be made longer."""
    fixed = flags.get("lr_scheduler_type") == "constant" and (
        flags.get("warmup_steps") is not None or flags.get("warmup_ratio") == 0
    )
    return fixed and name in ("max_steps", "num_train_epochs")
