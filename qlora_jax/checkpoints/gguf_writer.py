"""Merged models as GGUF files: llama.cpp's names, metadata, layouts and quantisations, written tensor by tensor.

The inverse of `qlora_jax.checkpoints.gguf_source`, which reads a file's header back before any weight is written: what
GGUF cannot say of a model is refused. Matrices are quantised to the bytes that llama.cpp's own quantiser makes.

Kept in more bits than a 4-bit file's name says are embedding and head: Q8_0. llama.cpp's quantiser takes Q6_K for the
head, whose errors reach every logit, and Q8_0 where rows are no multiple of 256; Q6_K has no quantiser here.

Memory: that of `qlora_jax.checkpoints.merging`, and what is stored of one tensor.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
)

from qlora_jax.checkpoints.base_weights import BaseWeights
from qlora_jax.checkpoints.gguf_source import ROPE_FREQS, GGUFSource, interleaved
from qlora_jax.checkpoints.gguf_tokenizer import tokenizer_metadata
from qlora_jax.checkpoints.hf_export import round_to
from qlora_jax.checkpoints.journal import Journal, say_continuing
from qlora_jax.checkpoints.merging import Adapter, Codec, MergedTensor, merged_tensors, stored
from qlora_jax.checkpoints.streaming import Progress
from qlora_jax.checkpoints.tensor_files import TensorFiles
from qlora_jax.errors import UserError
from qlora_jax.models import GGUF, DecoderConfig, Name, TensorSpec, family_of, names
from qlora_jax.nn.rotary import RotaryConfig
from qlora_jax.quantization import dequantize_on_host, from_gguf, quantize, to_gguf

_KIND = GGMLQuantizationType
_PLAIN = {_KIND.F32: "float32", _KIND.F16: "float16", _KIND.BF16: "bfloat16"}


class GGUFFormat(NamedTuple):
    """Storage of a GGUF file's weights.

    Attributes:
        linear: type of linear weights.
        other: type of embedding and head.
        file_type: `general.file_type`.
    """

    linear: GGMLQuantizationType
    other: GGMLQuantizationType
    file_type: LlamaFileType


GGUF_FORMATS: Mapping[str, GGUFFormat] = MappingProxyType(
    {
        "F16": GGUFFormat(_KIND.F16, _KIND.F16, LlamaFileType.MOSTLY_F16),
        "BF16": GGUFFormat(_KIND.BF16, _KIND.BF16, LlamaFileType.MOSTLY_BF16),
        "Q8_0": GGUFFormat(_KIND.Q8_0, _KIND.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        "Q4_0": GGUFFormat(_KIND.Q4_0, _KIND.Q8_0, LlamaFileType.MOSTLY_Q4_0),
        "Q4_1": GGUFFormat(_KIND.Q4_1, _KIND.Q8_0, LlamaFileType.MOSTLY_Q4_1),
    }
)
"""Name, as in file names -> storage."""


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A tensor of the file.

    Attributes:
        name: llama.cpp's.
        kind: how it is stored.
        layout: llama.cpp's change of its values, see `qlora_jax.models.Name`.
        shape: in row-major order.
    """

    name: str
    kind: GGMLQuantizationType
    layout: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        elements, block_bytes = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape, dtype=np.int64)) // elements * block_bytes


