"""A head that is stored beside the embedding it is tied to."""

import jax.numpy as jnp
import pytest
from fixtures import families
from fixtures.checkpoint_helpers import write_hf

from qlora_jax import load_base
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
def test_a_copy_is_left_out_and_another_head_is_refused(name, embedding, head, tmp_path):
    config, tensors = families.CASES[name]["config"], families.weights(name)
    load = {"quantization": QuantizationConfig("none"), "dtype": jnp.float32}
    write_hf(tmp_path / "copy", config, {**tensors, head: tensors[embedding].copy()})
    assert ("lm_head", "weight") not in load_base(tmp_path / "copy", **load).tensors
    for i, other in enumerate((2 * tensors[embedding], tensors[embedding][:3].copy())):
        write_hf(tmp_path / str(i), config, {**tensors, head: other})
        with pytest.raises(UserError, match=r"differs from .*tie_word_embeddings"):
            load_base(tmp_path / str(i), **load)
