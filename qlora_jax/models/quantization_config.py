"""Reading of config.json's `quantization_config`: which linears a checkpoint holds quantised already, and how.

Methods: "bitsandbytes", "awq", "gptq", "compressed-tensors" (NVFP4, MXFP4) and "modelopt" (NVFP4), whose older exports
describe themselves in a file of their own, hf_quant_config.json.
"""

import dataclasses
import fnmatch
import functools
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, TypedDict

from pydantic import ConfigDict, Field, TypeAdapter

from qlora_jax.errors import UserError
from qlora_jax.json_text import check_type
from qlora_jax.patterns import MOST, check_amount, matching
from qlora_jax.quantization import QuantizationConfig

FIELD = "quantization_config"
MODELOPT_FILE = "hf_quant_config.json"
Stored = tuple[tuple[str, QuantizationConfig], ...]
"""(Name of a linear, its storage), in alphabetical order."""
_16_BIT = "give the model's 16-bit weights, which are quantised here"


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear of one layer.

    Attributes:
        kind: its name in the layer, such as "q_proj".
        spellings: of its whole name; versions of transformers may differ in it.
        inputs: length of a row.
    """

    kind: str
    spellings: tuple[str, ...]
    inputs: int


_Rule = Callable[[Sequence[str], Collection[str], str], frozenset[str]]
"""(Entries of a list, names of linears, beginning of messages) -> the names that an entry means."""


@dataclasses.dataclass(frozen=True)
class _Reading:
    """Contents of a `quantization_config`, checked.

    Attributes:
        storage: of the quantised linears; None for `uint4` in groups as long as a row.
        left_out: entries that name the linears that are not quantised.
        rule: the method's meaning of such entries.
        targets: entries that name those that are; None for all.
    """

    storage: QuantizationConfig | None
    left_out: Sequence[str]
    rule: _Rule
    targets: Sequence[str] | None = None


def stored_linears(contents: Mapping[str, Any], linears: Sequence[Linear]) -> Stored:
    """Return the storage of the linears that a checkpoint's config.json says are quantised, in all layers alike.

    Args:
        contents: of config.json.
        linears: of all layers.

    Raises:
        UserError: a method, or a setting of one, that is not supported; names it.
    """
    field = contents.get(FIELD)
    if field is None:
        return ()
    if not isinstance(field, Mapping):
        raise UserError(f"config.json: {FIELD} must be an object, not {field!r}.")
    method = quantization_method(field)
    if method not in _METHODS:
        raise UserError(
            f"config.json: {FIELD} has quant_method {method!r}, which is not supported; {_16_BIT}, or a checkpoint of "
            f"{', '.join(_METHODS)}."
        )
    _check_neutral(field)
    reading = _METHODS[method](field)
    names = [name for linear in linears for name in linear.spellings]
    out = _named(reading.rule, reading.left_out, names, f"{_WHERE}{_LEFT_OUT[method]}")
    if reading.targets is not None:
        out |= set(names) - _named(reading.rule, reading.targets, names, f"{_WHERE}config_groups.targets")
    found: dict[str, set[QuantizationConfig | None]] = {}
    for linear in linears:
        # Excluded under one spelling is excluded; the others are not what its program called it.
        quantised = out.isdisjoint(linear.spellings)
        found.setdefault(linear.kind, set()).add(_storage_of(linear, reading) if quantised else None)
    alike = {kind: next(iter(each)) for kind, each in found.items() if len(each) == 1}
    return tuple((kind, storage) for kind, storage in sorted(alike.items()) if storage is not None)


def _named(rule: _Rule, entries: Sequence[str], names: Collection[str], subject: str) -> frozenset[str]:
    check_amount(entries, names, subject)
    return rule(entries, names, subject)


def _storage_of(linear: Linear, reading: _Reading) -> QuantizationConfig:
    if reading.storage is not None:
        return reading.storage
    try:
        return QuantizationConfig("uint4", linear.inputs)
    except UserError as error:
        raise UserError(
            f"{_WHERE}group_size is -1, which makes groups of the {linear.inputs} inputs of {linear.kind}, which are "
            f"not supported: {error}"
        ) from None


def _by_transformers(entries: Sequence[str], names: Collection[str], subject: str) -> frozenset[str]:
    """The beginning or the end of a name, or a module above it, as versions of transformers have it."""
    boundary = r"(?:(?<=\.)|(?=\.|$)).*"
    begins = matching(entries, names, subject, before="(?:", after=f"){boundary}") if entries else {}
    found = {name for name in names for entry in entries if name.endswith(entry) or f".{entry}." in f".{name}"}
    return frozenset(found.union(*begins.values()))


def _by_awq(entries: Sequence[str], names: Collection[str], subject: str) -> frozenset[str]:
    """Any part of a name, as AutoAWQ has it, or what transformers takes it for."""
    inside = {name for name in names for entry in entries if entry in name}
    return _by_transformers(entries, names, subject) | inside


def _by_compressed_tensors(entries: Sequence[str], names: Collection[str], subject: str) -> frozenset[str]:
    """A name, a class of modules, or a regular expression behind "re:"."""
    expressions = [entry.removeprefix("re:") for entry in entries if entry.startswith("re:")]
    begins = matching(expressions, names, subject, before="(?:", after=").*") if expressions else {}
    found = set(names) if "Linear" in entries else set(names).intersection(entries)
    return frozenset(found.union(*begins.values()))


def _by_glob(entries: Sequence[str], names: Collection[str], subject: str) -> frozenset[str]:
    """A name, or one with `*` for any part of it."""
    return frozenset(name for name in names for entry in entries if fnmatch.fnmatchcase(name, entry))


def quantization_method(field: Mapping[str, Any]) -> str:
    """Return the method of a `quantization_config`; early files of bitsandbytes do not name theirs."""
    return str(field.get("quant_method") or ("bitsandbytes" if "bnb_4bit_quant_type" in field else None))


_Names = Annotated[list[str], Field(max_length=MOST)]


class _BitsAndBytes(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    load_in_4bit: bool
    load_in_8bit: bool
    bnb_4bit_quant_type: str
    bnb_4bit_use_double_quant: bool
    llm_int8_skip_modules: _Names | None


class _Groups(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    bits: int
    w_bit: int
    group_size: int
    q_group_size: int
    version: str
    checkpoint_format: str | None
    format: str | None
    desc_act: bool
    modules_to_not_convert: _Names | None


class _GroupWeights(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    num_bits: int | None
    type: str | None
    group_size: int | None


class _ConfigGroup(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    targets: _Names
    weights: _GroupWeights | None
    format: str | None


class _Ignored(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    config_groups: Annotated[dict[str, _ConfigGroup], Field(max_length=64)] | None
    format: str | None
    quant_algo: str | None
    ignore: _Names | None
    exclude_modules: _Names | None


_BNB, _GROUPS, _IGNORED = TypeAdapter(_BitsAndBytes), TypeAdapter(_Groups), TypeAdapter(_Ignored)
_WHERE = f"config.json: {FIELD}."


# Settings that would change what the tensors mean, and the only values under which they do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "dynamic": (None, False, {}),  # GPTQModel: other settings for some modules
        "is_marlin_format": (None, False),
        "pack_dtype": (None, "int32"),
        "transform_config": (None, {}),  # compressed-tensors: rotations of the inputs
    }
)


def _check_neutral(field: Mapping[str, Any]) -> None:
    """Refuse settings that are not implemented."""
    for name, allowed in _NEUTRAL.items():
        if name in field and field[name] not in allowed:
            raise UserError(f"{_WHERE}{name} is {reprlib.repr(field[name])}, which is not supported; {_16_BIT}.")
    sparsity = field.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") not in (None, "dense")):
        raise UserError(f"{_WHERE}sparsity_config is {reprlib.repr(sparsity)}; only dense is supported; {_16_BIT}.")


def _bitsandbytes(field: Mapping[str, Any]) -> _Reading:
    checked = check_type(field, _BNB, _WHERE)
    left_out = checked.get("llm_int8_skip_modules") or []
    if checked.get("load_in_8bit"):
        return _Reading(QuantizationConfig("int8"), left_out, _by_transformers)
    quant_type = checked.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in ("nf4", "fp4"):
        raise UserError(f"{_WHERE}bnb_4bit_quant_type must be nf4 or fp4, not {quant_type!r}.")
    storage = QuantizationConfig(quant_type, 64, checked.get("bnb_4bit_use_double_quant", False))
    return _Reading(storage, left_out, _by_transformers)


def _grouped(field: Mapping[str, Any], layouts: tuple[str, ...], rule: _Rule) -> _Reading:
    """Read settings of AWQ or GPTQ; `layouts` are the orders of codes that are supported."""
    checked = check_type(field, _GROUPS, _WHERE)
    bits = checked.get("bits", checked.get("w_bit", 4))
    if bits != 4:
        raise UserError(f"{_WHERE}bits is {bits}; only 4 are supported; {_16_BIT}.")
    # GPTQ's `version` is none of its layout.
    fields = ("checkpoint_format", "format", *(("version",) if "gemm" in layouts else ()))
    given = {name: checked[name] for name in fields if checked.get(name) is not None}
    for name, layout in given.items():
        if layout.lower() not in layouts:
            raise UserError(f"{_WHERE}{name} is {layout!r}; only {' and '.join(layouts)} are supported; {_16_BIT}.")
    if len({layout.lower() for layout in given.values()}) > 1:
        raise UserError(f"{_WHERE}checkpoint_format and format are {given}, which contradict each other; {_16_BIT}.")
    if checked.get("desc_act"):
        raise UserError(
            f"{_WHERE}desc_act is true: inputs are out of the order of their groups (act-order), which is not "
            f"supported; {_16_BIT}, or a checkpoint with desc_act false."
        )
    name = "q_group_size" if "group_size" not in checked and "q_group_size" in checked else "group_size"
    size = checked.get(name, 128)
    try:
        storage = None if size == -1 else QuantizationConfig("uint4", size)
    except UserError as error:
        raise UserError(f"{_WHERE}{name} is {size}, which is not supported: {error}") from None
    return _Reading(storage, checked.get("modules_to_not_convert") or [], rule)


def _compressed(field: Mapping[str, Any]) -> _Reading:
    checked = check_type(field, _IGNORED, _WHERE)
    types = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}
    form = checked.get("format")
    groups = (checked.get("config_groups") or {}).values()
    for each in (form, *(group["format"] for group in groups if group.get("format") is not None)):
        if each not in types or each != form:
            raise UserError(f"{_WHERE}format is {each!r}; supported are {', '.join(types)}, one of them; {_16_BIT}.")
    targets = [target for group in groups for target in group.get("targets") or ()]
    _check_weights(groups, types[form])
    return _Reading(
        QuantizationConfig(types[form]),
        checked.get("ignore") or [],
        _by_compressed_tensors,
        targets if groups else None,
    )


def _check_weights(groups: Iterable[_ConfigGroup], quant_type: str) -> None:
    """Refuse groups of linears whose weights are said to be of another type than their format."""
    meant = {"num_bits": 4, "type": "float", "group_size": QuantizationConfig(quant_type).block_size}
    for group in groups:
        for name, value in (group.get("weights") or {}).items():
            if value is not None and value != meant[name]:
                field = f"config_groups.weights.{name}"
                raise UserError(f"{_WHERE}{field} is {value!r}, but {meant[name]!r} for {quant_type}; {_16_BIT}.")


def _modelopt(field: Mapping[str, Any]) -> _Reading:
    checked = check_type(field, _IGNORED, _WHERE)
    if checked.get("quant_algo") != "NVFP4":
        raise UserError(f"{_WHERE}quant_algo is {checked.get('quant_algo')!r}; only NVFP4 is supported; {_16_BIT}.")
    _check_weights((checked.get("config_groups") or {}).values(), "nvfp4")
    left_out = checked.get("ignore") or checked.get("exclude_modules") or []
    return _Reading(QuantizationConfig("nvfp4"), left_out, _by_glob)


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], _Reading]] = MappingProxyType(
    {
        "bitsandbytes": _bitsandbytes,
        "awq": functools.partial(_grouped, layouts=("gemm",), rule=_by_awq),
        "gptq": functools.partial(_grouped, layouts=("gptq", "gptq_v2"), rule=_by_transformers),
        "compressed-tensors": _compressed,
        "modelopt": _modelopt,
    }
)
# Fields that name the linears that are not quantised.
_LEFT_OUT = {
    "bitsandbytes": "llm_int8_skip_modules",
    "awq": "modules_to_not_convert",
    "gptq": "modules_to_not_convert",
    "compressed-tensors": "ignore",
    "modelopt": "ignore",
}


class _ModeloptQuantization(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    quant_algo: str | None
    kv_cache_quant_algo: str | None
    group_size: int | None
    exclude_modules: _Names | None


class _ModeloptFile(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    quantization: _ModeloptQuantization


_MODELOPT_FILE = TypeAdapter(_ModeloptFile)
_MODELOPT_FIELDS = frozenset(_ModeloptQuantization.__annotations__)


def with_modelopt_file(field: Any, contents: Mapping[str, Any]) -> Any:
    """Return what config.json's `quantization_config` is beside modelopt's hf_quant_config.json.

    Args:
        field: of config.json; None if it has none.
        contents: of hf_quant_config.json.

    Raises:
        UserError: a quantisation that is not supported, or that contradicts config.json; names the file and the field.
    """
    where = f"{MODELOPT_FILE}: "
    said = check_type(contents, _MODELOPT_FILE, where)["quantization"]
    algorithm, group_size = said.get("quant_algo"), said.get("group_size")
    if algorithm not in (None, "NVFP4"):
        raise UserError(f"{where}quant_algo is {algorithm!r}; only NVFP4 is supported; {_16_BIT}.")
    if algorithm and group_size not in (None, 16):
        raise UserError(f"{where}group_size is {group_size}; NVFP4 has 16; {_16_BIT}.")
    for name in sorted(contents["quantization"].keys() - _MODELOPT_FIELDS):
        if contents["quantization"][name] not in (None, False, [], {}):
            shown = reprlib.repr(contents["quantization"][name])
            raise UserError(f"{where}{name} is {shown}, which is not supported; {_16_BIT}.")
    if isinstance(field, Mapping):
        own = field.get("quant_algo") if quantization_method(field) == "modelopt" else quantization_method(field)
        if own != algorithm:
            raise UserError(f"{where}quant_algo is {algorithm!r}, but config.json has {FIELD} of {own!r}; {_16_BIT}.")
        excluded = field.get("ignore") or field.get("exclude_modules") or []
        if sorted(map(str, excluded)) != sorted(said.get("exclude_modules") or []):
            raise UserError(
                f"{where}exclude_modules and {FIELD} of config.json name different modules; download the model again, "
                f"so that the two belong together."
            )
    if field is not None or algorithm is None:
        return field
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": said.get("exclude_modules"),
        "kv_cache_scheme": said.get("kv_cache_quant_algo"),
    }


def unused_settings(field: Mapping[str, Any]) -> str:
    """Describe for people the settings of a `quantization_config` that concern serving alone; "" if there are none."""
    scheme = field.get("kv_cache_scheme") or field.get("kv_cache_quant_algo")
    if not scheme:
        return ""
    if isinstance(scheme, Mapping):
        scheme = f"{scheme.get('type')}{scheme.get('num_bits')}"
    return f"keys and values are not quantised (kv_cache_scheme {reprlib.repr(scheme)} is for serving)"