def write_gguf(
    base: BaseWeights,
    adapter: Adapter,
    file: Path,
    storage: GGUFFormat,
    *,
    metadata: Mapping[str, Any],
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> dict[str, float]:
    """Write a merged model as a GGUF file.

    Args:
        base: the weights to merge into.
        adapter: what is merged.
        file: to write.
        storage: one of `GGUF_FORMATS`.
        metadata: what is not, or not as in, the base's own: `general.name` and the like.
        progress: see `Progress`.
        journal: of the file's directory, to go on after the last tensor that an earlier process wrote there.

    Returns:
        Module -> share of its change that survives, see `surviving_share`.

    Raises:
        UserError: a family, a setting or a tokenizer that GGUF does not have, or values that overflow; names it. A disk
            without room.
    """
    metadata = {
        **gguf_metadata(base),
        **metadata,
        "general.file_type": int(storage.file_type),
        "general.quantization_version": GGML_QUANT_VERSION,
    }
    table = _name_table(base.config)
    plan = [_planned(spec, table, storage) for spec in base.specs]
    freqs = rope_freqs(base.config)
    first = [] if freqs is None else [_Planned(ROPE_FREQS, _KIND.F32, "as_is", freqs.shape)]
    header = _header(gguf_of(base.config, base.path).architecture, metadata, [*first, *plan])
    tensors = TensorFiles(file.parent, lambda count: [file.name][:count], journal, align=GGUF_DEFAULT_ALIGNMENT)
    try:
        tensors.check_room(header.nbytes + sum(planned.nbytes for planned in (*first, *plan)))
        done = len(tensors.written)
        say_continuing(done, len(plan))
        if not done:  # recorded with the first tensor
            tensors.append(0, "header", header)
            if freqs is not None:
                tensors.append(0, ROPE_FREQS, freqs)
        for planned, tensor in zip(plan[done:], merged_tensors(base, adapter, progress, done), strict=True):
            shares: dict[str, float] = {}
            tensors.append(0, planned.name, _payload(planned, tensor, base.config, shares))
            tensors.commit(shares)
        tensors.publish()
    finally:
        tensors.close()
    return tensors.shares


def gguf_metadata(base: BaseWeights) -> dict[str, Any]:
    """Return the metadata of a model and its tokenizer, whatever the type of its weights.

    Raises:
        UserError: a family, a setting or a tokenizer that GGUF does not have; names it.
    """
    metadata = model_metadata(base.config, base.path, base.specs)
    return metadata | tokenizer_metadata(base.path, base.config.vocab_size)


def gguf_of(config: DecoderConfig, model: Path) -> GGUF:
    """Return a family's description in llama.cpp's files; UserError if it has none."""
    family = family_of(config)
    if family.gguf is None:
        raise UserError(
            f"{model} is a {config.architecture}, which GGUF files here do not hold; export to safetensors."
        )
    return family.gguf


def model_metadata(config: DecoderConfig, model: Path, specs: tuple[TensorSpec, ...]) -> dict[str, Any]:
    """Return the metadata of a model without those of its tokenizer and file: key -> value.

    Args:
        config: of the model.
        model: its path, for messages.
        specs: its tensors.

    Raises:
        UserError: a file with them would be read as another model; names what it would differ in.
    """
    gguf = gguf_of(config, model)
    rotary = dict(config.rotary)[gguf.rope]
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": rotary.theta,
        "vocab_size": config.vocab_size,
        **_scaling(rotary),
        **gguf.written(config),
    }
    metadata = {f"{gguf.architecture}.{key}": value for key, value in values.items()}
    metadata = {"general.type": "model", **metadata}
    _check_read_back(config, model, metadata, specs)
    return metadata


def _scaling(rotary: RotaryConfig) -> dict[str, Any]:
    """Metadata of a rotary scaling; LLaMA 3's is a tensor."""
    parameters = dict(rotary.parameters)
    if rotary.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    if rotary.kind != "yarn":
        return {}
    values = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(parameters["factor"]),
        "rope.scaling.original_context_length": parameters["original_max_position_embeddings"],
    }
    for key in ("beta_fast", "beta_slow"):
        if key in parameters:
            values[f"rope.scaling.yarn_{key}"] = float(parameters[key])
    return values


def rope_freqs(config: DecoderConfig) -> np.ndarray | None:
    """Return what divides the frequencies under LLaMA 3's scaling, float32 [head_dim / 2]; None without that.

    Long wavelengths are divided by `factor`, short ones are left, those between interpolated (transformers'
    modeling_rope_utils.py: `_compute_llama3_parameters`; llama.cpp's conversion/llama.py: `generate_extra_tensors`).
    """
    rotary = dict(config.rotary).get("default")
    if rotary is None or rotary.kind != "llama3":
        return None
    values = dict(rotary.parameters)
    half = rotary.head_dim // 2
    wavelength = 2 * np.pi * rotary.theta ** (np.arange(half) / half)
    turns = values["original_max_position_embeddings"] / wavelength
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / values["factor"] + smooth)).astype(np.float32)


