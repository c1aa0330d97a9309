"""GGUF files of the LLaMA architecture, under Hugging Face names and layout.

Headers, element types and dequantisation come from the `gguf` package. Weights are read with plain file reads: pages of
the mapping that `gguf.GGUFReader` offers would count as resident memory of this process.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from qlora_jax.checkpoints.model_files import DOWNLOAD_AGAIN, read_exactly
from qlora_jax.errors import UserError

_PLAIN_DTYPES = {
    GGMLQuantizationType.F64: np.dtype(np.float64),
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_INTEGERS = {
    GGMLQuantizationType.I8,
    GGMLQuantizationType.I16,
    GGMLQuantizationType.I32,
    GGMLQuantizationType.I64,
}
# Rows dequantised at a time: bounds the temporaries of `gguf.quants` whatever the tensor's size.
_CHUNK_ELEMENTS = 1 << 22

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Entry:
    gguf_name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # from the start of the file, bytes
    nbytes: int


def read_metadata(path: str | Path) -> Mapping[str, Any]:
    """Key-value metadata of a GGUF file; arrays become lists. Shared between callers: not to be changed.

    Raises:
        UserError: a file that is not GGUF, is truncated, big-endian or of an unknown version.
    """
    return _header(Path(path))[0]


class GGUFSource:
    """`TensorSource` of a GGUF file (`general.architecture` "llama").

    Shapes are reversed to [out, in]; rows of Q and K, which llama.cpp stores for interleaved rotary embedding, are put
    back in Hugging Face's half-split order. Quantised types are dequantised to float32 one tensor at a time.

    Raises:
        UserError: names the file and the architecture, metadata key or tensor that is not supported or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata, entries = _header(self.path)
        self._entries = {_hf_name(name): entry for name, entry in entries.items() if name != _ROPE_FREQS}
        rope_freqs = _read_entry(self.path, entries[_ROPE_FREQS]) if _ROPE_FREQS in entries else None
        self.config: dict[str, Any] = _config(self.path, self.metadata, self._entries, rope_freqs)
        self._heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }
        kinds = sorted({entry.kind.name for entry in entries.values() if entry.kind not in _PLAIN_DTYPES})
        self.description = f"GGUF file {self.path}"
        if kinds:
            self.description += f" (its 16-bit weights are dequantised {', '.join(kinds)})"

    def names(self) -> tuple[str, ...]:
        """Hugging Face names; a tensor that has none keeps its GGUF name."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in row-major order, [out, in] for linear weights."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """float32 for all quantised types."""
        kind = self._entries[name].kind
        return _PLAIN_DTYPES[kind].name if kind in _PLAIN_DTYPES else "float32"

    def location(self, name: str) -> Path:
        """The GGUF file."""
        return self.path

    def check_readable(self, name: str) -> None:
        """Refuse integer tensors and types that the installed `gguf` cannot dequantise."""
        entry = self._entries[name]
        if entry.kind in _PLAIN_DTYPES:
            return
        _, block_bytes = GGML_QUANT_SIZES[entry.kind]
        try:
            if entry.kind in _INTEGERS:
                raise NotImplementedError
            dequantize(np.zeros((1, block_bytes), np.uint8), entry.kind)
        except NotImplementedError:
            raise UserError(
                f"tensor {entry.gguf_name} in {self.path} has element type {entry.kind.name}, which cannot be "
                f"dequantised; use another GGUF version of the model."
            ) from None

    def read(self, name: str) -> np.ndarray:
        """Read, dequantise and un-permute one tensor."""
        self.check_readable(name)
        array = _read_entry(self.path, self._entries[name])
        heads = self._heads.get(name.split(".")[-2]) if name.startswith("model.layers.") else None
        return _unpermute(array, heads) if heads else array


def _hf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return name


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows from (head, pair, half) order, rotated in neighbouring pairs, to (head, half, pair) order."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _read_entry(path: Path, entry: _Entry) -> np.ndarray:
    if entry.kind in _PLAIN_DTYPES:
        array = np.empty(entry.shape, _PLAIN_DTYPES[entry.kind])
        read_exactly(path, entry.offset, array, entry.gguf_name)
        return array
    array = np.empty(entry.shape, np.float32)
    rows = array.reshape(-1, entry.shape[-1])
    row_bytes = entry.nbytes // len(rows)
    chunk = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), chunk):
        block = rows[start : start + chunk]
        packed = np.empty((len(block), row_bytes), np.uint8)
        read_exactly(path, entry.offset + start * row_bytes, packed, entry.gguf_name)
        block[:] = dequantize(packed, entry.kind)
    return array


class _Bytes:
    """The file as plain arrays: slices of a memmap are made in Python, which is most of `GGUFReader`'s time.

    A slice past the end is an error, for the reader would take what there is, and count on through absent elements.
    """

    def __init__(self, mapped: np.ndarray):
        self._array = np.asarray(mapped)

    def __getitem__(self, part: slice) -> np.ndarray:
        if part.stop > len(self._array):
            raise EOFError(f"its {len(self._array)} bytes end before its header or tensors do")
        return self._array[part]


class _Reader(GGUFReader):
    @property  # type: ignore[override]  # the reader only takes slices of it
    def data(self) -> _Bytes:
        return self._bytes

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._bytes = _Bytes(mapped)


def _header(path: Path) -> tuple[Mapping[str, Any], dict[str, _Entry]]:
    status = path.stat()
    return _parse(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2)
def _parse(path: Path, mtime_ns: int, size: int) -> tuple[Mapping[str, Any], dict[str, _Entry]]:
    """Metadata and tensor entries of the file as it was at that time, kept since weights and tokenizer both ask."""
    try:
        with np.errstate(all="raise"):  # offsets that overflow
            reader = _Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (ArithmeticError, EOFError, LookupError, RecursionError, ValueError) as error:
        raise UserError(f"{path} is not a GGUF file that can be read ({error}); {DOWNLOAD_AGAIN}.") from error
    if reader.byte_order == "S":
        raise UserError(f"{path} is a big-endian GGUF file; only little-endian ones are supported.")
    entries: dict[str, _Entry] = {}
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        if not shape or not tensor.n_elements:
            raise UserError(f"tensor {tensor.name} has a malformed entry in the header of {path}; {DOWNLOAD_AGAIN}.")
        entries[tensor.name] = _Entry(tensor.name, tensor.tensor_type, shape, tensor.data_offset, tensor.n_bytes)
    return MappingProxyType(metadata), entries


# Keys under "llama." that are read below, or that say nothing the tensors do not.
_HANDLED_KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scale_linear",
    "tensor_data_layout",
    "vocab_size",
}
_INERT = {"expert_count": 0, "expert_used_count": 0, "use_parallel_residual": False, "attention.causal": True}


def _config(
    path: Path, metadata: Mapping[str, Any], entries: dict[str, _Entry], rope_freqs: np.ndarray | None
) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path} has general.architecture {architecture!r}; of GGUF files only 'llama' is supported "
            f"(LLaMA, Mistral, SmolLM2, TinyLlama)."
        )
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{path} is one part of a split GGUF; merge the parts first (llama-gguf-split --merge).")
    for key, value in metadata.items():
        short = key.removeprefix("llama.")
        if short == key or short in _HANDLED_KEYS or (short in _INERT and value == _INERT[short]):
            continue
        raise UserError(f"{path} has {key} = {value!r}, which is not supported; use the safetensors version.")

    def required(key: str) -> Any:
        try:
            return metadata[f"llama.{key}"]
        except KeyError:
            raise UserError(f"{path} lacks the metadata llama.{key}; use another GGUF version of the model.") from None

    hidden, heads = required("embedding_length"), required("attention.head_count")
    kv_heads = metadata.get("llama.attention.head_count_kv", heads)
    for key, value in (("attention.head_count", heads), ("attention.head_count_kv", kv_heads)):
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"{path} has llama.{key} = {value!r}; only one positive number for all layers is supported."
            )
    head_dim = metadata.get("llama.attention.key_length", hidden // heads)
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    if head_dim != metadata.get("llama.attention.value_length", head_dim) or rotated != head_dim:
        raise UserError(
            f"{path} has attention.key_length {head_dim}, attention.value_length "
            f"{metadata.get('llama.attention.value_length', head_dim)} and rope.dimension_count {rotated}; "
            f"only equal ones are supported."
        )
    embedding = entries.get("model.embed_tokens.weight")
    vocab_size = metadata.get("llama.vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        "max_position_embeddings": required("context_length"),
        "vocab_size": vocab_size or (embedding.shape[0] if embedding else 0),
        "tie_word_embeddings": "lm_head.weight" not in entries,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in entries,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in entries,
    }
    scaling = _rope_scaling(path, metadata, config, rope_freqs)
    if scaling:
        config["rope_scaling"] = scaling
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            config[f"{name}_token_id"] = value
    return config


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06, as config.json has it."""
    return float(str(np.float32(value)))


