"""The export of a trained adapter with its base: one function from a run's directory to files that people serve.

Whatever the format, everything is written to a hidden sibling of the output directory and renamed when it is whole;
export.json says what was made of what, and SHA256SUMS has the digest of every file. The same export goes on after the
last whole tensor of one that was killed or found the disk full (`qlora_jax.checkpoints.journal`).
"""

import dataclasses
import logging
import os
import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path, PurePath

from qlora_jax import files
from qlora_jax.checkpoints.base_weights import BaseStorage, BaseWeights, open_base
from qlora_jax.checkpoints.gguf_adapter import write_gguf_adapter
from qlora_jax.checkpoints.gguf_writer import GGUF_FORMATS, gguf_metadata, write_gguf
from qlora_jax.checkpoints.hf_export import BITSANDBYTES_BLOCK, HuggingFaceFormat, check_parts, write_hugging_face
from qlora_jax.checkpoints.hub import resolve_config, resolve_model
from qlora_jax.checkpoints.journal import fingerprint, resumable_directory, versions
from qlora_jax.checkpoints.merging import open_adapter
from qlora_jax.checkpoints.peft import CONFIG_NAME, WEIGHTS_NAME, warn_of_no_change
from qlora_jax.checkpoints.streaming import Progress
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.choices import BaseKind, ExportTarget
from qlora_jax.errors import UserError
from qlora_jax.exporting.model_card import CardFacts, model_card, public_name
from qlora_jax.exporting.modelfile import modelfile
from qlora_jax.exporting.templates import template_metadata, write_template
from qlora_jax.models import base_tensors
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.trained import base_name, find_trained, storage_in_training

logger = logging.getLogger(__name__)

EXPORT_FILE = "export.json"
"""Contents of an export; a directory that has one is complete."""

ERASED = 0.1
"""Share of a module's change below which rounding is said to erase it."""

_SHOWN = 5
_ADAPTER = "adapter.gguf"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """An export.

    Attributes:
        adapter: directory of a run, one of its checkpoints, or an adapter in PEFT's format.
        output_dir: directory to make.
        to: format.
        base: the base the adapter is merged into, see `BaseKind`.
        model: base to use in place of the one the run names.
        storage: of the base in training; None for what the run says.
        dtype: of weights that the format does not quantise.
        max_shard_bytes: most data of a safetensors file.
        overwrite: replace an earlier export.
        push_to_hub: repository to upload the finished export to; None for none.
    """

    adapter: str
    output_dir: str
    to: ExportTarget = "safetensors"
    base: BaseKind = "dequantized"
    model: str | None = None
    storage: BaseStorage | None = None
    dtype: str = "bfloat16"
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    push_to_hub: str | None = None


@dataclasses.dataclass(frozen=True)
class Export:
    """Result of `export`.

    Attributes:
        directory: of all files.
        files: name -> bytes.
        shares: module -> share of its trained change that survives rounding, see `surviving_share`.
        base: one line about the base.
        left_out: tensors of the base that carry nothing and are in no export.
        seconds: wall time.
    """

    directory: Path
    files: Mapping[str, int]
    shares: Mapping[str, float]
    base: str
    left_out: tuple[str, ...]
    seconds: float


def export(config: ExportConfig, progress: Progress | None = None) -> Export:
    """Export a trained adapter.

    Args:
        config: of what, to what and where.
        progress: see `Progress`.

    Raises:
        UserError: an adapter or base that cannot be read or do not belong together, a format that cannot hold the
            model, an output directory in use, or a disk that is full.
    """
    started = time.perf_counter()
    if config.push_to_hub is not None:
        _check_repository(config.push_to_hub)
    output = _checked_output(config)
    trained = find_trained(config.adapter)
    name = config.model or base_name(trained)
    merges = config.to != "gguf-lora"
    model = resolve_model(name, weights=merges)
    storage = config.storage or storage_in_training(trained)
    base = open_base(model, config.base, storage) if merges else None
    model_config = resolve_config(model) if base is None else base.config
    adapter = open_adapter(trained.adapter, model_config, tuple(base_tensors(model_config)))
    warn_of_no_change(adapter.path, adapter.tensors)
    identity = {
        "command": "export",
        "versions": versions(),
        "to": config.to,
        "model": public_name(name),
        "source": fingerprint(model, base.source_files if base else ()),
        "base": config.base,
        "storage": dataclasses.asdict(storage),
        "dtype": config.dtype,
        "max_shard_bytes": config.max_shard_bytes,
        "dataset_format": trained.dataset_format,
        "adapter": {file: files.file_digest(trained.adapter / file) for file in (CONFIG_NAME, WEIGHTS_NAME)},
    }
    with resumable_directory(output, identity, replace=config.overwrite) as journal:
        staging = journal.directory
        shares: dict[str, float] = {}
        if base is None:
            write_gguf_adapter(adapter, model_config, staging / _ADAPTER, title=_title(name))
        elif config.to.startswith("gguf"):
            kind = config.to.removeprefix("gguf-").upper()
            file = staging / _merged_file(config)
            own = {"general.name": _title(name), **template_metadata(load_tokenizer(model), trained.dataset_format)}
            shares = write_gguf(
                base, adapter, file, GGUF_FORMATS[kind], metadata=own, progress=progress, journal=journal
            )
        else:
            into = hugging_face_format(config, storage, base)
            shares = write_hugging_face(base, adapter, staging, into, progress, journal=journal)
            write_template(staging, trained.dataset_format)
        if config.to.startswith("gguf"):
            text = _modelfile(config, trained.dataset_format, model, name)
            (staging / "Modelfile").write_text(text, encoding="utf-8")
        merged_into = config.base if merges else None
        kept_as = storage.describe(model_config)
        facts = CardFacts(_title(name), config.to, name, merged_into, kept_as, shares)
        (staging / "README.md").write_text(model_card(facts, trained.run, trained.summary), encoding="utf-8")
        record = {
            "format": config.to,
            "model": public_name(name),
            "base": merged_into,
            "storage": kept_as,
            "surviving_share": shares,
            "left_out": list(base.left_out) if base else [],
        }
        files.write_json(staging / EXPORT_FILE, record)
        files.write_checksums(staging)
    if merges:
        warn_of_erased(config.to, config.base, shares)
    if config.push_to_hub is not None:
        push(output, config.push_to_hub)
    return Export(
        directory=output,
        files=files.file_sizes(output),
        shares=shares,
        base=base.description if base else f"the adapter of {public_name(name)}",
        left_out=base.left_out if base else (),
        seconds=time.perf_counter() - started,
    )