def _check_read_back(
    config: DecoderConfig, model: Path, metadata: Mapping[str, Any], specs: tuple[TensorSpec, ...]
) -> None:
    """Write a file without weights, read it, and refuse a model that comes out as another."""
    table, freqs = _name_table(config), rope_freqs(config)
    with tempfile.TemporaryDirectory() as directory:
        probe = Path(directory) / "probe.gguf"
        writer = GGUFWriter(probe, gguf_of(config, model).architecture)
        add_metadata(writer, metadata)
        if freqs is not None:
            writer.add_tensor(ROPE_FREQS, freqs)
        for spec in specs:
            writer.add_tensor(_gguf_name(spec, table).name, np.zeros(1, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        again = GGUFSource(probe).config
    told = {"architecture", "eos_token_ids", "source", "stored"}
    for field in dataclasses.fields(DecoderConfig):
        before, after = getattr(config, field.name), getattr(again, field.name)
        if field.name not in told and before != after:
            raise UserError(
                f"{model} has {field.name} that a GGUF file cannot express ({_differing(before, after)}); export to "
                f"safetensors."
            )


def _differing(before: Any, after: Any) -> str:
    """Show the first of several values that differs."""
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        before, after = next((b, a) for b, a in zip(before, after, strict=True) if b != a)
    return f"{before}, which would be read as {after}"


def _name_table(config: DecoderConfig) -> dict[str, Name]:
    return {name.ours: name for name in names(config)}


def _gguf_name(spec: TensorSpec, table: Mapping[str, Name]) -> _Planned:
    """Name a tensor as llama.cpp does; its kind is not yet decided."""
    name = table[".".join(spec.path[:-1])]
    assert name.gguf is not None
    module = name.gguf.replace("{i}", str(spec.layer))
    return _Planned(f"{module}.{spec.path[-1]}", _KIND.F32, name.gguf_layout, spec.shape)


def _planned(spec: TensorSpec, table: Mapping[str, Name], storage: GGUFFormat) -> _Planned:
    planned = _gguf_name(spec, table)
    if len(spec.shape) == 1:  # norms and biases, of which llama.cpp reads no other type
        return planned
    kind = storage.linear if spec.quantized else storage.other
    if spec.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = _KIND.F16  # as llama.cpp's converter does with rows that are no whole blocks
    return dataclasses.replace(planned, kind=kind)


def codecs(config: DecoderConfig, storage: GGUFFormat) -> Callable[[TensorSpec], Codec[np.ndarray]]:
    """Return the function from a base tensor of a model to its storage, rows in the base's order."""
    table = _name_table(config)
    return lambda spec: _codec(_planned(spec, table, storage), spec.name)


def _codec(planned: _Planned, name: str) -> Codec[np.ndarray]:
    added = np.float32(planned.layout == "plus_one")

    def store(weight: np.ndarray) -> np.ndarray:
        return encode(weight.astype(np.float32) + added if added else weight, planned.kind, name)

    def load(rows: np.ndarray) -> np.ndarray:
        return decode(rows, planned.kind) - added if added else decode(rows, planned.kind)

    return Codec(store, load)


def _payload(planned: _Planned, tensor: MergedTensor, config: DecoderConfig, shares: dict[str, float]) -> np.ndarray:
    """Store a weight: its rows, in llama.cpp's order."""
    rows = stored(tensor, _codec(planned, tensor.spec.name), shares)
    return interleaved(rows, config.head_dim) if planned.layout == "interleaved_heads" else rows


def encode(weight: np.ndarray, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """Return a float weight as a GGUF tensor stores it: rows of floats, or of bytes."""
    if kind in _PLAIN:
        return round_to(weight, _PLAIN[kind], name)
    return to_gguf(quantize(weight, quant_type=kind.name.lower(), name=name))


def decode(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the float32 weight that `encode` stored."""
    if kind in _PLAIN:
        return rows.astype(np.float32, copy=False)
    return dequantize_on_host(from_gguf(rows, kind.name.lower()))


def add_metadata(writer: GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Add metadata, each value in the type that llama.cpp's converter gives it."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _header(architecture: str, metadata: Mapping[str, Any], plan: Sequence[_Planned]) -> np.ndarray:
    """Return the bytes of a file before its first tensor, uint8."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "header.gguf"
        writer = GGUFWriter(file, architecture)
        try:
            add_metadata(writer, metadata)
            for planned in plan:
                # Of an element type that is not uint8, the writer takes the shape as it is.
                writer.add_tensor_info(
                    planned.name, planned.shape, np.dtype(np.float32), planned.nbytes, raw_dtype=planned.kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        return np.fromfile(file, np.uint8)
