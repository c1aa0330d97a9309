"""LoRA adapters in PEFT's on-disk format, to and from our layer-stacked arrays.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors`. PEFT keeps one pair of matrices for
every layer (`base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` [R, in] and `.lora_B.weight` [out, R]);
we keep one pair for every linear, layers stacked: ("layers", "self_attn", "q_proj", "lora_a") [L, R, in] and "lora_b"
[L, out, R]. Both compute y = x W^T + (alpha / R) (x A^T) B^T.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlora_jax.errors import UserError
from qlora_jax.files import atomic_write, write_errors

__all__ = ["CONFIG_NAME", "DECODER_STACKS", "WEIGHTS_NAME", "AdapterConfig", "load_adapter", "save_adapter"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# Where a model family keeps its repeated layers: Hugging Face prefix of the numbered modules -> our stacked path.
DECODER_STACKS: Mapping[str, tuple[str, ...]] = {"model.layers": ("layers",)}

_PEFT_PREFIX = "base_model.model."
_MATRICES = {"lora_A": "lora_a", "lora_B": "lora_b"}
_RANK_AXIS = {"lora_A": 0, "lora_B": 1}

# Initialisations that leave the base weights as they are (pissa, olora, loftq, corda and others rewrite them).
_HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")

# Fields of adapter_config.json that are read, or that say nothing about what a trained adapter computes.
_NEUTRAL_FIELDS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an adapter needs besides its matrices.

    Attributes:
        rank: R, inner dimension of every pair of matrices.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability of dropping an element of the adapter's input in training.
        target_modules: last name of every adapted linear, sorted, e.g. ("q_proj", "v_proj").
        base_model_name: hub id or path of the model it was trained on, None when the file does not say.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    base_model_name: str | None


def save_adapter(
    directory: str | os.PathLike[str],
    lora: Mapping[tuple[str, ...], Any],
    *,
    rank: int,
    alpha: float | int,
    dropout: float | int,
    target_modules: Iterable[str],
    base_model_name: str | None,
    stacks: Mapping[str, tuple[str, ...]] = DECODER_STACKS,
) -> Path:
    """Write an adapter that PEFT's `PeftModel.from_pretrained` loads, float32, and check it by reading it back.

    Both files are written and checked in a temporary subdirectory first. `adapter_config.json` appears last, so that a
    directory that has one always holds a whole adapter; other files in `directory` are left alone.

    Args:
        directory: created when missing; an adapter already there is replaced.
        lora: {(*stack, *module, "lora_a"): [L, R, in], (..., "lora_b"): [L, out, R]}, NumPy or JAX arrays.
        rank: R, as in the arrays.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: stored for whoever trains on.
        target_modules: last names of the adapted linears; must be those in `lora`.
        base_model_name: hub id or path of the base model, stored.
        stacks: the family's table, Hugging Face prefix -> stacked path.

    Returns:
        The directory.

    Raises:
        UserError: empty, incomplete, mis-shaped or non-finite matrices, or a write that failed (disk full, ...).
    """
    directory = Path(directory)
    modules = _check_stacked(lora, rank)
    names = sorted({module[-1] for module in modules})
    if names != sorted(set(target_modules)):
        raise UserError(
            f"Adapter for {directory}: target_modules {sorted(set(target_modules))} but matrices for {names}."
        )
    tensors = _to_peft(lora, stacks)
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "lora_bias": False,
        "lora_dropout": float(dropout),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": int(rank),
        "rank_pattern": {},
        "revision": None,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    weights_path, config_path = directory / WEIGHTS_NAME, directory / CONFIG_NAME
    created = not directory.exists()
    try:
        with write_errors(directory, "free some space or choose another directory"):
            directory.mkdir(parents=True, exist_ok=True)
            # The config is the mark of completeness: it goes first and comes back last.
            with atomic_write(config_path) as new_config, atomic_write(weights_path) as new_weights:
                new_config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                _save_tensors(tensors, new_weights)
                new_weights.chmod(new_config.stat().st_mode)  # safetensors makes files only their owner can read
                _check_written(new_config, new_weights, lora, stacks)
                config_path.unlink(missing_ok=True)
    finally:
        if created:
            with contextlib.suppress(OSError):
                directory.rmdir()  # only if nothing came of it: it is then empty
    return directory


def load_adapter(
    directory: str | os.PathLike[str],
    *,
    base_shapes: Mapping[tuple[str, ...], tuple[int, ...]] | None = None,
    stacks: Mapping[str, tuple[str, ...]] = DECODER_STACKS,
) -> tuple[dict[tuple[str, ...], np.ndarray], AdapterConfig]:
    """Read a PEFT LoRA adapter.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors` (pickles are refused).
        base_shapes: optionally the stacked shape [L, out, in] of every base linear, keyed by its path up to and
            without "weight"; the adapter must then fit it.
        stacks: the family's table, Hugging Face prefix -> stacked path.

    Returns:
        {(*stack, *module, "lora_a"): float32 [L, R, in], (..., "lora_b"): float32 [L, out, R]} and the configuration.

    Raises:
        UserError: a missing or malformed file, a config field this program would have to ignore (DoRA, biases, ranks by
            layer, ...), or a missing, unexpected, mis-shaped or non-finite tensor; the message names it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"Adapter directory {directory} does not exist.")
    lora, config = _read_adapter(directory / CONFIG_NAME, directory / WEIGHTS_NAME, stacks)
    if base_shapes is not None:
        _check_base(lora, base_shapes, directory / WEIGHTS_NAME)
    return lora, config


def _read_adapter(
    config_path: Path, weights_path: Path, stacks: Mapping[str, tuple[str, ...]]
) -> tuple[dict[tuple[str, ...], np.ndarray], AdapterConfig]:
    """Read the two files of an adapter."""
    fields = _read_config(config_path)
    rank, alpha, dropout = _check_config(fields, config_path)
    tensors = _read_tensors(weights_path)
    adapted = {name.removeprefix(_PEFT_PREFIX).split(".lora_")[0] for name in tensors}
    lora = _from_peft(tensors, rank, weights_path, stacks)
    _check_targets(fields, sorted(adapted), config_path)
    config = AdapterConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=tuple(sorted({path[-2] for path in lora})),
        base_model_name=fields.get("base_model_name_or_path"),
    )
    return lora, config


def _check_stacked(lora: Mapping[tuple[str, ...], Any], rank: int) -> list[tuple[str, ...]]:
    """Check ranks, pairs and layer counts of stacked matrices; return the modules' paths."""
    if not lora:
        raise UserError("The adapter has no matrices: nothing to save.")
    modules = sorted({path[:-1] for path in lora})
    expected = {(*module, leaf) for module in modules for leaf in _MATRICES.values()}
    for path in sorted(expected ^ set(lora)):
        problem = "is missing" if path in expected else "is no LoRA matrix"
        raise UserError(f"Adapter: {'.'.join(path)} {problem}.")
    for module in modules:
        a, b = lora[(*module, "lora_a")].shape, lora[(*module, "lora_b")].shape
        if len(a) != 3 or len(b) != 3 or a[1] != rank or b[2] != rank or a[0] != b[0] or 0 in (*a, *b):
            raise UserError(
                f"Adapter: {'.'.join(module)} has lora_a {tuple(a)} and lora_b {tuple(b)}; "
                f"[layers, {rank}, in] and [layers, out, {rank}] are needed."
            )
    return modules


def _to_peft(lora: Mapping[tuple[str, ...], Any], stacks: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """Unstack into PEFT's names, float32."""
    leaves = {leaf: matrix for matrix, leaf in _MATRICES.items()}
    tensors = {}
    for path in sorted(lora):
        prefix = next((name for name, stack in stacks.items() if path[: len(stack)] == stack), None)
        if prefix is None:
            raise UserError(f"Adapter: {'.'.join(path)} is in no stack of layers known for this model family.")
        module = ".".join(path[len(stacks[prefix]) : -1])
        stacked = np.asarray(lora[path]).astype(np.float32)
        for layer, matrix in enumerate(stacked):
            name = f"{_PEFT_PREFIX}{prefix}.{layer}.{module}.{leaves[path[-1]]}.weight"
            if not np.isfinite(matrix).all():
                raise UserError(f"Adapter: {name} holds NaN or Inf; it is not saved.")
            tensors[name] = np.ascontiguousarray(matrix)
    return tensors


def _save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # in place of the OSError that it had
        raise OSError(str(error)) from error


def _check_written(
    config_path: Path,
    weights_path: Path,
    lora: Mapping[tuple[str, ...], Any],
    stacks: Mapping[str, tuple[str, ...]],
) -> None:
    """Re-read what was just written and compare it with what should be there, bit for bit."""
    again, _ = _read_adapter(config_path, weights_path, stacks)
    same = again.keys() == lora.keys() and all(
        np.array_equal(values, np.asarray(lora[path]).astype(np.float32)) for path, values in again.items()
    )
    if not same:
        raise UserError(f"The adapter written to {config_path.parent} reads back differently; check the disk.")


def _read_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no PEFT adapter: it has no {CONFIG_NAME}.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return fields


def _check_config(fields: dict[str, Any], path: Path) -> tuple[int, float, float]:
    """Refuse every field that changes what the adapter computes in a way we do not; return rank, alpha, dropout."""

    def refuse(name: str, hint: str = "") -> UserError:
        return UserError(f"{path}: {name}={json.dumps(fields.get(name))} is not supported{hint}.")

    if fields.get("peft_type") != "LORA":
        raise refuse("peft_type", '; only "LORA" is')
    if fields.get("task_type") not in ("CAUSAL_LM", None):
        raise refuse("task_type", '; only "CAUSAL_LM" is')
    if fields.get("bias", "none") != "none":
        raise refuse("bias", '; train with bias="none"')
    if fields.get("use_rslora"):
        raise refuse(
            "use_rslora", "; set lora_alpha to lora_alpha * sqrt(r) and use_rslora to false, which is the same"
        )
    if fields.get("init_lora_weights", True) not in _HARMLESS_INITIALISATIONS:
        raise refuse("init_lora_weights", ": it changes the base weights; convert it to a plain LoRA with PEFT first")
    for name, value in fields.items():
        # Whatever is set beyond this would change the result, known to us or not.
        if name not in _NEUTRAL_FIELDS and name != "bias" and value not in (None, False, "", [], {}):
            raise refuse(name)

    rank, dropout = fields.get("r"), fields.get("lora_dropout", 0.0)
    alpha: Any = fields.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{path}: r={json.dumps(rank)} must be a positive integer.")
    for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not np.isfinite(value):
            raise UserError(f"{path}: {name}={json.dumps(value)} must be a number.")
    if not 0 <= dropout < 1:
        raise UserError(f"{path}: lora_dropout={dropout} must be at least 0 and below 1.")
    if not isinstance(fields.get("base_model_name_or_path"), str | None):
        raise UserError(f"{path}: base_model_name_or_path must be a string or null.")
    return rank, float(alpha), float(dropout)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read adapter_model.safetensors as float32."""
    directory = path.parent
    if not path.is_file():
        pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
        if pickles:
            raise UserError(
                f"{pickles[0]} is a pickle, which may run any code when read, and is refused; "
                f"save the adapter as {WEIGHTS_NAME} with PEFT (safe_serialization=True)."
            )
        raise UserError(f"{directory} has {CONFIG_NAME} but no {WEIGHTS_NAME}.")
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                values = file.get_tensor(name)
                if values.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
                    raise UserError(f"{path}: {name} is {values.dtype.name}; LoRA matrices are floating point.")
                tensors[name] = values.astype(np.float32)
    except SafetensorError as error:
        raise UserError(f"{path} is empty, truncated or corrupt: {error}.") from error
    if not tensors:
        raise UserError(f"{path} holds no tensors: the adapter is empty.")
    return tensors


def _from_peft(
    tensors: dict[str, np.ndarray], rank: int, path: Path, stacks: Mapping[str, tuple[str, ...]]
) -> dict[tuple[str, ...], np.ndarray]:
    """Stack PEFT's tensors by layer; empties `tensors`, so that the adapter is not held twice."""
    prefixes = "|".join(re.escape(prefix) for prefix in stacks)
    pattern = re.compile(rf"{re.escape(_PEFT_PREFIX)}({prefixes})\.(\d+)\.([\w.]+)\.(lora_[AB])\.weight")
    grouped: dict[tuple[str, str, str], dict[int, str]] = {}
    depth: dict[str, int] = {}
    for name, values in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            raise UserError(f"{path}: {name} is not a LoRA matrix of a linear inside the model's layers.")
        prefix, layer, module, matrix = match.groups()
        if values.ndim != 2 or values.shape[_RANK_AXIS[matrix]] != rank or 0 in values.shape:
            needed = f"[{rank}, in]" if matrix == "lora_A" else f"[out, {rank}]"
            raise UserError(f"{path}: {name} has shape {list(values.shape)}, but r={rank} needs {needed}.")
        if not np.isfinite(values).all():
            raise UserError(f"{path}: {name} holds NaN or Inf.")
        grouped.setdefault((prefix, module, matrix), {})[int(layer)] = name
        depth[prefix] = max(depth.get(prefix, 0), int(layer) + 1)

    lora = {}
    for prefix, module in sorted({key[:2] for key in grouped}):
        for matrix, leaf in _MATRICES.items():
            names = grouped.get((prefix, module, matrix), {})
            for layer in range(depth[prefix]):
                if layer not in names:
                    missing = f"{_PEFT_PREFIX}{prefix}.{layer}.{module}.{matrix}.weight"
                    raise UserError(f"{path}: {missing} is missing; every layer must have the same adapters.")
            first = tensors[names[0]]
            for layer in range(1, depth[prefix]):
                if tensors[names[layer]].shape != first.shape:
                    raise UserError(
                        f"{path}: {names[layer]} has shape {list(tensors[names[layer]].shape)}, "
                        f"but layer 0 has {list(first.shape)}."
                    )
            stacked = np.stack([tensors.pop(names[layer]) for layer in range(depth[prefix])])
            lora[(*stacks[prefix], *module.split("."), leaf)] = stacked
    return lora


def _check_targets(fields: Mapping[str, Any], adapted: list[str], path: Path) -> None:
    """Check that a list of target modules and the tensors agree, by PEFT's rule: equal, or ending in ".target".

    A string (a regular expression, or "all-linear") says nothing the tensors do not. `exclude_modules` names modules
    that `target_modules` would match but that have no matrices: with it, a target without matrices is no contradiction.
    """
    targets, excluded = fields.get("target_modules"), fields.get("exclude_modules")
    if excluded is not None and not _is_names_or_pattern(excluded):
        raise UserError(f"{path}: exclude_modules must be a list of names, a string or null.")
    if isinstance(targets, str):
        return
    if not targets or not _is_names_or_pattern(targets):
        raise UserError(f"{path}: target_modules must be a non-empty list of names, or a string.")
    for target in targets:
        if not excluded and not any(f".{name}".endswith(f".{target}") for name in adapted):
            raise UserError(f"{path}: target_modules names {target}, but {WEIGHTS_NAME} has no matrices for it.")
    for name in adapted:
        if not any(f".{name}".endswith(f".{target}") for target in targets):
            raise UserError(f"{path}: {WEIGHTS_NAME} has matrices for {name}, which target_modules does not name.")


def _is_names_or_pattern(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _check_base(
    lora: Mapping[tuple[str, ...], np.ndarray], base_shapes: Mapping[tuple[str, ...], tuple[int, ...]], path: Path
) -> None:
    """Check every pair of matrices against the base linear it adapts."""
    for module in sorted({key[:-1] for key in lora}):
        if module not in base_shapes:
            raise UserError(f"{path}: the base model has no linear {'.'.join(module)}.")
        layers, out, fan_in = base_shapes[module]
        a, b = lora[(*module, "lora_a")].shape, lora[(*module, "lora_b")].shape
        if (a[0], b[1], a[2]) != (layers, out, fan_in):
            raise UserError(
                f"{path}: the adapter of {'.'.join(module)} is for {a[0]} layers of [{b[1]}, {a[2]}], but the base "
                f"model has {layers} of [{out}, {fan_in}]; it belongs to another model."
            )
