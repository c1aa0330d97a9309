"""A head that is stored beside the embedding it is tied to."""

from collections import Counter

import jax.numpy as jnp
import pytest
from fixtures import families
from fixtures.checkpoint_helpers import write_hf

from qlora_jax import load_base
from qlora_jax.checkpoints import safetensors_source, streaming
from qlora_jax.errors import UserError
from qlora_jax.quantization import QuantizationConfig


@pytest.mark.parametrize(
    ("name", "embedding", "head"),
    [
        ("qwen2_tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("gemma3_conditional", "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("gemma3_conditional", "language_model.model.embed_tokens.weight", "lm_head.weight"),
    ],
)
def test_a_copy_is_left_out_and_another_head_is_refused(name, embedding, head, tmp_path, monkeypatch):
    # Several slices, the last one shorter.
    monkeypatch.setattr(streaming, "_PIECE", 5 * families.weights(name)[embedding].shape[1])
    config, tensors = families.CASES[name]["config"], families.weights(name)
    load = {"quantization": QuantizationConfig("none"), "dtype": jnp.float32}
    write_hf(tmp_path / "copy", config, {**tensors, head: tensors[embedding].copy()})
    assert ("lm_head", "weight") not in load_base(tmp_path / "copy", **load).tensors
    last = tensors[embedding].copy()
    last[-1, -1] += 1
    for i, other in enumerate((2 * tensors[embedding], tensors[embedding][:3].copy(), last)):
        write_hf(tmp_path / str(i), config, {**tensors, head: other})
        with pytest.raises(UserError, match=r"differs from .*tie_word_embeddings"):
            load_base(tmp_path / str(i), **load)


def test_neither_is_read_whole_to_compare_them(tmp_path, monkeypatch):
    name, tensors = "model.embed_tokens.weight", families.weights("qwen2_tied")
    embedding = tensors[name]
    monkeypatch.setattr(streaming, "_PIECE", 5 * embedding.shape[1])
    read, found = safetensors_source.read_exactly, Counter()

    def noted(file, offset, destination, tensor):
        assert destination.size <= 5 * embedding.shape[1]
        found[tensor] += destination.nbytes
        read(file, offset, destination, tensor)

    monkeypatch.setattr(safetensors_source, "read_exactly", noted)
    write_hf(tmp_path, families.CASES["qwen2_tied"]["config"], {**tensors, "lm_head.weight": embedding.copy()})
    load_base(tmp_path, quantization=QuantizationConfig("none"), dtype=jnp.float32)
    assert (found[name], found["lm_head.weight"]) == (2 * embedding.nbytes, embedding.nbytes)
