"""Files of a Hugging Face model: those that travel with its weights, those refused, reads that must be whole."""

from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.json_text import MAX_BYTES, parse_json
from qlora_jax.models.quantization_config import FIELD, MODELOPT_FILE, with_modelopt_file

COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a Hugging Face model besides its weights."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

DOWNLOAD_AGAIN = "the file is damaged or its download incomplete: download it again"
"""Advice in messages about files that are not whole."""

_CHECKED = 1 << 18
# Bits of the exponent, all of which are set of what is not finite: NumPy converts each of these numbers to look at it.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def pickle_refusal(subject: str) -> UserError:
    """Make the refusal of pickled weights; `subject` begins the sentence and names the file."""
    return UserError(
        f"{subject}, which can run arbitrary code when read; convert the model to safetensors "
        f"(save_pretrained does) and give that instead."
    )


def find_pickles(directory: Path) -> list[Path]:
    """Pickled weight files directly in `directory`."""
    weights = (p for p in sorted(directory.iterdir()) if p.suffix.lower() in PICKLE_SUFFIXES and p.is_file())
    return [p for p in weights if p.name != "training_args.bin"]


def is_inside(name: str) -> bool:
    """Tell if a name that a file gives stays below the directory it is looked for in, and can be a path at all."""
    parts = name.split("/")
    possible = "\0" not in name and len(name) <= 1024 and all(len(part.encode()) <= 255 for part in parts)
    return possible and not {"", ".", ".."} & set(parts)


def read_json_object(file: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object with `read_limited` and `json_object`."""
    return json_object(read_limited(file, hint), file)


def read_model_config(file: Path, hint: str) -> dict[str, Any]:
    """Read a config.json as `read_json_object` does, with what a hf_quant_config.json beside it says of the weights.

    Raises:
        UserError: also what `with_modelopt_file` refuses.
    """
    contents = read_json_object(file, hint)
    beside = file.with_name(MODELOPT_FILE)
    if file.name != "config.json" or not beside.is_file():
        return contents
    said = read_json_object(beside, DOWNLOAD_AGAIN)
    try:
        field = with_modelopt_file(contents.get(FIELD), said)
    except UserError as error:
        raise UserError(str(error).replace(MODELOPT_FILE, str(beside), 1)) from None
    return contents if field is None else {**contents, FIELD: field}


def read_limited(file: Path, hint: str) -> bytes:
    """Read a file of up to `MAX_BYTES`; `UserError` names it, and says `hint`, when it is missing or larger."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file} is larger than the {MAX_BYTES} bytes that are read of such a file; {hint}.")
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {hint}.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error


def json_object(raw: bytes, file: Path) -> dict[str, Any]:
    """Parse the contents of a file as a JSON object; `UserError` names the file when they are none."""
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); {DOWNLOAD_AGAIN}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object; {DOWNLOAD_AGAIN}.")
    return content


def check_finite(values: np.ndarray, name: str, file: Path) -> None:
    """Raise `UserError`, which names tensor and file, if a value is NaN or infinite; memory: a slice of the tensor."""
    flat = values.reshape(-1)
    # Slices that stay in the processor's cache.
    if not all(_all_finite(flat[start : start + _CHECKED]) for start in range(0, flat.size, _CHECKED)):
        raise UserError(f"tensor {name} in {file} holds NaN or infinity; {DOWNLOAD_AGAIN}.")


def _all_finite(values: np.ndarray) -> bool:
    exponent = _EXPONENTS.get(values.dtype.name)
    if exponent is None:
        return bool(np.isfinite(values).all())
    return bool((values.view(np.uint16) & exponent).max() < exponent)


def read_exactly(file: Path, offset: int, destination: np.ndarray, name: str) -> None:
    """Fill a contiguous array with the file's bytes from `offset`; a short file is a `UserError` naming the tensor."""
    view = destination.reshape(-1).view(np.uint8).data
    done = 0
    with open(file, "rb", buffering=0) as stream:
        stream.seek(offset)
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise UserError(f"{file} ends inside tensor {name}; {DOWNLOAD_AGAIN}.")
            done += count
