"""Linears that a safetensors checkpoint holds quantised: the tensors that make one weight, and how they are read.

    bitsandbytes, 4 bits   X.weight, X.weight.absmax, .quant_map, .quant_state.bitsandbytes__TYPE and, with double
                           quantisation, .nested_absmax, .nested_quant_map
    bitsandbytes, 8 bits   X.weight (int8), X.SCB, X.weight_format
    AWQ                    X.qweight, X.qzeros, X.scales
    GPTQ                   X.qweight, X.qzeros, X.scales, X.g_idx and X.bias of zeros where the model has no bias
    compressed-tensors     X.weight_packed, X.weight_scale and, for NVFP4, X.weight_global_scale, X.input_global_scale
    modelopt, NVFP4        X.weight (uint8), X.weight_scale, X.weight_scale_2, X.input_scale, X.k_scale, X.v_scale

Scales of activations and of keys and values are left alone: neither are quantised here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qlora_jax.checkpoints.model_files import DOWNLOAD_AGAIN
from qlora_jax.errors import UserError
from qlora_jax.models import DecoderConfig, base_tensors
from qlora_jax.models.quantization_config import quantization_method
from qlora_jax.quantization import (
    QuantizationConfig,
    QuantizedTensor,
    from_awq,
    from_bitsandbytes,
    from_gptq,
    from_mxfp4,
    from_nvfp4,
)
from qlora_jax.quantization.bitsandbytes import QuantState, quant_state

_STATE = ".quant_state.bitsandbytes__"
_LARGEST_STATE = 1 << 16
# Orders of codes beside row by row, for the matrix units of some GPUs.
_ORDERS: Mapping[Any, str] = MappingProxyType({1: "col32", 2: "col_turing", 3: "col_ampere"})


@runtime_checkable
class Stored(Protocol):
    """A tensor's entry in the header of a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        ...


@runtime_checkable
class Reader(Protocol):
    """Reads a stored tensor by its name, of whatever type; into memory that is given, if it fits."""

    def __call__(self, name: str, into: np.ndarray | None = None, /) -> np.ndarray:
        """Return the elements."""
        ...


@dataclasses.dataclass(frozen=True)
class PackedLinear:
    """A quantised weight of a checkpoint.

    Attributes:
        shape: (N, K) of the weight.
        storage: how it is stored.
        parts: names of the tensors that make it, the one that holds its codes first.
        unpack: (tensors by their names, memory for its codes or None) -> the weight.
    """

    shape: tuple[int, ...]
    storage: QuantizationConfig
    parts: tuple[str, ...]
    unpack: Callable[[Reader, np.ndarray | None], QuantizedTensor]


def packed_weights(
    entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader, model: DecoderConfig
) -> tuple[dict[str, PackedLinear], frozenset[str]]:
    """Find the quantised weights among a checkpoint's tensors.

    Args:
        entries: all of them, by name.
        config: `quantization_config` of config.json.
        read: reads one; used for small ones that say how others are stored.
        model: of config.json.

    Returns:
        {name of the weight, "X.weight": what makes it}, and the names of all tensors that are part of one.

    Raises:
        UserError: a weight that lacks one of its tensors, whose tensors do not fit each other, or that is stored in a
            way that is not supported; names it.
    """
    if not config:
        _refuse_unsaid(entries)
    method = quantization_method(config)
    find = {
        "bitsandbytes": _bitsandbytes,
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
        "modelopt": _modelopt,
    }.get(method)
    if find is None:
        return {}, frozenset()
    found: dict[str, PackedLinear] = {}
    for name in entries:
        weight = find(name, entries, config, read)
        if weight is not None:
            module, packed = weight
            missing = [part for part in packed.parts if part not in entries]
            if missing:
                raise _damage(f"tensor {missing[0]} is missing, which {packed.parts[0]} needs")
            found[f"{module}.weight"] = packed
    if method == "gptq":
        found = _with_empty_biases(found, entries, read, model)
    return found, frozenset(part for packed in found.values() for part in packed.parts)


