"""Small checkpoints on disk for tests: Hugging Face directories, GGUF files, and the tokenizers they carry."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
import numpy as np
from safetensors.numpy import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def hf_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a LLaMA checkpoint, written down independently of the library."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h, k = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        linears = {"q_proj": (h, d), "k_proj": (k, d), "v_proj": (k, d), "o_proj": (d, h)}
        for name, shape in linears.items():
            shapes[f"{p}self_attn.{name}.weight"] = shape
            if config.get("attention_bias"):
                shapes[f"{p}self_attn.{name}.bias"] = shape[:1]
        shapes |= {
            f"{p}mlp.gate_proj.weight": (f, d),
            f"{p}mlp.up_proj.weight": (f, d),
            f"{p}mlp.down_proj.weight": (d, f),
        }
        shapes |= {f"{p}input_layernorm.weight": (d,), f"{p}post_attention_layernorm.weight": (d,)}
    return shapes


def random_tensors(config: Mapping[str, Any], dtype: str = "bfloat16", seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.05, shape).astype(dtype) for name, shape in hf_shapes(config).items()}


def write_hf(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], shards: int = 1) -> Path:
    """A Hugging Face directory with one file, or with an index and `shards` files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors")
        return directory
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, leaf = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[module]}.{leaf}"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K as llama.cpp stores them: halves of each head interleaved."""
    rows = np.arange(weight.shape[0]).reshape(heads, 2, -1)
    return weight[rows.transpose(0, 2, 1).reshape(-1)]


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer: Mapping[str, Any] | None = None,
    *,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file of a LLaMA checkpoint; linear weights and embedding are quantised to `kind` if given.

    tokenizer: keyword arguments for `add_tokenizer`; extra: further metadata: strings, numbers and lists.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if tokenizer is not None:
        add_tokenizer(writer, **tokenizer)
    for key, value in (extra or {}).items():
        adders = {
            str: writer.add_string,
            float: writer.add_float32,
            int: writer.add_uint32,
            list: writer.add_array,
        }
        adders[type(value)](key, value)
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            tensor = permute(tensor, config["num_attention_heads"])
        elif ".k_proj." in name:
            tensor = permute(tensor, config["num_key_value_heads"])
        target = gguf_name(name) if name.startswith(("model.", "lm_head.")) else name
        if kind is not None and tensor.ndim == 2:
            packed = gguf.quants.quantize(np.asarray(tensor, np.float32), kind)
            writer.add_tensor(target, packed, raw_dtype=kind)
        else:
            writer.add_tensor(target, np.asarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(
    writer: gguf.GGUFWriter,
    *,
    model: str,
    tokens: list[str],
    types: list[int],
    pre: str | None = None,
    merges: list[str] | None = None,
    scores: list[float] | None = None,
    special: Mapping[str, int] | None = None,
    chat_template: str | None = None,
) -> None:
    """Tokenizer metadata; special: {"bos": id, "eos": id, "unk": id, "pad": id}, any subset."""
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for name, index in (special or {}).items():
        getattr(writer, f"add_{name}_token_id")(index)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def write_raw_safetensors(file: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file with any header: a dict, or bytes that need not be JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def write_large_hf(directory: Path, config: Mapping[str, Any], shards: int) -> int:
    """A bfloat16 directory that may be larger than memory, the same random numbers over and over; returns its bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype("bfloat16").tobytes()
    shapes, weight_map, total = hf_shapes(config), {}, 0
    names = list(shapes)
    for i in range(shards):
        file = directory / f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header, offset = {}, 0
        for name in names[i::shards]:
            nbytes = 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [offset, offset + nbytes]}
            weight_map[name] = file.name
            offset += nbytes
        write_raw_safetensors(file, header)
        with open(file, "ab") as stream:
            for start in range(0, offset, len(block)):
                stream.write(block[: offset - start])
        total += offset
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total
