"""Write GGUF files of the models of `make_family_golden.py` as llama.cpp's convert_hf_to_gguf.py writes them.

    python make_family_gguf.py --golden ../golden/families --case gemma3_gguf --output gemma3.gguf

Tests import `write_family_gguf`; NumPy and the gguf package are enough. Tensor names come from
`gguf.get_tensor_name_map`, so this is a second opinion on any table of names. What llama.cpp does to each family, by
the files of its repository (convert_hf_to_gguf.py loads conversion/*.py; older releases have all of it in one file):

All: `TextModel.set_gguf_parameters` (conversion/base.py) writes block_count, context_length, embedding_length,
feed_forward_length, attention.head_count, attention.head_count_kv, rope.freq_base, attention.layer_norm_rms_epsilon,
general.file_type; rope.scaling.type and rope.scaling.factor (which divides positions) if the global rotary scaling is
linear or YaRN; attention.key_length and attention.value_length if config.json has head_dim (absent: hidden / heads).
Neither vocab_size nor rope.dimension_count is written. Rows of Q and K keep Hugging Face's order (only the classes of
conversion/llama.py permute them; these architectures rotate halves: `llama_model_rope_type`, src/llama-model.cpp, gives
LLAMA_ROPE_TYPE_NEOX). An absent output.weight means a tied head. One-dimensional tensors and norms are float32 always.

Qwen2 (`Qwen2Model`, conversion/qwen.py; architecture "qwen2"): nothing else. Biases of Q, K and V are blk.N.attn_q.bias
and so on. Sliding windows are neither written nor computed (src/models/qwen2.cpp): such a model differs from
transformers' after the window's length. There is no key_length, as config.json has no head_dim.

Qwen3 (`Qwen3Model`, conversion/qwen.py; architecture "qwen3"): blk.N.attn_q_norm.weight and blk.N.attn_k_norm.weight.
Sliding windows as for Qwen2.

Gemma 3 (`Gemma3Model`, conversion/gemma.py; architecture "gemma3"):
    `modify_tensors` adds 1 to every tensor whose name ends in norm.weight (`norm_shift`; the norms of Q and K as well),
    and drops rows of the embedding beyond the tokenizer's tokens (`gemma3.vocab_size` is absent: count the tokens).
    `filter_tensors` (base.py) drops the vision tower and the projector, and removes "language_model." from names.
    post_attention_layernorm is blk.N.post_attention_norm, pre_feedforward_layernorm blk.N.ffn_norm,
    post_feedforward_layernorm blk.N.post_ffw_norm. In the LLaMA family post_attention_layernorm is blk.N.ffn_norm.
    `set_gguf_parameters`: attention.sliding_window unless sliding_window_pattern is 1, rope.freq_base of the global
    layers, rope.freq_base_swa of the sliding ones (older releases do not write it, and without it 10000 is taken;
    rope.scaling.* is for global layers only), final_logit_softcapping if it is set. Always key_length and value_length.
    Not written: the pattern (src/models/gemma3.cpp takes 5 sliding layers and a full one, unless
    attention.sliding_window_pattern, a number or an array of booleans, is there), query_pre_attn_scalar (gemma3.cpp
    divides scores by sqrt(key_length); models of 62 layers, the 27B, by sqrt(embedding_length / head_count)), and the
    scale of embeddings, always sqrt(embedding_length).

Tokenizer: Qwen has tokenizer.ggml.model "gpt2" and tokenizer.ggml.pre "qwen2" with merges (`_set_vocab_gpt2`, base.py);
Gemma "llama" and "default" with scores (`_set_vocab_sentencepiece`), and tokenizer.ggml.add_space_prefix false; Gemma
checkpoints without a tokenizer.model become "gpt2" with their own `pre`. Ids of special tokens come from
tokenizer_config.json (`gguf.SpecialVocab`), not from config.json.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from random_weights import random_weights

__all__ = ["write_family_gguf"]

_ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' "
    "else message['role']) + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def write_family_gguf(
    path: Path,
    described: Mapping[str, Any],
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_freq_base_swa: bool = True,
) -> Path:
    """Write a GGUF file of a case; `described` is the content of its JSON file.

    kind: type of linear weights and of the embedding.
    rope_freq_base_swa: False for a Gemma file as older converters wrote it.

    Raises:
        ValueError: a tensor without a name in the gguf package.
    """
    config = described["config"]
    config = {**config, **config.get("text_config", {})}
    architecture = _ARCHITECTURES[config["model_type"]]
    gemma = architecture == gguf.MODEL_ARCH.GEMMA3
    rope = config["rope_parameters"]
    full_rope = rope.get("full_attention", rope)

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("Tiny Random")
    (_add_gemma_tokenizer if gemma else _add_qwen_tokenizer)(writer, config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if full_rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full_rope["factor"])
    writer.add_rope_freq_base(full_rope["rope_theta"])
    if "sliding_attention" in rope and rope_freq_base_swa:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if gemma:
        writer.add_sliding_window(config["sliding_window"])
        if config["final_logit_softcapping"]:
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in random_weights(described["tensors"].items(), **described["weights"]).items():
        if name.startswith(("vision_tower.", "multi_modal_projector.")):
            continue
        plain = name.replace("language_model.", "")
        target = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"the gguf package has no name for {name}")
        if gemma and plain.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        if tensor.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(target, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_qwen_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Byte-level BPE over a few letters; Ġ is a space and Ċ a line feed. Special tokens are the last three."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:;'-", "Ġ", "Ċ"]
    merges = ["t h", "th e", "Ġ the", "i n", "a n", "an d", "e r", "o u", "y ou", "Ġ a", "r e", "o n"]
    tokens = letters + [merge.replace(" ", "") for merge in merges]
    padding = vocab_size - len(tokens) - len(special)
    tokens += special + [f"[PAD{len(tokens) + len(special) + i}]" for i in range(padding)]
    types = [gguf.TokenType.NORMAL] * (len(letters) + len(merges)) + [gguf.TokenType.CONTROL] * len(special)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * padding)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(_CHATML)


def _add_gemma_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """SentencePiece over a few letters; ▁ is a space. Of the 256 bytes there is the line feed only."""
    kinds = gguf.TokenType
    head = [("<pad>", kinds.CONTROL), ("<eos>", kinds.CONTROL), ("<bos>", kinds.CONTROL), ("<unk>", kinds.UNKNOWN)]
    head += [("<0x0A>", kinds.BYTE), ("<start_of_turn>", kinds.CONTROL), ("<end_of_turn>", kinds.CONTROL)]
    head += [("\n", kinds.USER_DEFINED)]
    pieces = list("▁etaoinshrdlcumwfgypbvkjxqzETAOINSHRDLCUMWFGYPBVKJXQZ0123456789.,!?:;'-")
    pieces += ["th", "the", "▁the", "in", "an", "and", "er", "ou", "you", "▁a"]
    padding = [(f"[PAD{i}]", kinds.UNUSED) for i in range(len(head) + len(pieces), vocab_size)]
    entries = head + [(piece, kinds.NORMAL) for piece in pieces] + padding
    # Scores count down in the order of merging, as SentencePiece's BPE has them.
    merged = {piece: -float(i) for i, piece in enumerate(piece for piece in pieces if len(piece) > 1)}
    tokens = [token for token, _ in entries]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([merged.get(token, -100.0 if kind == kinds.NORMAL else -1000.0) for token, kind in entries])
    writer.add_token_types([kind for _, kind in entries])
    writer.add_bos_token_id(tokens.index("<bos>"))
    writer.add_eos_token_id(tokens.index("<eos>"))
    writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_pad_token_id(tokens.index("<pad>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(_GEMMA_TEMPLATE)
    writer.add_add_space_prefix(False)


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True)
    parser.add_argument("--case", required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    write_family_gguf(args.output, json.loads((args.golden / f"{args.case}.json").read_text()))


if __name__ == "__main__":
    main()