def _damage(text: str) -> UserError:
    return UserError(f"{text}; {DOWNLOAD_AGAIN}.")


def _refuse_unsaid(entries: Mapping[str, Stored]) -> None:
    """Refuse weights that modelopt quantised without saying so in config.json."""
    for name in entries:
        if name.endswith((".weight_scale", ".weight_scale_2")):
            raise UserError(
                f"config.json has no quantization_config and no hf_quant_config.json is beside it, but tensor {name} "
                f"is part of a quantised weight; give the checkpoint with all its files, or the model's 16-bit weights."
            )


def _with_empty_biases(
    found: Mapping[str, PackedLinear], entries: Mapping[str, Stored], read: Reader, model: DecoderConfig
) -> dict[str, PackedLinear]:
    """Count biases of zeros among a weight's parts: AutoGPTQ writes one for every linear, the model's or not."""
    biases = {weight: f"{weight.removesuffix('.weight')}.bias" for weight in found}
    biases = {weight: bias for weight, bias in biases.items() if bias in entries}
    own = {spec.name for spec in base_tensors(model)} if biases else set()
    empty = {}
    for weight, bias in biases.items():
        if bias not in own:
            if read(bias).any():
                raise UserError(
                    f"tensor {bias} is not zero, but by config.json the model has no such bias; check that config.json "
                    f"and weights belong together."
                )
            empty[weight] = dataclasses.replace(found[weight], parts=(*found[weight].parts, bias))
    return {**found, **empty}


_Found = tuple[str, PackedLinear] | None


def _present(entries: Mapping[str, Stored], module: str, *suffixes: str) -> tuple[str, ...]:
    return tuple(f"{module}.{suffix}" for suffix in suffixes if f"{module}.{suffix}" in entries)


def _matrix(entries: Mapping[str, Stored], name: str) -> tuple[int, int]:
    shape = entries[name].shape if name in entries else ()
    if len(shape) != 2:
        raise _damage(f"tensor {name} must have two dimensions, not shape {list(shape)}")
    return shape[0], shape[1]


