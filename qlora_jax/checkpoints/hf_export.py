"""Merged models as Hugging Face directories: 16- or 32-bit safetensors, or bitsandbytes' 4-bit checkpoint.

Memory: that of `qlora_jax.checkpoints.merging`, and what is stored of one tensor.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.base_weights import BaseWeights
from qlora_jax.checkpoints.companions import write_companions
from qlora_jax.checkpoints.journal import Journal, say_continuing
from qlora_jax.checkpoints.merging import Adapter, Codec, merged_tensors, stored
from qlora_jax.checkpoints.model_files import read_json_object
from qlora_jax.checkpoints.safetensors_writer import SafetensorsWriter
from qlora_jax.checkpoints.streaming import Progress, abstract_tensor
from qlora_jax.errors import UserError
from qlora_jax.models import TensorSpec
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor, dequantize_on_host, quantize, to_bitsandbytes

# Fields of config.json that say how the weights beside it are stored.
_OF_THE_WEIGHTS = ("dtype", "torch_dtype", "quantization_config")
_GENERATION_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
BITSANDBYTES_BLOCK = 64
"""The block size of bitsandbytes checkpoints: transformers cannot be told another."""


@dataclasses.dataclass(frozen=True)
class HuggingFaceFormat:
    """Storage of a merged model in Hugging Face's format.

    Attributes:
        dtype: "bfloat16", "float16" or "float32": of all weights that are not quantised.
        max_shard_bytes: most data of a safetensors file.
        quantization: of linear weights, for a bitsandbytes checkpoint: nf4 or fp4 in blocks of 64; None for `dtype`.
    """

    dtype: str = "bfloat16"
    max_shard_bytes: int = 5 * 10**9
    quantization: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        """Refuse what bitsandbytes' loader in transformers does not read."""
        if self.quantization is not None and (
            self.quantization.quant_type not in ("nf4", "fp4") or self.quantization.block_size != BITSANDBYTES_BLOCK
        ):
            raise UserError(
                f"transformers reads bitsandbytes checkpoints of nf4 or fp4 in blocks of {BITSANDBYTES_BLOCK}, not of "
                f"{self.quantization}; set `block_size={BITSANDBYTES_BLOCK}`."
            )


def write_hugging_face(
    base: BaseWeights,
    adapter: Adapter,
    directory: Path,
    storage: HuggingFaceFormat,
    progress: Progress | None = None,
    *,
    journal: Journal | None = None,
) -> dict[str, float]:
    """Write a merged model: safetensors, config.json, generation_config.json, tokenizer and chat template.

    The tensors of a bitsandbytes checkpoint are byte for byte those that transformers and bitsandbytes make of the
    safetensors in `storage.dtype`: a merged weight is rounded to that before it is quantised.

    Args:
        base: the weights to merge into.
        adapter: what is merged.
        directory: an existing directory to write to.
        storage: how.
        progress: see `Progress`.
        journal: of the directory, to go on after the last tensor that an earlier process wrote there.

    Returns:
        Module -> share of its change that survives, see `surviving_share`.

    Raises:
        UserError: values that do not fit the dtype, or a converted base that lacks parts of the model; names them. A
            disk without room.
    """
    check_parts(base)
    names = [spec.name for spec in base.specs] + list(base.other_parts)
    if storage.quantization is not None:
        names = [f"{name}{suffix}" for name in names for suffix in _SUFFIXES]
    writer = SafetensorsWriter(directory, names, storage.max_shard_bytes, journal)
    try:
        writer.files.check_room(_least_bytes(base, storage))
        done = len(writer.files.written)
        say_continuing(done, len(base.specs) + len(base.other_parts))
        write_companions(base.path, base.config, directory)
        _write_configs(base, directory, storage)
        for tensor in merged_tensors(base, adapter, progress, done):
            shares: dict[str, float] = {}
            name, kept = tensor.spec.name, stored(tensor, codec(tensor.spec, storage), shares)
            for suffix, array in (
                to_bitsandbytes(kept) if isinstance(kept, QuantizedTensor) else {"weight": kept}
            ).items():
                writer.add(name if suffix == "weight" else f"{name}.{suffix}", array)
            writer.commit(shares)
        for name, weight in base.other_weights(max(0, done - len(base.specs))):
            writer.add(name, round_to(weight, storage.dtype, name))
            writer.commit()
        writer.finish()
    finally:
        writer.close()
    return writer.files.shares


