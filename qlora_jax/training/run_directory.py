"""A run's directory: the run it belongs to, its checkpoints, and exact resume.

    output_dir/.qlora-jax.lock      while a process is at work there
    output_dir/run.json             configuration, identity and facts of the run; written before the first step
    output_dir/checkpoint-000250/   state/ (orbax: adapters, optimizer, step), position.json (data and counters),
                                    adapter_config.json + adapter_model.safetensors (PEFT's format), a copy of run.json,
                                    SHA256SUMS

A checkpoint is written under a temporary name and renamed when complete: a directory called checkpoint-N is whole. It
is checked against its digests before it is read; one that fails is renamed to checkpoint-N.damaged.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from qlora_jax import files, json_text
from qlora_jax.checkpoints.quiet import quiet_orbax
from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.ownership import (
    POSITION_FILE,
    RESULT_FILES,
    RUN_FILE,
    changed_identity,
    check_output_dir,
    is_checkpoint_name,
    is_own,
    numbered,
    own_directories,
    refuse_other_run,
)
from qlora_jax.training.step import TrainState

_DAMAGED = ".damaged"
logger = logging.getLogger(__name__)


def _by_name(tree: Any) -> dict[str, Any]:
    """Return {key path: leaf}: what is stored does not depend on the Python types that hold the state."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@contextlib.contextmanager
def _saving(directory: Path) -> Iterator[None]:
    """Turn a failure to write into one sentence."""
    try:
        with quiet_orbax():
            yield
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{directory} could not be saved: {files.reason(error)}; earlier checkpoints are intact. "
            "Free space and run the same command again to resume."
        ) from error


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing or not as it was written."""


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """The directory of one run; make it with `RunDirectory.open`.

    Attributes:
        path: of the directory.
        save_total_limit: checkpoints kept.
        facts: values recorded when the run began, which a resumed run keeps.
    """

    path: Path
    save_total_limit: int = 40
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        identity: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> "RunDirectory":
        """Create the directory, or take up the run that is in it.

        Args:
            config: of the run.
            identity: whatever else must be the same to resume (data fingerprint, devices); JSON values.
            facts: JSON values to record if a run begins; a run that is resumed keeps its own.
            record: what `check_output_dir` returned, if it was called.

        Raises:
            UserError: the directory holds another run's checkpoints (names what differs), or content of another
                program under a name that this run writes.
        """
        before = check_output_dir(config) if record is None else record
        directory = cls(Path(config.output_dir), config.save_total_limit)
        if config.overwrite_output_dir:
            directory.clear(before)
            before = {}
        flags, recorded = dataclasses.asdict(config), dict(facts or {})
        if directory.checkpoints():
            refuse_other_run(directory.path, changed_identity(before, identity))
            recorded |= before.get("facts", {})
        wrote = sorted(own_directories(before) | own_directories({"flags": flags}))
        made = {"flags": flags, "identity": dict(identity), "facts": recorded, "wrote": wrote}
        try:
            directory.path.mkdir(parents=True, exist_ok=True)
            files.write_checked_json(directory.path / RUN_FILE, made)
        except OSError as error:
            raise UserError(f"`output_dir={directory.path}` cannot be written: {error.strerror}.") from error
        for leftover in directory.path.glob(".checkpoint-*"):
            files.remove(leftover)
        return dataclasses.replace(directory, facts=recorded)

    def clear(self, record: Mapping[str, Any]) -> None:
        """Delete the run whose run.json holds `record`, and nothing else; run.json last."""
        if not record:
            return
        own = [self.checkpoint_path(step) for step in self.checkpoints()]
        own += self.path.glob(".checkpoint-*")
        own += (entry for entry in self.path.glob(f"checkpoint-*{_DAMAGED}") if is_checkpoint_name(entry.stem))
        own += (self.path / name for name in (*sorted(own_directories(record)), *RESULT_FILES, RUN_FILE))
        for entry in own:
            files.remove(entry)

    def checkpoints(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        found = (int(entry.name.removeprefix("checkpoint-")) for entry in numbered(self.path) if is_own(entry))
        return sorted(found)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file; it is whole or absent."""
        files.write_json(self.path / name, value)

    def newest_intact(self) -> Path | None:
        """Return the newest checkpoint whose files are as they were written; None if there is none."""
        paths = map(self.checkpoint_path, reversed(self.checkpoints()))
        with contextlib.suppress(OSError):
            return next((path for path in paths if files.damaged_file(path) is None), None)
        return None

    def checkpoint_path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
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
            with _saving(final), files.staged_directory(final) as temporary:
                # As arrays of JAX's CPU: when the disk is full, orbax's writes of NumPy arrays print a traceback each.
                named = jax.device_put(_by_name(state), jax.local_devices(backend="cpu")[0])
                ocp.save((temporary / "state").absolute(), named)
                write_adapter(temporary)
                files.write_json(temporary / POSITION_FILE, position)
                shutil.copyfile(self.path / RUN_FILE, temporary / RUN_FILE)
                files.write_checksums(temporary)
        for old in self.checkpoints()[: -self.save_total_limit]:
            # Renamed first: a checkpoint that is being deleted must not look complete.
            doomed = self.path / f".checkpoint-{old:06d}.old"
            os.replace(self.checkpoint_path(old), doomed)
            shutil.rmtree(doomed)
        return final

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return the state, in NumPy arrays, and position that `save` was given at that step, bit for bit.

        Args:
            step: one of `checkpoints()`.
            abstract: shapes, dtypes and structure of the state.

        Raises:
            DamagedCheckpoint: a file is not as it was written.
            UserError: the checkpoint does not fit the state.
        """
        path = self.checkpoint_path(step)
        try:
            if damaged := files.damaged_file(path):
                raise DamagedCheckpoint(f"{path} is damaged: its file {damaged} is missing or not as it was written.")
            position = json_text.parse_json((path / POSITION_FILE).read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {files.reason(error)}; try again.") from error
        # Whatever is trained on: the whole state need not fit on a device.
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        named = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for name, leaf in _by_name(abstract).items()
        }
        try:
            with quiet_orbax():
                values = ocp.load((path / "state").absolute(), named)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} cannot be restored: {files.reason(error)}; delete it to resume from the one before."
            ) from error
        restored = [np.asarray(values[name]) for name in named]
        return jax.tree.unflatten(jax.tree.structure(abstract), restored), position

    def restore_newest(self, abstract: TrainState, *, strict: bool = False) -> tuple[int, TrainState, dict[str, Any]]:
        """Return step, state and position of the newest checkpoint that is intact; see `restore`.

        Those that are damaged are renamed to checkpoint-N.damaged, and a warning says so.

        Args:
            abstract: shapes, dtypes and structure of the state.
            strict: refuse a newest checkpoint that is damaged.

        Raises:
            UserError: with `strict`, the newest checkpoint is damaged; without, all are.
        """
        damaged: dict[Path, DamagedCheckpoint] = {}
        for step in reversed(self.checkpoints()):
            try:
                state, position = self.restore(step, abstract)
            except DamagedCheckpoint as error:
                if strict:
                    raise UserError(f"{error} `strict_resume=False` resumes from the one before.") from error
                damaged[self.checkpoint_path(step)] = error
                continue
            for path, problem in damaged.items():
                aside = path.with_name(path.name + _DAMAGED)
                files.remove(aside)
                os.replace(path, aside)
                logger.warning("%s It is kept as %s, and the checkpoint before it is used.", problem, aside.name)
            return step, state, position
        raise UserError(
            f"`output_dir={self.path}` holds no checkpoint that is intact; `overwrite_output_dir` begins anew."
        )
