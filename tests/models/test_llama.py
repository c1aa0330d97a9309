"""The LLaMA family against transformers (golden logits by tests/reference/make_llama_golden.py), and its structure."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import tiny_model
from fixtures.tiny_configs import LLAMA

from qlora_jax import models
from qlora_jax.errors import UserError
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.nn.variables import Frozen, LoRAParam
from qlora_jax.quantization import QuantizationConfig

VARIANTS = json.loads((tiny_model.GOLDEN / "llama_variants.json").read_text())


@pytest.fixture(scope="module")
def golden():
    with np.load(tiny_model.GOLDEN / "llama_variants.npz") as file:
        return dict(file)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, golden):
    config = VARIANTS[variant]["config"]
    graphdef, lora, frozen = tiny_model.build(config, seed=VARIANTS[variant]["seed"], modules=None)
    ours = tiny_model.logits(graphdef, lora, frozen, golden[f"{variant}/input_ids"])
    theirs = golden[f"{variant}/logits"]
    assert np.abs(theirs).max() > 1  # a golden file of zeros would prove nothing
    np.testing.assert_allclose(ours[:, golden[f"{variant}/positions"]], theirs, atol=1e-4, rtol=0)


def test_fresh_adapters_change_nothing():
    ids = np.arange(40).reshape(2, 20) % 96
    bare = tiny_model.logits(*tiny_model.build(modules=None), ids)
    # The two are different programs, in which XLA may round sums otherwise.
    np.testing.assert_allclose(tiny_model.logits(*tiny_model.build(), ids), bare, rtol=0, atol=5e-5)


def test_packed_documents_do_not_see_each_other():
    graphdef, lora, frozen = tiny_model.build()
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 96, 11), rng.integers(0, 96, 17)
    packed = np.concatenate([first, second, np.zeros(4, int)])[None]
    positions = np.concatenate([np.arange(11), np.arange(17), np.zeros(4, int)])[None]
    segments = np.array([[1] * 11 + [2] * 17 + [0] * 4])
    together = tiny_model.logits(
        graphdef, lora, frozen, packed, positions=jnp.asarray(positions), segment_ids=jnp.asarray(segments)
    )
    apart = [tiny_model.logits(graphdef, lora, frozen, document[None])[0] for document in (first, second)]
    np.testing.assert_allclose(together[0, :11], apart[0], atol=2e-5, rtol=0)
    np.testing.assert_allclose(together[0, 11:28], apart[1], atol=2e-5, rtol=0)


def test_padding_on_the_right_is_invisible():
    graphdef, lora, frozen = tiny_model.build()
    ids = np.random.default_rng(1).integers(0, 96, (1, 12))
    padded = np.concatenate([ids, np.full((1, 5), 3)], axis=1)
    np.testing.assert_allclose(
        tiny_model.logits(graphdef, lora, frozen, padded)[:, :12],
        tiny_model.logits(graphdef, lora, frozen, ids),
        atol=1e-5,
        rtol=0,
    )


def test_only_adapters_are_trainable_state():
    graphdef, lora, frozen = tiny_model.build(quantization=QuantizationConfig())
    from flax import nnx

    assert all(isinstance(variable, LoRAParam) for _, variable in nnx.to_flat_state(lora))
    assert all(isinstance(variable, Frozen) for _, variable in nnx.to_flat_state(frozen))
    assert not any(isinstance(variable, nnx.Param) for _, variable in nnx.to_flat_state(frozen))
    model = nnx.merge(graphdef, lora, frozen)
    assert not jax.tree.leaves(nnx.state(model, nnx.Param))


def test_lora_initialisation_is_pefts():
    _, lora, _ = tiny_model.build(rank=8)
    for path, value in models.flatten(lora).items():
        if path[-1] == "lora_b":
            assert not np.any(value)
        else:
            bound = 1 / np.sqrt(value.shape[-1])
            assert np.abs(value).max() <= bound
            np.testing.assert_allclose(np.std(value), bound / np.sqrt(3), rtol=0.1)
            assert not np.array_equal(value[0], value[1])


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ("all", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("v_proj, q_proj", {"q_proj", "v_proj"}),
    ],
)
def test_lora_modules(selection, names):
    _, lora, _ = tiny_model.build(modules=selection)
    assert {path[-2] for path in models.flatten(lora)} == names


def test_unknown_lora_module():
    with pytest.raises(UserError, match="`lora_modules=q_proj,lm_head`: 'lm_head' is not a linear"):
        tiny_model.build(modules="q_proj,lm_head")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported"),
        ({"architectures": None}, "architectures must name one architecture"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type 'longrope' is not"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "warp": 1}}, "rope_scaling.warp is not supported"),
        ({"num_experts": 8}, "field 'num_experts' is not supported"),
        ({"hidden_size": None}, "hidden_size should be a valid integer, not None"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config has quant_method 'fp8', which is not"),
        ({"sliding_window": 16}, "sliding_window is supported for MistralForCausalLM only"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported"),
    ],
)
def test_unsupported_configs_name_the_field(change, message):
    with pytest.raises(UserError) as error:
        models.model_config({**LLAMA, **change})
    assert message in str(error.value)


def test_block_size_must_divide_the_rows():
    qlora = QLoRAConfig(QuantizationConfig(block_size=256))
    with pytest.raises(UserError, match="`block_size=256` does not divide"):
        models.abstract_model(models.model_config(LLAMA), qlora)


def test_tensor_table_covers_the_model_once():
    specs = models.base_tensors(models.model_config(LLAMA))
    assert len({spec.name for spec in specs}) == len(specs) == 3 * 9 + 2
    assert {spec.name for spec in specs if spec.layer == 1 and spec.quantized} == {
        f"model.layers.1.{name}.weight"
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    }  # fmt: skip


def test_compile_time_does_not_grow_with_depth():
    def lowered_size(layers: int) -> tuple[int, float]:
        config = models.model_config({**LLAMA, "num_hidden_layers": layers})
        graphdef, lora, frozen = models.split_model(models.abstract_model(config, QLoRAConfig()))
        from flax import nnx

        def run(lora, frozen, ids):
            model = nnx.merge(graphdef, lora, frozen)
            return model(ids, jnp.zeros_like(ids))[0]

        start = time.perf_counter()
        text = jax.jit(run).lower(lora, frozen, jax.ShapeDtypeStruct((1, 16), jnp.int32)).as_text()
        return len(text.splitlines()), time.perf_counter() - start

    assert lowered_size(2)[0] == lowered_size(64)[0]
