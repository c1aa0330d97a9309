"""A head that is stored beside the embedding it is tied to."""

import jax.numpy as jnp
import pytest
from fixtures import families
from fixtures.checkpoint_helpers import write_hf

from qlora_jax import load_base
from qlora_jax.checkpoints import streaming
from qlora_jax.checkpoints.safetensors_source import SafetensorsSource
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
    monkeypatch.setattr(streaming, "_COMPARED", 5 * families.weights(name)[embedding].shape[1])
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


def test_the_two_are_never_in_memory_together(tmp_path, monkeypatch):
    name, width = "model.embed_tokens.weight", families.weights("qwen2_tied")["model.embed_tokens.weight"].shape[1]
    monkeypatch.setattr(streaming, "_COMPARED", 5 * width)
    read, whole, rows = SafetensorsSource._read, [], []

    def noted(source, tensor, shape, offset):
        (whole if shape == source.shape(tensor) else rows).append(tensor)
        assert shape == source.shape(tensor) or shape[0] <= 5
        return read(source, tensor, shape, offset)

    monkeypatch.setattr(SafetensorsSource, "_read", noted)
    tensors = families.weights("qwen2_tied")
    write_hf(tmp_path, families.CASES["qwen2_tied"]["config"], {**tensors, "lm_head.weight": tensors[name].copy()})
    load_base(tmp_path, quantization=QuantizationConfig("none"), dtype=jnp.float32)
    assert whole.count(name) == 1 and "lm_head.weight" not in whole
    assert {*rows} == {name, "lm_head.weight"}