def _bitsandbytes(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if name.endswith(".SCB"):
        module = name.removesuffix(".SCB")
        weight = f"{module}.weight"

        def unpack_rows(read: Reader, codes: np.ndarray | None) -> QuantizedTensor:
            return from_bitsandbytes({"weight": read(weight, codes), "SCB": read(name).reshape(-1)})

        parts = (weight, name, *_present(entries, module, "weight_format"))
        _check_order(parts[2:], entries, read)
        return module, PackedLinear(_matrix(entries, weight), QuantizationConfig("int8"), parts, unpack_rows)
    weight, mark, _ = name.partition(_STATE)
    if not mark:
        return None
    state = _state(name, entries, read)
    double = state.offset is not None
    suffixes = ["absmax", "quant_map"] + (["nested_absmax", "nested_quant_map"] if double else [])
    parts = (weight, *(f"{weight}.{suffix}" for suffix in suffixes), name)

    def unpack(read: Reader, codes: np.ndarray | None) -> QuantizedTensor:
        tensors = {part.removeprefix(f"{weight}."): read(part) for part in parts[1:]}
        return from_bitsandbytes({"weight": read(weight, codes), **tensors})

    storage = QuantizationConfig(state.quant_type, state.block_size, double)
    return weight.removesuffix(".weight"), PackedLinear(state.shape, storage, parts, unpack)


def _state(name: str, entries: Mapping[str, Stored], read: Reader) -> QuantState:
    shape = entries[name].shape
    if len(shape) != 1 or shape[0] > _LARGEST_STATE:
        raise _damage(f"tensor {name} is not the JSON that bitsandbytes writes")
    try:
        return quant_state(read(name).tobytes(), f"tensor {name}")
    except UserError as error:
        raise _damage(str(error).removesuffix(".")) from None


def _check_order(names: tuple[str, ...], entries: Mapping[str, Stored], read: Reader) -> None:
    """Refuse codes of LLM.int8 that are not row by row, as `weight_format` says."""
    for name in names:
        if math.prod(entries[name].shape) != 1:
            raise _damage(f"tensor {name} must be one number, not of shape {list(entries[name].shape)}")
        order = read(name).item()
        if order != 0:
            raise UserError(
                f"tensor {name} is {order} ({_ORDERS.get(order, 'unknown')}); only 0, codes row by row, is supported; "
                f"give the model's 16-bit weights."
            )


def _groups(
    name: str, entries: Mapping[str, Stored], shape: tuple[int, int], unpack: Callable[..., QuantizedTensor], *more: str
) -> _Found:
    """A weight of AWQ or GPTQ, whose groups are as long as its scales say."""
    module = name.removesuffix(".qweight")
    scales = f"{module}.scales"
    groups = _matrix(entries, scales)[0]
    if not groups or shape[1] % groups:
        raise _damage(f"tensor {scales} of {groups} groups does not fit the {shape[1]} inputs of {name}")
    try:
        storage = QuantizationConfig("uint4", shape[1] // groups)
    except UserError as error:
        raise UserError(
            f"tensor {scales} makes groups of {shape[1] // groups} inputs, which are not supported: {error}"
        ) from None
    suffixes = ("qweight", "qzeros", "scales", *more)
    parts = tuple(f"{module}.{suffix}" for suffix in suffixes)

    def read_all(read: Reader, codes: np.ndarray | None) -> QuantizedTensor:
        return unpack({suffix: read(part) for suffix, part in zip(suffixes, parts, strict=True)}, codes=codes)

    return module, PackedLinear(shape, storage, parts, read_all)


def _awq(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if not name.endswith(".qweight"):
        return None
    inputs, words = _matrix(entries, name)
    return _groups(name, entries, (8 * words, inputs), from_awq)


def _gptq(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if not name.endswith(".qweight"):
        return None
    words, outputs = _matrix(entries, name)
    formats = (str(config.get(field)).lower() for field in ("checkpoint_format", "format"))
    version = 2 if "gptq_v2" in formats else 1
    g_idx = () if f"{name.removesuffix('.qweight')}.g_idx" not in entries else ("g_idx",)
    return _groups(name, entries, (outputs, 8 * words), functools.partial(from_gptq, version=version), *g_idx)


def _compressed(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if not name.endswith(".weight_packed"):
        return None
    module = name.removesuffix(".weight_packed")
    rows, half = _matrix(entries, name)
    scales, factor = f"{module}.weight_scale", f"{module}.weight_global_scale"
    if config.get("format") == "mxfp4-pack-quantized":
        if half % 16:
            raise _damage(f"tensor {name} has {2 * half} inputs, which are no whole blocks of 32")

        def unpack(read: Reader, codes: np.ndarray | None) -> QuantizedTensor:
            return from_mxfp4(read(name).reshape(rows, half // 16, 16), read(scales))

        return module, PackedLinear((rows, 2 * half), QuantizationConfig("mxfp4"), (name, scales), unpack)

    def unpack_scaled(read: Reader, codes: np.ndarray | None) -> QuantizedTensor:
        return from_nvfp4(read(name), read(scales), read(factor), convention="divide")

    parts = (name, scales, factor, *_present(entries, module, "input_global_scale"))
    return module, PackedLinear((rows, 2 * half), QuantizationConfig("nvfp4"), parts, unpack_scaled)


def _modelopt(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if not name.endswith(".weight_scale_2"):
        return None
    module = name.removesuffix(".weight_scale_2")
    weight, scales = f"{module}.weight", f"{module}.weight_scale"
    rows, half = _matrix(entries, weight)

    def unpack(read: Reader, codes: np.ndarray | None) -> QuantizedTensor:
        return from_nvfp4(read(weight), read(scales), read(name), convention="multiply")

    parts = (weight, scales, name, *_present(entries, module, "input_scale", "k_scale", "v_scale"))
    return module, PackedLinear((rows, 2 * half), QuantizationConfig("nvfp4"), parts, unpack)
