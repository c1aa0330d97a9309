"""LoRA adapters in PEFT's on-disk format, to and from our layer-stacked arrays.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors`. PEFT keeps one pair of matrices for
every layer (`base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` [R, in] and `.lora_B.weight` [out, R]);
we keep one pair for every linear, layers stacked: ("layers", "self_attn", "q_proj", "lora_a") [L, R, in] and "lora_b"
[L, out, R]. Both compute y = x W^T + (alpha / R) (x A^T) B^T. The family's table of names leads from one to the other.

PEFT may scale by alpha / sqrt(R) (rsLoRA, Kalajdzievski 2023), and give modules ranks and alphas of their own
(`rank_pattern`, `alpha_pattern`). Here all have one rank and one scale: smaller pairs get rows and columns of zeros,
whose gradients are zero, and what their scale differs by is multiplied into B. The adapter computes the same.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlora_jax import models
from qlora_jax.checkpoints.model_files import read_json_object
from qlora_jax.checkpoints.peft_modules import Module, ends_of, matching_ends, named, targeted
from qlora_jax.errors import UserError
from qlora_jax.files import CHECKSUMS_NAME, atomic_write, checksums, damaged_file, user_path, write_errors
from qlora_jax.json_text import check_type
from qlora_jax.models.family import LAYER
from qlora_jax.patterns import MOST

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "AdapterConfig", "load_adapter", "save_adapter"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

logger = logging.getLogger(__name__)

_PEFT_PREFIX = "base_model.model."
_MATRICES = {"lora_A": "lora_a", "lora_B": "lora_b"}
_RANK_AXIS = {"lora_A": 0, "lora_B": 1}

# Initialisations that leave the base weights as they are (pissa, olora, loftq, corda and others rewrite them).
_HARMLESS_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")

# Fields of adapter_config.json that are read.
_READ_FIELDS = frozenset(
    {
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
# Those that say nothing about what a trained adapter computes.
_INERT_FIELDS = frozenset(
    {
        "auto_mapping",  # class of the base model, for PEFT to import
        "ensure_weight_tying",  # of adapted embeddings and heads, whose matrices are refused
        "eva_config",  # how A began
        "inference_mode",
        "megatron_core",  # a module's name, for `megatron_config`
        "peft_version",
        "qalora_group_size",  # for `use_qalora`
        "revision",
        "runtime_config",  # where PEFT computes
    }
)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Settings of an adapter, besides its matrices.

    Attributes:
        rank: R, inner dimension of every pair of matrices.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability of dropping an element of the adapter's input in training.
        target_modules: last name of every adapted linear, sorted, e.g. ("q_proj", "v_proj").
        base_model_name: hub id or path of the model it was trained on, None when the file does not say.
    """

    rank: int
    alpha: float | int
    dropout: float | int
    target_modules: tuple[str, ...]
    base_model_name: str | None


class _Names:
    """Our path and PEFT's name of every linear in a model's layers."""

    def __init__(self, model: models.DecoderConfig):
        family, table = models.family_of(model), models.names(model)
        linears = {name for group in family.lora_groups.values() for name in group}
        # Modules of the layers, by what they are called on either side; files may also use the checkpoint's name.
        inside = [name for name in table if LAYER in name.peft and name.ours.rpartition(".")[2] in linears]
        self.task_type = family.peft_task
        self.to_peft = {tuple(name.ours.split(".")): name.peft for name in inside}
        self.layers = model.num_hidden_layers
        self.modules = tuple(
            Module(tuple(dict.fromkeys(n.replace(LAYER, str(layer)) for n in (name.hf, name.peft))), name in inside)
            for name in table
            for layer in range(model.num_hidden_layers if LAYER in name.hf else 1)
        )
        self.to_ours = {template: tuple(name.ours.split(".")) for name in inside for template in (name.hf, name.peft)}
        self._other_parts = family.other_parts(model)

    def targets(self, modules: list[tuple[str, ...]]) -> list[str] | str:
        """Say which linears have matrices: last names, or a regular expression where other parts have the same."""
        if not self._other_parts:
            return sorted({module[-1] for module in modules})
        templates = (re.escape(self.to_peft[module]).replace(re.escape(LAYER), r"\d+") for module in modules)
        return "|".join(f"({template})" for template in templates)


