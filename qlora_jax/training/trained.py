"""A trained adapter on disk, with its run's record: what it was trained on, and how the base was stored."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax import files
from qlora_jax.checkpoints.base_weights import BaseStorage
from qlora_jax.checkpoints.model_files import read_json_object
from qlora_jax.checkpoints.peft import CONFIG_NAME
from qlora_jax.data import CHAT, FORMATS
from qlora_jax.errors import UserError
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.ownership import RUN_FILE
from qlora_jax.training.results import SUMMARY_FILE, read_summary

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained adapter on disk, and what is known of the run that made it.

    Attributes:
        adapter: directory of the adapter.
        run: contents of run.json; {} if there is none.
        summary: contents of summary.json; {} if there is none.
    """

    adapter: Path
    run: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def flags(self) -> Mapping[str, Any]:
        """Flags of the run."""
        flags: Mapping[str, Any] = self.run.get("flags", {})
        return flags

    @property
    def dataset_format(self) -> str:
        """Format of the training data; `CHAT` if the record does not say, or names none that there is."""
        found = self.run.get("facts", {}).get("dataset_format") or self.flags.get("dataset_format")
        return found if found in FORMATS else CHAT


def find_trained(path: str | Path) -> Trained:
    """Find the adapter of a run, of a checkpoint or on its own, and the run's record.

    Raises:
        UserError: there is no adapter, or run.json or summary.json is not as it was written.
    """
    directory = files.user_path(path)
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; give a run's directory, or an adapter in PEFT's format.")
    adapter = directory if (directory / CONFIG_NAME).is_file() else directory / "adapter"
    if not (adapter / CONFIG_NAME).is_file():
        checkpoints = sorted(directory.glob(f"checkpoint-*/{CONFIG_NAME}"))
        hint = f"; the run may be unfinished: give {checkpoints[-1].parent}" if checkpoints else ""
        raise UserError(f"{directory} holds no adapter ({CONFIG_NAME}){hint}.")
    record = next((place / RUN_FILE for place in (directory, adapter.parent) if (place / RUN_FILE).is_file()), None)
    run: Mapping[str, Any] = {}
    if record is not None:
        try:
            run = files.read_checked_json(record)
            if not isinstance(run.get("flags"), dict):
                raise ValueError("it has no flags")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{record} is damaged ({files.reason(error)}); copy {adapter} elsewhere and give that."
            ) from error
    summary = read_summary(adapter.parent) if run and (adapter.parent / SUMMARY_FILE).is_file() else None
    return Trained(adapter, run, summary or {})


def base_name(trained: Trained) -> str:
    """Return the path or hub id of the base that an adapter was trained on.

    Raises:
        UserError: neither the run nor the adapter names one.
    """
    if name := trained.flags.get("model_name_or_path"):
        return str(name)
    name = read_json_object(trained.adapter / CONFIG_NAME, "save the adapter again").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{trained.adapter / CONFIG_NAME} names no base model; give it as `model`.")
    return name


def storage_in_training(trained: Trained) -> BaseStorage:
    """Return how the base was stored in training: as the run says, else as runs store it by default.

    Raises:
        UserError: the run's record does not say all of it.
    """
    flags = trained.flags
    if not flags:
        logger.info("nothing says how the base of %s was stored in training: nf4 is taken where it is not quantised "
                    "already", trained.adapter)  # fmt: skip
        return BaseStorage()
    if missing := sorted({"bits", "quant_type", "block_size", "double_quant"} - flags.keys()):
        raise UserError(
            f"the run.json of {trained.adapter} does not say {', '.join(missing)}: another version of qlora-jax wrote "
            f"it; say how the base was stored in training as `quant_type`."
        )
    kind = {8: "int8", 16: "none"}.get(flags["bits"], flags["quant_type"])
    default = QuantizationConfig(kind, flags["block_size"], flags["double_quant"])
    return BaseStorage(default, adopt=flags["bits"] == "auto")
