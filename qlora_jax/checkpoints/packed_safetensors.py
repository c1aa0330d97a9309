"""Linears that a safetensors checkpoint holds quantised: the tensors that make one weight, and how they are read.

    bitsandbytes, 4 bits   X.weight, X.weight.absmax, .quant_map, .quant_state.bitsandbytes__TYPE and, with double
                           quantisation, .nested_absmax, .nested_quant_map
    bitsandbytes, 8 bits   X.weight (int8), X.SCB, X.weight_format
    AWQ                    X.qweight, X.qzeros, X.scales
    GPTQ                   X.qweight, X.qzeros, X.scales, X.g_idx
    compressed-tensors     X.weight_packed, X.weight_scale and, for NVFP4, X.weight_global_scale, X.input_global_scale
    modelopt, NVFP4        X.weight (uint8), X.weight_scale, X.weight_scale_2, X.input_scale

Scales of activations are left alone: activations are not quantised here.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.quantization import (
    QuantizationConfig,
    QuantizedTensor,
    from_awq,
    from_bitsandbytes,
    from_gptq,
    from_mxfp4,
    from_nvfp4,
)

_STATE = ".quant_state.bitsandbytes__"
_LARGEST_STATE = 1 << 16


@runtime_checkable
class Stored(Protocol):
    """A tensor's entry in the header of a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        ...