def save_adapter(
    directory: str | os.PathLike[str],
    lora: Mapping[tuple[str, ...], Any],
    config: AdapterConfig,
    model: models.DecoderConfig,
) -> Path:
    """Write an adapter that PEFT's `PeftModel.from_pretrained` loads, float32, and check it by reading it back.

    Both files are written and checked under temporary names first, and SHA256SUMS holds their digests.
    `adapter_config.json` appears last, so that a directory that has one always holds a whole adapter; other files in
    `directory` are left alone.

    Args:
        directory: created when missing; an adapter already there is replaced.
        lora: {(*path, "lora_a"): [L, R, in], (*path, "lora_b"): [L, out, R]}, NumPy or JAX arrays.
        config: describes them; `target_modules` must be those in `lora`.
        model: configuration of the base model.

    Returns:
        The directory.

    Raises:
        UserError: empty, incomplete, mis-shaped or non-finite matrices, or a write that failed (disk full, ...).
    """
    directory, names = Path(directory), _Names(model)
    modules = _check_stacked(lora, config.rank)
    adapted = sorted({module[-1] for module in modules})
    if adapted != sorted(set(config.target_modules)):
        raise UserError(
            f"Adapter for {directory}: target_modules {sorted(set(config.target_modules))} but matrices for {adapted}."
        )
    tensors = _to_peft(lora, names)
    fields = _config_fields(config, names.targets(modules), names.task_type)
    weights_path, config_path, sums_path = (directory / name for name in (WEIGHTS_NAME, CONFIG_NAME, CHECKSUMS_NAME))
    created = not directory.exists()
    try:
        with write_errors(directory, "free some space or choose another directory"):
            directory.mkdir(parents=True, exist_ok=True)
            # The config is the mark of completeness: it goes first and comes back last.
            with (
                atomic_write(config_path) as new_config,
                atomic_write(sums_path) as new_sums,
                atomic_write(weights_path) as new_weights,
            ):
                new_config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
                _save_tensors(tensors, new_weights)
                new_weights.chmod(new_config.stat().st_mode)  # safetensors makes files only their owner can read
                _check_written(new_config, new_weights, lora, names)
                sums = checksums({CONFIG_NAME: new_config, WEIGHTS_NAME: new_weights})
                new_sums.write_text(sums, encoding="utf-8")
                config_path.unlink(missing_ok=True)
    finally:
        if created:
            with contextlib.suppress(OSError):
                directory.rmdir()  # only if nothing came of it: it is then empty
    return directory


def load_adapter(
    directory: str | os.PathLike[str], model: models.DecoderConfig
) -> tuple[dict[tuple[str, ...], np.ndarray], AdapterConfig]:
    """Read a PEFT LoRA adapter.

    Args:
        directory: holds `adapter_config.json` and `adapter_model.safetensors` (pickles are refused); if it has a
            SHA256SUMS, both must be as it says.
        model: configuration of the base model, whose family's names the file must have.

    Returns:
        {(*path, "lora_a"): float32 [L, R, in], (*path, "lora_b"): float32 [L, out, R]} and the configuration.

    Raises:
        UserError: a missing or malformed file, a config field this program would have to ignore (DoRA, biases,
            `modules_to_save`, ...), or a missing, unexpected, mis-shaped or non-finite tensor; the message names it.
    """
    directory = user_path(os.fspath(directory))
    if not directory.is_dir():
        raise UserError(f"Adapter directory {directory} does not exist.")
    marks = (directory / name for name in (CONFIG_NAME, CHECKSUMS_NAME))
    if all(mark.is_file() for mark in marks) and (damaged := damaged_file(directory, (CONFIG_NAME, WEIGHTS_NAME))):
        raise UserError(
            f"{directory / damaged} is missing or not as it was written; if that was you, delete "
            f"{directory / CHECKSUMS_NAME}."
        )
    return _read_adapter(directory / CONFIG_NAME, directory / WEIGHTS_NAME, _Names(model))


