"""Results of a finished run: summary.json, whose presence says that the run is finished, and the digests of the others.

The command line asks before JAX is loaded: this imports light things only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.files import file_digest, read_checked_json, reason, write_checked_json

SUMMARY_FILE = "summary.json"
"""Written last; with its own digest and, as `files`, {name: SHA-256} of the other results."""

_OTHERS = ("answers.json", "loss.png", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json, once all other results are there."""
    digests = {name: file_digest(directory / name) for name in _OTHERS if (directory / name).is_file()}
    write_checked_json(directory / SUMMARY_FILE, {**summary, "files": digests})


def read_summary(directory: Path) -> dict[str, Any] | None:
    """Return the contents of summary.json; None if there is none.

    Raises:
        UserError: it is not as it was written.
    """
    file = directory / SUMMARY_FILE
    try:
        return read_checked_json(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is damaged ({reason(error)}); delete it and run the same command again, which makes the results "
            "again from the last checkpoint."
        ) from error


def changed_results(directory: Path, summary: Mapping[str, Any]) -> list[str]:
    """Name the results that are missing, cannot be read, or are not as they were when the summary was written."""

    def is_same(file: Path, digest: str) -> bool:
        try:
            return file_digest(file) == digest
        except OSError:
            return False

    return [name for name, digest in summary["files"].items() if not is_same(directory / name, digest)]
