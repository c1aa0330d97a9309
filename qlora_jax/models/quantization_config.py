"""Reading of config.json's `quantization_config`: which linears a checkpoint holds quantised already, and how.

Methods: "bitsandbytes", "awq", "gptq", "compressed-tensors" (NVFP4, MXFP4) and "modelopt" (NVFP4).
"""

import functools
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypedDict

from pydantic import ConfigDict, TypeAdapter

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
    method = quantization_method(field)
    if method not in _METHODS:
        raise UserError(
            f"config.json: {FIELD} has quant_method {method!r}, which is not supported; {_16_BIT}, or a checkpoint of "
            f"{', '.join(_METHODS)}."
        )
    _check_neutral(field)
    storage, left_out = _METHODS[method](field)
    # A name in such a list is that of a module, the beginning or the end of one, or a pattern of them: what it says of
    # single layers is seen in the tensors.
    plain = {name for name in left_out if re.fullmatch(r"\w+", name)}
    return tuple((name, storage) for name in sorted(set(linears) - plain))


def quantization_method(field: Mapping[str, Any]) -> str:
    """Return the method of a `quantization_config`; early files of bitsandbytes do not name theirs."""
    return str(field.get("quant_method") or ("bitsandbytes" if "bnb_4bit_quant_type" in field else None))


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
    checkpoint_format: str | None
    format: str | None
    desc_act: bool
    modules_to_not_convert: list[str] | None


class _Ignored(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]

    format: str | None
    quant_algo: str | None
    ignore: list[str] | None
    exclude_modules: list[str] | None


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


def _bitsandbytes(field: Mapping[str, Any]) -> tuple[QuantizationConfig, list[str]]:
    checked = check_type(field, _BNB, _WHERE)
    left_out = checked.get("llm_int8_skip_modules") or []
    if checked.get("load_in_8bit"):
        return QuantizationConfig("int8"), left_out
    quant_type = checked.get("bnb_4bit_quant_type", "fp4")
    if quant_type not in ("nf4", "fp4"):
        raise UserError(f"{_WHERE}bnb_4bit_quant_type must be nf4 or fp4, not {quant_type!r}.")
    return QuantizationConfig(quant_type, 64, checked.get("bnb_4bit_use_double_quant", False)), left_out


def _grouped(field: Mapping[str, Any], layouts: tuple[str, ...]) -> tuple[QuantizationConfig, list[str]]:
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
        # -1: a group is a row, whose length the tensors say.
        storage = QuantizationConfig("uint4", 64 if size == -1 else size)
    except UserError as error:
        raise UserError(f"{_WHERE}{name} is {size}, which is not supported: {error}") from None
    return storage, checked.get("modules_to_not_convert") or []


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
        "awq": functools.partial(_grouped, layouts=("gemm",)),
        "gptq": functools.partial(_grouped, layouts=("gptq", "gptq_v2")),
        "compressed-tensors": _compressed,
        "modelopt": _modelopt,
    }
)