def warn_of_no_change(directory: Path, tensors: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """Say that an adapter changes nothing, where every matrix B is zero, as all are before training.

    Args:
        directory: of the adapter.
        tensors: as `load_adapter` returns them.
    """
    if not any(np.any(values) for path, values in tensors.items() if path[-1] == "lora_b"):
        logger.warning("every matrix B of %s is zero: it was not trained, and changes nothing", directory)


def _read_adapter(
    config_path: Path, weights_path: Path, names: _Names
) -> tuple[dict[tuple[str, ...], np.ndarray], AdapterConfig]:
    """Read the two files of an adapter."""
    fields = _read_config(config_path)
    numbers = _check_config(fields, config_path, names.task_type)
    tensors = _read_tensors(weights_path)
    adapted = {name.removeprefix(_PEFT_PREFIX).split(".lora_")[0] for name in tensors}
    ranks, alphas = (_own(field, numbers[field], adapted, config_path) for field in ("rank_pattern", "alpha_pattern"))
    scales = {
        name: _Scale(
            ranks.get(name, numbers["r"]), float(alphas.get(name, numbers["lora_alpha"])), numbers["use_rslora"]
        )
        for name in adapted
    }
    one = _Scale(max(scale.rank for scale in scales.values()), numbers["lora_alpha"], numbers["use_rslora"])
    _unify(tensors, scales, one, weights_path)
    lora = _from_peft(tensors, one.rank, weights_path, names)
    _check_targets(fields, adapted, names.modules, config_path)
    config = AdapterConfig(
        rank=one.rank,
        alpha=one.factor * one.rank if one.rslora else one.alpha,
        dropout=numbers["lora_dropout"],
        target_modules=tuple(sorted({path[-2] for path in lora})),
        base_model_name=fields.get("base_model_name_or_path"),
    )
    return lora, config


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Rank of a pair of matrices, and what their product is multiplied with."""

    rank: int
    alpha: float
    rslora: bool

    @property
    def factor(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def _own(field: str, values: Mapping[str, Any], adapted: Collection[str], path: Path) -> dict[str, Any]:
    """Return the ranks or alphas that modules have of their own: of the first key that matches, as PEFT takes it."""
    matched = matching_ends(list(values), adapted, f"{path}: {field}")
    for pattern, names in matched.items():
        if not names:
            raise UserError(f"{path}: {field} names {pattern}, but {WEIGHTS_NAME} has no matrices for it.")
    return {name: values[pattern] for pattern, names in reversed(matched.items()) for name in names}


def _unify(tensors: dict[str, np.ndarray], scales: Mapping[str, _Scale], one: _Scale, path: Path) -> None:
    """Give all matrices one rank and one scale, in place."""
    for name, values in tensors.items():
        scale = scales[name.removeprefix(_PEFT_PREFIX).split(".lora_")[0]]
        matrix = next((m for m in _MATRICES if f".{m}." in name), "lora_A")
        _check_rank(name, values, matrix, scale.rank, path)
        if matrix == "lora_B" and scale.factor != one.factor:
            values = (values * (scale.factor / one.factor)).astype(np.float32)
        if scale.rank < one.rank:
            widths = [(0, 0), (0, 0)]
            widths[_RANK_AXIS[matrix]] = (0, one.rank - scale.rank)
            values = np.pad(values, widths)
        tensors[name] = values


def _check_rank(name: str, values: np.ndarray, matrix: str, rank: int, path: Path) -> None:
    if values.ndim != 2 or values.shape[_RANK_AXIS[matrix]] != rank or 0 in values.shape:
        needed = f"[{rank}, in]" if matrix == "lora_A" else f"[out, {rank}]"
        raise UserError(f"{path}: {name} has shape {list(values.shape)}, but r={rank} needs {needed}.")


def _config_fields(config: AdapterConfig, targets: list[str] | str, task_type: str) -> dict[str, Any]:
    """Make the contents of adapter_config.json."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": config.base_model_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else float(config.alpha),
        "lora_bias": False,
        "lora_dropout": float(config.dropout),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": int(config.rank),
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets,
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


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


def _to_peft(lora: Mapping[tuple[str, ...], Any], names: _Names) -> dict[str, np.ndarray]:
    """Unstack into PEFT's names, float32."""
    leaves = {leaf: matrix for matrix, leaf in _MATRICES.items()}
    tensors = {}
    for path in sorted(lora):
        template = names.to_peft.get(path[:-1])
        if template is None:
            raise UserError(f"Adapter: {'.'.join(path[:-1])} is no linear inside the layers of this model.")
        stacked = np.asarray(lora[path]).astype(np.float32)
        for layer, matrix in enumerate(stacked):
            name = f"{_PEFT_PREFIX}{template.replace(LAYER, str(layer))}.{leaves[path[-1]]}.weight"
            if not np.isfinite(matrix).all():
                raise UserError(f"Adapter: {name} holds NaN or Inf; it is not saved.")
            tensors[name] = np.ascontiguousarray(matrix)
    return tensors


def _save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # in place of the OSError that it had
        raise OSError(str(error)) from error


def _check_written(config_path: Path, weights_path: Path, lora: Mapping[tuple[str, ...], Any], names: _Names) -> None:
    """Re-read what was just written and compare it with what should be there, bit for bit."""
    again, _ = _read_adapter(config_path, weights_path, names)
    same = again.keys() == lora.keys() and all(
        np.array_equal(values, np.asarray(lora[path]).astype(np.float32)) for path, values in again.items()
    )
    if not same:
        raise UserError(f"The adapter written to {config_path.parent} reads back differently; check the disk.")


def _read_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json."""
    if not path.is_file():
        raise UserError(f"{path.parent} is no PEFT adapter: it has no {CONFIG_NAME}.")
    return read_json_object(path, "save the adapter again with PEFT")


def _check_config(fields: dict[str, Any], path: Path, task_type: str) -> "_Numbers":
    """Refuse every field that changes what the adapter computes in a way we do not; return those that are numbers."""

    def refuse(name: str, hint: str = "") -> UserError:
        return UserError(f"{path}: {name}={json.dumps(fields.get(name))} is not supported{hint}.")

    if fields.get("peft_type") != "LORA":
        raise refuse("peft_type", '; only "LORA" is')
    if fields.get("task_type") not in (task_type, None):
        raise refuse("task_type", f' for this model; only "{task_type}" is')
    if fields.get("bias", "none") != "none":
        raise refuse("bias", '; train with bias="none"')
    if fields.get("init_lora_weights", True) not in _HARMLESS_INITIALISATIONS:
        raise refuse("init_lora_weights", ": it changes the base weights; convert it to a plain LoRA with PEFT first")
    for name, value in fields.items():
        # Whatever is set beyond this would change the result, known to us or not. Zero is set: it may be a layer.
        if name not in _READ_FIELDS | _INERT_FIELDS and value is not False and value not in (None, "", [], {}):
            raise refuse(name)

    absent = {"lora_dropout": 0.0, "base_model_name_or_path": None}
    patterns = {name: fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    numbers: _Numbers = check_type(
        {**absent, **fields, **patterns, "use_rslora": fields.get("use_rslora") or False}, _NUMBERS, f"{path}: "
    )
    return numbers


_Rank = Annotated[int, Field(ge=1, le=2**16)]
# Beyond that, alpha / r times anything is no correction of a weight.
_Alpha = Annotated[float, Field(gt=0, le=1e6)]


class _Numbers(TypedDict):
    """Types of the fields of adapter_config.json that are read as they stand."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    r: _Rank
    lora_alpha: _Alpha
    rank_pattern: Annotated[dict[str, _Rank], Field(max_length=MOST)]
    alpha_pattern: Annotated[dict[str, _Alpha], Field(max_length=MOST)]
    use_rslora: bool
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    base_model_name_or_path: str | None


_NUMBERS = TypeAdapter(_Numbers)


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
    tensors: dict[str, np.ndarray], rank: int, path: Path, names: _Names
) -> dict[tuple[str, ...], np.ndarray]:
    """Stack PEFT's tensors by layer; empties `tensors`, so that the adapter is not held twice."""
    grouped: dict[tuple[str, str], dict[int, str]] = {}
    depth = names.layers
    for name, values in tensors.items():
        template, layer, matrix = _parse(name, path, names)
        _check_rank(name, values, matrix, rank, path)
        if not np.isfinite(values).all():
            raise UserError(f"{path}: {name} holds NaN or Inf.")
        grouped.setdefault((template, matrix), {})[layer] = name
        depth = max(depth, layer + 1)

    lora: dict[tuple[str, ...], np.ndarray] = {}
    for template in sorted({template for template, _ in grouped}):
        for matrix, leaf in _MATRICES.items():
            found = grouped.get((template, matrix), {})
            for layer in range(depth):
                if layer not in found:
                    missing = f"{_PEFT_PREFIX}{template.replace(LAYER, str(layer))}.{matrix}.weight"
                    raise UserError(
                        f"{path}: {missing} is missing; every layer, of which the model has {names.layers}, must have "
                        f"the same adapters."
                    )
            first = tensors[found[0]]
            for layer in range(1, depth):
                if tensors[found[layer]].shape != first.shape:
                    raise UserError(
                        f"{path}: {found[layer]} has shape {list(tensors[found[layer]].shape)}, "
                        f"but layer 0 has {list(first.shape)}."
                    )
            key = (*names.to_ours[template], leaf)
            if key in lora:
                raise UserError(f"{path}: matrices of {'.'.join(key[:-1])} are there under two names.")
            lora[key] = np.stack([tensors.pop(found[layer]) for layer in range(depth)])
    return lora