def _rope_scaling(
    path: Path, metadata: Mapping[str, Any], config: dict[str, Any], rope_freqs: np.ndarray | None
) -> dict[str, Any] | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear"))
    original = metadata.get("llama.rope.scaling.original_context_length")
    if rope_freqs is not None:
        return _llama3_scaling(path, config, rope_freqs)
    if kind == "none" and (factor is None or factor in (0.0, 1.0)):
        return None
    if kind in ("linear", "none"):
        return {"rope_type": "linear", "factor": _shortest(factor)}
    if kind == "yarn" and factor is not None:
        scaling = {"rope_type": "yarn", "factor": _shortest(factor)}
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := metadata.get(f"llama.rope.scaling.{key}")) is not None:
                scaling[name] = _shortest(value)
        if metadata.get("llama.rope.scaling.attn_factor", 1.0) != 1.0:
            raise UserError(f"{path} has llama.rope.scaling.attn_factor, which is not supported; use safetensors.")
        return scaling
    raise UserError(
        f"{path} has llama.rope.scaling.type {kind!r}, which is not supported; use the safetensors version."
    )


def _llama3_scaling(path: Path, config: dict[str, Any], rope_freqs: np.ndarray) -> dict[str, Any]:
    """Name the parameters behind a file's per-frequency divisors (LLaMA 3.1 and later).

    GGUF stores only the resulting divisors, [head_dim / 2]; every published model uses low 1, high 4 and 8192 original
    positions, so those are tried and the divisors recomputed: what does not come out equal is refused.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": _shortest(float(rope_freqs.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    half = config["head_dim"] // 2
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    turns = scaling["original_max_position_embeddings"] / wavelength
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / scaling["factor"] + smooth)
    if rope_freqs.shape != expected.shape or not np.allclose(rope_freqs, expected, rtol=1e-3):
        raise UserError(
            f"tensor {_ROPE_FREQS} in {path} does not follow LLaMA 3's rule for rotary scaling and is not supported; "
            f"use the safetensors version."
        )
    return scaling