def check_parts(base: BaseWeights) -> None:
    """Refuse a base that lacks parts of the model; UserError names the model."""
    if not base.kept_parts:
        raise UserError(
            f"{base.path} is the text part of a {base.config.architecture} only; give the checkpoint it was converted "
            f"from as `model`, whose other parts belong in the merged model."
        )


def _least_bytes(base: BaseWeights, storage: HuggingFaceFormat) -> int:
    """Count the bytes of the weights; a bitsandbytes checkpoint has some small tensors more."""
    dtype = jnp.dtype(storage.dtype)
    count = dtype.itemsize * sum(map(math.prod, base.other_parts.values()))
    for spec in base.specs:
        if storage.quantization is None or not spec.quantized:
            count += dtype.itemsize * math.prod(spec.shape)
        else:
            leaves = jax.tree.leaves(abstract_tensor(spec, storage.quantization, dtype, ()))
            count += sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return count


def codec(spec: TensorSpec, storage: HuggingFaceFormat) -> Codec[Any]:
    """Return the storage of a base tensor: arrays of `storage.dtype` or, of a linear weight, quantised ones."""
    if storage.quantization is None or not spec.quantized:
        return Codec(functools.partial(round_to, dtype=storage.dtype, name=spec.name), _as_float32)
    quantized = functools.partial(_quantized, storage=storage, quantization=storage.quantization, name=spec.name)
    return Codec(quantized, dequantize_on_host)


_SUFFIXES = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")


def round_to(weight: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Round a weight to a floating dtype.

    Raises:
        UserError: a value overflows; names the tensor.
    """
    with np.errstate(over="ignore"):
        rounded = weight.astype(jnp.dtype(dtype), copy=False)
    narrows = jnp.finfo(rounded.dtype).maxexp < jnp.finfo(weight.dtype).maxexp
    if narrows and not np.isfinite(rounded).all():
        raise UserError(f"tensor {name} has values that do not fit {dtype}; export to bfloat16.")
    return rounded


def _as_float32(weight: np.ndarray) -> np.ndarray:
    return weight.astype(np.float32, copy=False)


def _quantized(
    weight: np.ndarray, storage: HuggingFaceFormat, quantization: QuantizationConfig, name: str
) -> QuantizedTensor:
    return quantize(
        round_to(weight, storage.dtype, name),
        quant_type=quantization.quant_type,
        block_size=quantization.block_size,
        double_quant=quantization.double_quant,
        name=name,
    )


def _write_configs(base: BaseWeights, directory: Path, storage: HuggingFaceFormat) -> None:
    """Bring config.json up to date with the weights, and see that there is a generation_config.json."""
    path = directory / "config.json"
    fields = _with_dtype(read_json_object(path, "the model directory must have one"), storage.dtype)
    if storage.quantization is not None:
        fields["quantization_config"] = _quantization_config(storage, base)
    _write_json(path, fields)
    generation = directory / "generation_config.json"
    if not generation.is_file():
        _write_json(generation, {name: fields[name] for name in _GENERATION_FIELDS if fields.get(name) is not None})


def _with_dtype(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the fields of a config.json whose weights have that dtype, nested ones of its parts too."""
    kept = {name: value for name, value in fields.items() if name not in _OF_THE_WEIGHTS}
    nested = {
        name: _with_dtype(value, dtype)
        for name, value in kept.items()
        if isinstance(value, Mapping) and ("dtype" in value or "torch_dtype" in value)
    }
    return {**kept, **nested, "dtype": dtype}


def _quantization_config(storage: HuggingFaceFormat, base: BaseWeights) -> dict[str, Any]:
    """Make the quantization_config that transformers writes for such a checkpoint (BitsAndBytesConfig)."""
    quantization = storage.quantization
    assert quantization is not None
    # transformers keeps the head as it is by itself only while nothing is listed.
    others = sorted({name.partition(".")[0] if "." in name else name for name in base.other_parts})
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": storage.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quantization.quant_type,
        "bnb_4bit_use_double_quant": quantization.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [*others, "lm_head"] if others else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