def _parse(name: str, path: Path, names: _Names) -> tuple[str, int, str]:
    """Read a tensor's name: the module with `{i}` for the layer, the layer, the matrix."""
    match = re.fullmatch(rf"{re.escape(_PEFT_PREFIX)}([\w.]+)\.(lora_[AB])\.weight", name)
    layer = re.search(r"\.(\d{1,9})\.", match[1]) if match else None
    if match and layer:
        template = f"{match[1][: layer.start(1)]}{LAYER}{match[1][layer.end(1) :]}"
        if template in names.to_ours:
            return template, int(layer[1]), match[2]
    raise UserError(f"{path}: {name} is not a LoRA matrix of a linear inside the model's layers.")


def _check_targets(
    fields: Mapping[str, Any], adapted: Collection[str], modules: Collection[Module], path: Path
) -> None:
    """Check that the linears that have matrices are those that PEFT would adapt by the configuration.

    `exclude_modules` may name what `target_modules` would match. Modules of parts of the model that are left out, such
    as a vision tower, are not looked at.
    """
    targets, excluded = fields.get("target_modules"), fields.get("exclude_modules")
    if excluded is not None and not _is_names_or_pattern(excluded):
        raise UserError(f"{path}: exclude_modules must be a list of up to {MOST} names, a string or null.")
    if not targets or not _is_names_or_pattern(targets):
        raise UserError(f"{path}: target_modules must be a non-empty list of up to {MOST} names, or a string.")
    ends = {end for name in adapted for end in ends_of(name)}
    for target in () if isinstance(targets, str) or excluded else targets:
        if target not in ends:
            raise UserError(f"{path}: target_modules names {target}, but {WEIGHTS_NAME} has no matrices for it.")
    wanted = targeted(targets, modules, f"{path}: target_modules")
    left_out = named(excluded or [], modules, f"{path}: exclude_modules")
    for module in modules:
        spelled = next((name for name in module.spellings if name in adapted), None)
        if spelled is None and module in wanted - left_out:
            raise UserError(
                f"{path}: target_modules names {module.spellings[-1]}, but {WEIGHTS_NAME} has no matrices for it."
            )
        if spelled is not None and module not in wanted - left_out:
            reason = "exclude_modules names" if module in wanted else "target_modules does not name"
            raise UserError(f"{path}: {WEIGHTS_NAME} has matrices for {spelled}, which {reason}.")


def _is_names_or_pattern(value: Any) -> bool:
    names = isinstance(value, list) and len(value) <= MOST and all(isinstance(name, str) for name in value)
    return names or isinstance(value, str)