def check_merged_export(config: ExportConfig) -> None:
    """Refuse what `export` would refuse before it reads a weight; nothing is written.

    Args:
        config: of a merged model, with the adapter of that base.

    Raises:
        UserError: the output directory is in use or cannot be made, or the format cannot hold the model.
    """
    files.check_can_make(_checked_output(config), "choose another output directory")
    trained = find_trained(config.adapter)
    model = resolve_model(config.model or base_name(trained))
    base = open_base(model, config.base, config.storage or storage_in_training(trained))
    if config.to.startswith("gguf"):
        gguf_metadata(base)
    else:
        check_parts(base)


def push(directory: Path, repository: str) -> None:
    """Upload a complete export to the Hugging Face hub; a repository that is not there is made, private.

    Raises:
        UserError: it cannot be uploaded; says why, and that the export is whole.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message="Upload an export of qlora-jax",
            ignore_patterns=[files.JOURNAL_NAME],
        )
    except Exception as error:  # the hub's client raises its own types, those of its HTTP library and ValueError
        raise UserError(
            f"{directory} is complete, but could not be pushed to {repository} ({files.reason(error)}); log in with "
            f"`hf auth login` or upload it with `{shlex.join(['hf', 'upload', repository, str(directory)])}`."
        ) from error


def _check_repository(repository: str) -> None:
    """Refuse a name that no repository can have; UserError says why."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"`push_to_hub={repository}`: {str(error).rstrip('.')}; give OWNER/NAME.") from None


def parse_size(text: str) -> int:
    """Read a size such as 5GB or 300MB, in powers of 1000.

    Raises:
        UserError: it is none, or less than a byte.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)B?", text.strip().upper(), re.ASCII)
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2]])
    if not size:
        raise UserError(f"`max_shard_size={text}`: give a size such as 5GB.")
    return size


def hugging_face_format(config: ExportConfig, storage: BaseStorage, base: BaseWeights) -> HuggingFaceFormat:
    """Return how a Hugging Face directory is stored; a bitsandbytes one in the type of training, where it has that."""
    if config.to != "bitsandbytes":
        return HuggingFaceFormat(config.dtype, config.max_shard_bytes)
    trained = [storage.of(base.config).of(spec.linear) for spec in base.specs if spec.quantized]
    # Whatever the size of its blocks.
    kept = next((each for each in trained if each.quant_type in ("nf4", "fp4")), QuantizationConfig())
    four_bit = QuantizationConfig(kept.quant_type, BITSANDBYTES_BLOCK, kept.double_quant)
    return HuggingFaceFormat(config.dtype, config.max_shard_bytes, four_bit)


def _merged_file(config: ExportConfig) -> str:
    return f"model-{config.to.removeprefix('gguf-').upper()}.gguf"


def _title(name: str) -> str:
    """Name a model after its base."""
    return f"{PurePath(public_name(name)).name.removesuffix('.gguf')}-lora"


def _modelfile(config: ExportConfig, dataset_format: str, model: Path, name: str) -> str:
    tokenizer = load_tokenizer(model)
    if config.to != "gguf-lora":
        return modelfile(f"./{_merged_file(config)}", tokenizer, dataset_format=dataset_format)
    return modelfile(
        f"./{model.name}" if model.is_file() else "./base.gguf",
        tokenizer,
        adapter=f"./{_ADAPTER}",
        dataset_format=dataset_format,
        note=f"FROM is a GGUF file of {public_name(name)}: put it here, or say where it is.",
    )


def _checked_output(config: ExportConfig) -> Path:
    """Return the absolute path of the output directory; UserError if it is in use."""
    output = Path(os.path.abspath(files.user_path(config.output_dir)))
    files.final_directory(output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return output
    if not (output / EXPORT_FILE).is_file():
        raise UserError(f"{output} exists and is no earlier export; choose another output directory.")
    if not config.overwrite:
        raise UserError(f"{output} already holds an export; set `overwrite` to replace it.")
    return output


def warn_of_erased(to: str, base: BaseKind, shares: Mapping[str, float]) -> None:
    """Name the first modules whose change does not survive the rounding to a format, merged into that base."""
    if erased := [name for name, share in shares.items() if share < ERASED]:
        shown = ", ".join(erased[:_SHOWN]) + (f" and {len(erased) - _SHOWN} more" if len(erased) > _SHOWN else "")
        grid = "; where its base lies on that grid already, `base=original` may keep more" if base != "original" else ""
        logger.warning(
            "rounding to %s keeps less than %.0f %% of the trained change of %s (an export's %s lists all); export to "
            "16 bits, or the adapter beside its base (gguf-lora), to keep it%s",
            to, 100 * ERASED, shown, EXPORT_FILE, grid,
        )  # fmt: skip
