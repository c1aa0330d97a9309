"""Reading of config.json's `quantization_config`: which linears a checkpoint holds quantised already, and how.

Methods: "bitsandbytes", "awq", "gptq", "compressed-tensors" (NVFP4, MXFP4), "modelopt" (NVFP4), and "qlora-jax", which
is written here once the tensors themselves have been looked at.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, TypedDict

from pydantic import ConfigDict, Field, TypeAdapter

from qlora_jax.errors import UserError
from qlora_jax.json_text import check_type
from qlora_jax.quantization import QuantizationConfig

FIELD = "quantization_config"
Stored = tuple[tuple[str, QuantizationConfig], ...]
"""(Name of a linear, its storage), in alphabetical order."""
_16_BIT = "give the model's 16-bit weights, which are quantised here"


def stored_linears(contents: Mapping[str, Any], linears: Iterable[str]) -> Stored:
    """Return the storage of the linears that a checkpoint's config.json says are quantised.

    Args:
        contents: of config.json.
        linears: names of the model's linears.

    Raises:
        UserError: a method, or a setting of one, that is not supported; names it.
    """
    field = contents.get(FIELD)
    if field is None:
        return ()
    if not isinstance(field, Mapping):
        raise UserError(f"config.json: {FIELD} must be an object, not {field!r}.")
    method = str(field.get("quant_method") or ("bitsandbytes" if "bnb_4bit_quant_type" in field else None))
    if method == "qlora-jax":
        return _own(field)
    if method not in _METHODS:
        raise UserError(
            f"config.json: {FIELD} has quant_method {method!r}, which is not supported; {_16_BIT}, or a checkpoint of "
            f"{', '.join(_METHODS)}."
        )
    storage, left_out = _METHODS[method](field)
    # A name in such a list is that of a module, the beginning or the end of one, or a pattern of them: what it says of
    # single layers is seen in the tensors.
    plain = {name for name in left_out if re.fullmatch(r"\w+", name)}
    return tuple((name, storage) for name in sorted(set(linears) - plain))


def with_stored(contents: Mapping[str, Any], stored: Stored) -> dict[str, Any]:
    """Return the contents of a config.json that say how linears are stored, whatever they said before."""
    others = {name: value for name, value in contents.items() if name != FIELD}
    if not stored:
        return others
    linears = {
        name: {"quant_type": each.quant_type, "block_size": each.block_size, "double_quant": each.double_quant}
        for name, each in stored
    }
    return {**others, FIELD: {"quant_method": "qlora-jax", "linears": linears}}


class _Storage(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]

    quant_type: str
    block_size: Annotated[int, Field(ge=0, lt=2**31)]
    double_quant: bool


class _Own(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # type: ignore[misc]

    quant_method: str
    linears: dict[str, _Storage]


class _BitsAndBytes(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    load_in_4bit: bool
    load_in_8bit: bool
    bnb_4bit_quant_type: str
    bnb_4bit_use_double_quant: bool
    llm_int8_skip_modules: list[str] | None


class _Groups(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    bits: int
    w_bit: int
    group_size: int
    q_group_size: int
    version: str
    desc_act: bool
    modules_to_not_convert: list[str] | None


class _Ignored(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    format: str | None
    quant_algo: str | None
    ignore: list[str] | None
    exclude_modules: list[str] | None


_OWN, _BNB = TypeAdapter(_Own), TypeAdapter(_BitsAndBytes)
_GROUPS, _IGNORED = TypeAdapter(_Groups), TypeAdapter(_Ignored)
_WHERE = f"config.json: {FIELD}."


def _own(field: Mapping[str, Any]) -> Stored:
    linears = check_type(field, _OWN, _WHERE)["linears"]
    return tuple((name, QuantizationConfig(**storage)) for name, storage in sorted(linears.items()))


def _bitsandbytes(field: Mapping[str, Any]) -> tuple[QuantizationConfig, list[str]]:
    checked = check_type(field, _BNB, _WHERE)
    left_out = checked.get("llm_int8_skip_modules") or []
    if checked.get("load_in_8bit"):
        return QuantizationConfig("int8"), left_out
    quant_type = checked.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in ("nf4", "fp4"):
        raise UserError(f"{_WHERE}bnb_4bit_quant_type must be nf4 or fp4, not {quant_type!r}.")
    return QuantizationConfig(quant_type, 64, checked.get("bnb_4bit_use_double_quant", False)), left_out


def _grouped(field: Mapping[str, Any]) -> tuple[QuantizationConfig, list[str]]:
    checked = check_type(field, _GROUPS, _WHERE)
    bits = checked.get("bits", checked.get("w_bit", 4))
    if bits != 4:
        raise UserError(f"{_WHERE}bits is {bits}; only 4 are supported; {_16_BIT}.")
    version = checked.get("version", "gemm").lower()
    if version != "gemm":
        raise UserError(f"{_WHERE}version is {version!r}; of AWQ's layouts only gemm is supported; {_16_BIT}.")
    if checked.get("desc_act"):
        raise UserError(
            f"{_WHERE}desc_act is true: inputs are out of the order of their groups (act-order), which is not "
            f"supported; {_16_BIT}, or a checkpoint with desc_act false."
        )
    size = checked.get("group_size", checked.get("q_group_size", 128))
    # -1: a group is a row, whose length the tensors say.
    return QuantizationConfig("uint4", size if size > 0 else 64), checked.get("modules_to_not_convert") or []


def _compressed(field: Mapping[str, Any]) -> tuple[QuantizationConfig, list[str]]:
    checked = check_type(field, _IGNORED, _WHERE)
    types = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}
    form = checked.get("format")
    if form not in types:
        raise UserError(f"{_WHERE}format is {form!r}; supported are {', '.join(types)}; {_16_BIT}.")
    return QuantizationConfig(types[form]), checked.get("ignore") or []


def _modelopt(field: Mapping[str, Any]) -> tuple[QuantizationConfig, list[str]]:
    checked = check_type(field, _IGNORED, _WHERE)
    if checked.get("quant_algo") != "NVFP4":
        raise UserError(f"{_WHERE}quant_algo is {checked.get('quant_algo')!r}; only NVFP4 is supported; {_16_BIT}.")
    return QuantizationConfig("nvfp4"), checked.get("ignore") or checked.get("exclude_modules") or []


_METHODS: Mapping[str, Callable[[Mapping[str, Any]], tuple[QuantizationConfig, list[str]]]] = MappingProxyType(
    {
        "bitsandbytes": _bitsandbytes,
        "awq": _grouped,
        "gptq": _grouped,
        "compressed-tensors": _compressed,
        "modelopt": _modelopt,
    }
)