Reader = Callable[[str], np.ndarray]
"""Name of a stored tensor -> its elements, of whatever type."""


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A quantised weight of a checkpoint.

    Attributes:
        shape: (N, K) of the weight.
        storage: how it is stored.
        parts: names of the tensors that make it, the one that holds its codes first.
        unpack: tensors by their names -> the weight.
    """

    shape: tuple[int, ...]
    storage: QuantizationConfig
    parts: tuple[str, ...]
    unpack: Callable[[Reader], QuantizedTensor]


def packed_weights(
    entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader
) -> tuple[dict[str, PackedWeight], frozenset[str]]:
    """Find the quantised weights among a checkpoint's tensors.

    Args:
        entries: all of them, by name.
        config: `quantization_config` of config.json.
        read: reads one; used for small ones that say how others are stored.

    Returns:
        {name of the weight, "X.weight": what makes it}, and the names of all tensors that are part of one.

    Raises:
        UserError: a weight that lacks one of its tensors, or whose tensors do not fit each other; names it.
    """
    method = config.get("quant_method") or ("bitsandbytes" if "bnb_4bit_quant_type" in config else None)
    find = {
        "bitsandbytes": _bitsandbytes,
        "awq": _awq,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
        "modelopt": _modelopt,
    }.get(str(method))
    if find is None:
        return {}, frozenset()
    found: dict[str, PackedWeight] = {}
    for name in entries:
        weight = find(name, entries, config, read)
        if weight is not None:
            module, packed = weight
            missing = [part for part in packed.parts if part not in entries]
            if missing:
                raise UserError(f"tensor {missing[0]} is missing, which {packed.parts[0]} needs.")
            found[f"{module}.weight"] = packed
    return found, frozenset(part for packed in found.values() for part in packed.parts)


_Found = tuple[str, PackedWeight] | None


def _present(entries: Mapping[str, Stored], module: str, *suffixes: str) -> tuple[str, ...]:
    return tuple(f"{module}.{suffix}" for suffix in suffixes if f"{module}.{suffix}" in entries)


def _matrix(entries: Mapping[str, Stored], name: str) -> tuple[int, int]:
    shape = entries[name].shape if name in entries else ()
    if len(shape) != 2:
        raise UserError(f"tensor {name} must have two dimensions, not shape {list(shape)}.")
    return shape[0], shape[1]


def _bitsandbytes(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if name.endswith(".SCB"):
        module = name.removesuffix(".SCB")
        weight = f"{module}.weight"

        def unpack_rows(read: Reader) -> QuantizedTensor:
            return from_bitsandbytes({"weight": read(weight), "SCB": read(name).reshape(-1)})

        parts = (weight, name, *_present(entries, module, "weight_format"))
        return module, PackedWeight(_matrix(entries, weight), QuantizationConfig("int8"), parts, unpack_rows)
    weight, mark, _ = name.partition(_STATE)
    if not mark:
        return None
    state = _state(name, entries, read)
    suffixes = ["absmax", "quant_map"] + (["nested_absmax", "nested_quant_map"] if "nested_offset" in state else [])
    parts = (weight, *(f"{weight}.{suffix}" for suffix in suffixes), name)

    def unpack(read: Reader) -> QuantizedTensor:
        tensors = {part.removeprefix(f"{weight}."): read(part) for part in parts[1:]}
        return from_bitsandbytes({"weight": read(weight), **tensors})

    try:
        storage = QuantizationConfig(state["quant_type"], state["blocksize"], "nested_offset" in state)
        shape = tuple(int(size) for size in state["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"tensor {name} is not the JSON that bitsandbytes writes: {error!r}.") from None
    return weight.removesuffix(".weight"), PackedWeight(shape, storage, parts, unpack)


def _state(name: str, entries: Mapping[str, Stored], read: Reader) -> dict[str, Any]:
    shape = entries[name].shape
    if len(shape) == 1 and shape[0] <= _LARGEST_STATE:
        try:
            state = json.loads(read(name).tobytes())
        except (ValueError, RecursionError):
            state = None
        if isinstance(state, dict):
            return state
    raise UserError(f"tensor {name} is not the JSON that bitsandbytes writes.")


def _groups(
    name: str, entries: Mapping[str, Stored], shape: tuple[int, int], unpack: Callable[..., QuantizedTensor], *more: str
) -> _Found:
    """A weight of AWQ or GPTQ, whose groups are as long as its scales say."""
    module = name.removesuffix(".qweight")
    scales = f"{module}.scales"
    groups = _matrix(entries, scales)[0]
    if not groups or shape[1] % groups:
        raise UserError(f"tensor {scales} of {groups} groups does not fit the {shape[1]} inputs of {name}.")
    suffixes = ("qweight", "qzeros", "scales", *more)
    parts = tuple(f"{module}.{suffix}" for suffix in suffixes)

    def read_all(read: Reader) -> QuantizedTensor:
        return unpack({suffix: read(part) for suffix, part in zip(suffixes, parts, strict=True)})

    return module, PackedWeight(shape, QuantizationConfig("uint4", shape[1] // groups), parts, read_all)


def _awq(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if not name.endswith(".qweight"):
        return None
    inputs, words = _matrix(entries, name)
    return _groups(name, entries, (8 * words, inputs), from_awq)


def _gptq(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if not name.endswith(".qweight"):
        return None
    words, outputs = _matrix(entries, name)
    version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
    g_idx = () if f"{name.removesuffix('.qweight')}.g_idx" not in entries else ("g_idx",)
    return _groups(name, entries, (outputs, 8 * words), lambda tensors: from_gptq(tensors, version=version), *g_idx)


def _compressed(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if not name.endswith(".weight_packed"):
        return None
    module = name.removesuffix(".weight_packed")
    rows, half = _matrix(entries, name)
    scales, factor = f"{module}.weight_scale", f"{module}.weight_global_scale"
    if config.get("format") == "mxfp4-pack-quantized":

        def unpack(read: Reader) -> QuantizedTensor:
            return from_mxfp4(read(name).reshape(rows, -1, 16), read(scales))

        return module, PackedWeight((rows, 2 * half), QuantizationConfig("mxfp4"), (name, scales), unpack)

    def unpack_scaled(read: Reader) -> QuantizedTensor:
        return from_nvfp4(read(name), read(scales), read(factor), convention="divide")

    parts = (name, scales, factor, *_present(entries, module, "input_global_scale"))
    return module, PackedWeight((rows, 2 * half), QuantizationConfig("nvfp4"), parts, unpack_scaled)


def _modelopt(name: str, entries: Mapping[str, Stored], config: Mapping[str, Any], read: Reader) -> _Found:
    if not name.endswith(".weight_scale_2"):
        return None
    module = name.removesuffix(".weight_scale_2")
    weight, scales = f"{module}.weight", f"{module}.weight_scale"
    rows, half = _matrix(entries, weight)

    def unpack(read: Reader) -> QuantizedTensor:
        return from_nvfp4(read(weight), read(scales), read(name), convention="multiply")

    parts = (weight, scales, name, *_present(entries, module, "input_scale"))
    return module, PackedWeight((rows, 2 * half), QuantizationConfig("nvfp4"), parts, unpack)
