"""Models in GGUF files, under Hugging Face names and layout; what differs between families is in their descriptions.

llama.cpp's converter renames tensors, and changes the values of some (`qlora_jax.models.Name.gguf_layout`); its
metadata become a config.json (`qlora_jax.models.GGUF`).
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.checkpoints.gguf_file import Entry, check_readable, read_blocks, read_header, read_tensor, tensor_pieces
from qlora_jax.errors import UserError
from qlora_jax.models import FAMILIES, GGUF, Name, model_config, names
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor, gguf_blocks

ROPE_FREQS = "rope_freqs.weight"
"""Tensor of what divides the rotary frequencies, which is how LLaMA 3's scaling is stored."""
_LEAVES = (".weight", ".bias")

# Metadata of every architecture that is read below, or that says nothing the tensors do not.
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


class GGUFSource:
    """`TensorSource` of a GGUF file.

    Shapes are reversed to [out, in]; rows that llama.cpp stores for interleaved rotary embedding are put back in
    Hugging Face's half-split order, and what it added to norms is taken off. Types whose blocks a `QuantizedTensor`
    holds are read as they are or dequantised, others are dequantised, to float32 and one tensor at a time.

    Raises:
        UserError: names the file and the architecture, metadata key or tensor that is not supported or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata, entries = read_header(self.path)
        self.config = model_config(_Metadata(self.path, self.metadata, entries).config())
        table = {name.gguf: name for name in names(self.config) if name.gguf}
        self._entries: dict[str, Entry] = {}
        self._layouts: dict[str, str] = {}
        for gguf_name, entry in entries.items():
            if gguf_name != ROPE_FREQS:
                name, layout = _hf_name(gguf_name, table)
                self._entries[name], self._layouts[name] = entry, layout
        kinds = sorted({entry.kind.name for entry in entries.values()})
        self.description = f"GGUF file {self.path} ({', '.join(kinds)})"

    def names(self) -> tuple[str, ...]:
        """Hugging Face names; a tensor that has none keeps its GGUF name."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in row-major order, [out, in] for linear weights."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """float32 for all quantised types and where a value was changed."""
        return "float32" if self._layouts[name] == "plus_one" else self._entries[name].dtype

    def location(self, name: str) -> Path:
        """The GGUF file."""
        return self.path

    def check_readable(self, name: str) -> None:
        """Refuse integer tensors and types that the installed `gguf` cannot dequantise."""
        check_readable(self.path, self._entries[name])

    def read(self, name: str) -> np.ndarray:
        """Read and dequantise one tensor; undo llama.cpp's layout."""
        self.check_readable(name)
        array = read_tensor(self.path, self._entries[name])
        if self._layouts[name] == "interleaved_heads":
            return _half_split(array, self.config.head_dim)
        if self._layouts[name] == "plus_one":
            return array.astype(np.float32) - np.float32(1)
        return array

    def quantized_type(self, name: str) -> str | None:
        """Ggml's name of a quantised type."""
        entry = self._entries[name]
        return entry.kind.name if entry.quantized else None

    def stored(self, name: str) -> QuantizationConfig | None:
        """Storage of a matrix in blocks that can be kept."""
        entry, kind = self._entries[name], self._entries[name].kind.name.lower()
        if kind not in gguf_blocks.LAYOUTS or len(entry.shape) != 2 or self._layouts[name] == "plus_one":
            return None
        return QuantizationConfig(kind)

    def read_stored(self, name: str, into: QuantizedTensor | None = None) -> QuantizedTensor:
        """Read a matrix in blocks; undo llama.cpp's order of rows."""
        entry = self._entries[name]
        packed = read_blocks(self.path, entry)
        if self._layouts[name] == "interleaved_heads":
            packed = _half_split(packed, self.config.head_dim)
        codes = None if into is None else into.codes
        return gguf_blocks.from_gguf(packed, entry.kind.name.lower(), codes=codes)

    def pieces(self, name: str, size: int, into: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Read and dequantise piece by piece; all at once a tensor whose layout is undone."""
        if self._layouts[name] == "as_is":
            self.check_readable(name)
            yield from tensor_pieces(self.path, self._entries[name], size, into)
        else:
            whole = self.read(name).reshape(-1)
            yield from (whole[start : start + size] for start in range(0, whole.size, size))


def _hf_name(gguf_name: str, table: Mapping[str, Name]) -> tuple[str, str]:
    """Hugging Face's name of a tensor and llama.cpp's layout of it; a name that is not in the table stays."""
    module, dot, leaf = gguf_name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", module)
    name = table.get(f"blk.{{i}}.{module[layer.end() :]}" if layer else module)
    if name is None or dot + leaf not in _LEAVES:
        return gguf_name, "as_is"
    return name.hf.replace("{i}", layer[1] if layer else "") + dot + leaf, name.gguf_layout


def _half_split(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows from (head, pair, half), rotated in neighbouring pairs, to (head, half, pair)."""
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def interleaved(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows from (head, half, pair) to (head, pair, half), as llama.cpp rotates them in some families."""
    halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def _shortest(value: Any) -> Any:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06, as config.json has it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


class _Metadata:
    """Metadata of one file on their way to a config.json."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], entries: Mapping[str, Entry]):
        self.path, self.all, self.entries = path, metadata, entries
        self.gguf = self._find_description()
        self._refuse_unknown()

    def _find_description(self) -> GGUF:
        known = {family.gguf.architecture: family.gguf for family in FAMILIES.values() if family.gguf is not None}
        architecture = self.all.get("general.architecture")
        if architecture not in known:
            titles = dict.fromkeys(family.title for family in FAMILIES.values() if family.gguf is not None)
            raise UserError(
                f"{self.path} has general.architecture {architecture!r}; of GGUF files only {', '.join(known)} are "
                f"supported ({'; '.join(titles)})."
            )
        return known[architecture]

    def _refuse_unknown(self) -> None:
        if self.all.get("split.count", 1) > 1:
            raise UserError(
                f"{self.path} is one part of a split GGUF; merge the parts first (llama-gguf-split --merge)."
            )
        prefix, gguf = self.gguf.architecture + ".", self.gguf
        for key, value in self.all.items():
            short = key.removeprefix(prefix)
            if short == key or short in _HANDLED_KEYS or short in gguf.fields or short in gguf.reads:
                continue
            if short not in _INERT or value != _INERT[short]:
                raise UserError(
                    f"{self.path} has {key} = {value!r}, which is not supported; use the safetensors version."
                )

    def get(self, key: str, default: Any = None) -> Any:
        return self.all.get(f"{self.gguf.architecture}.{key}", default)

    def required(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise UserError(
                f"{self.path} lacks the metadata {self.gguf.architecture}.{key}; use another GGUF version of the model."
            )
        return value

    def config(self) -> dict[str, Any]:
        """Make the config.json."""
        heads, kv_heads, head_dim = self._heads()
        config: dict[str, Any] = {
            "architectures": [self.gguf.hf_architecture],
            "model_type": self.gguf.hf_model_type,
            "hidden_size": self.required("embedding_length"),
            "intermediate_size": self.required("feed_forward_length"),
            "num_hidden_layers": self.required("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": _shortest(self.required("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self.get("rope.freq_base", 10000.0)),
            "max_position_embeddings": self.required("context_length"),
            "vocab_size": self._vocab_size(),
            "tie_word_embeddings": "output.weight" not in self.entries,
        }
        if scaling := self._rope_scaling(head_dim, config["rope_theta"]):
            config["rope_scaling"] = scaling
        for key, field in self.gguf.fields.items():
            if (value := self.get(key)) is not None:
                config[field] = _shortest(value)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            if (value := self.all.get(f"tokenizer.ggml.{key}_token_id")) is not None:
                config[f"{name}_token_id"] = value
        return {**config, **self.gguf.derived(config, self.get, self.entries)}

    def _heads(self) -> tuple[int, int, int]:
        """(query heads, key and value heads, width of a head)."""
        hidden, heads = self.required("embedding_length"), self.required("attention.head_count")
        kv_heads = self.get("attention.head_count_kv", heads)
        for key, value in (("attention.head_count", heads), ("attention.head_count_kv", kv_heads)):
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"{self.path} has {self.gguf.architecture}.{key} = {value!r}; only one positive number for all "
                    f"layers is supported."
                )
        head_dim = self.get("attention.key_length", hidden // heads)
        rotated = self.get("rope.dimension_count", head_dim)
        if head_dim != self.get("attention.value_length", head_dim) or rotated != head_dim:
            raise UserError(
                f"{self.path} has attention.key_length {head_dim}, attention.value_length "
                f"{self.get('attention.value_length', head_dim)} and rope.dimension_count {rotated}; "
                f"only equal ones are supported."
            )
        return heads, kv_heads, head_dim

    def _vocab_size(self) -> int:
        size = self.get("vocab_size", len(self.all.get("tokenizer.ggml.tokens", ())))
        embedding = self.entries.get("token_embd.weight")
        return size or (embedding.shape[0] if embedding else 0)

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        if ROPE_FREQS in self.entries:
            return _llama3_scaling(self.path, head_dim, theta, read_tensor(self.path, self.entries[ROPE_FREQS]))
        kind, architecture = self.get("rope.scaling.type", "none"), self.gguf.architecture
        factor = self.get("rope.scaling.factor", self.get("rope.scale_linear"))
        if kind == "none" and (factor is None or factor in (0.0, 1.0)):
            return None
        if kind in ("linear", "none"):
            return {"rope_type": "linear", "factor": _shortest(factor)}
        if kind != "yarn" or factor is None:
            raise UserError(
                f"{self.path} has {architecture}.rope.scaling.type {kind!r}, which is not supported; use the "
                f"safetensors version."
            )
        if self.get("rope.scaling.attn_factor", 1.0) != 1.0:
            raise UserError(
                f"{self.path} has {architecture}.rope.scaling.attn_factor, which is not supported; use safetensors."
            )
        scaling = {"rope_type": "yarn", "factor": _shortest(factor)}
        for key, field in (
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if (value := self.get(f"rope.scaling.{key}")) is not None:
                scaling[field] = _shortest(value)
        return scaling


def _llama3_scaling(path: Path, head_dim: int, theta: float, rope_freqs: np.ndarray) -> dict[str, Any]:
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
    half = head_dim // 2
    wavelength = 2 * math.pi * theta ** (np.arange(half) / half)
    turns = scaling["original_max_position_embeddings"] / wavelength
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1.0 / ((1 - smooth) / scaling["factor"] + smooth)
    if rope_freqs.shape != expected.shape or not np.allclose(rope_freqs, expected, rtol=1e-3):
        raise UserError(
            f"tensor {ROPE_FREQS} in {path} does not follow LLaMA 3's rule for rotary scaling and is not supported; "
            f"use the safetensors version."
        )
    return scaling
