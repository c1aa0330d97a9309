"""Every family against transformers and PEFT (golden files by tests/reference/make_family_golden.py): one test body."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import families, tiny_model
from flax import nnx
from random_weights import random_weights

from qlora_jax import models
from qlora_jax.errors import UserError
from qlora_jax.generation import Sampling, generate
from qlora_jax.nn import attention, long_sequence
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.losses import next_token_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")


def build(name, *, adapted=False):
    """(graphdef, adapters, frozen) of a case in float32, with the golden adapters or none."""
    case = families.CASES[name]
    config = families.config(name)
    lora = None
    if adapted:
        lora = LoRAConfig(
            case["adapter"]["rank"], float(case["adapter"]["alpha"]), 0.0, models.lora_modules(config, "all")
        )
    graphdef, trained, frozen = models.split_model(
        models.abstract_model(config, QLoRAConfig(tiny_model.PLAIN, jnp.float32, lora))
    )
    tensors = tiny_model.stacked_tensors(config, families.weights(name), tiny_model.PLAIN, jnp.float32)
    return graphdef, golden_adapters(name, trained), models.fill_base(frozen, tensors)


def peft_names(name, path, layers):
    """PEFT's names of an adapter matrix of ours, one for each layer."""
    table = {entry.ours: entry.peft for entry in models.names(families.config(name))}
    matrix = {"lora_a": "lora_A", "lora_b": "lora_B"}[path[-1]]
    prefix = "base_model.model." + table[".".join(path[:-1])]
    return [f"{prefix.replace('{i}', str(layer))}.{matrix}.weight" for layer in range(layers)]


def golden_adapters(name, trained):
    values = {}
    for path, value in models.flatten(trained).items():
        shapes = [(each, value.shape[1:]) for each in peft_names(name, path, value.shape[0])]
        made = random_weights(shapes, families.CASES[name]["adapter"]["seed"])
        values[path] = jnp.stack([np.float32(0.5) * made[each] for each, _ in shapes])
    return models.unflatten_like(trained, values, what="adapter")


def positions_of(ids):
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


@pytest.mark.parametrize("name", families.CASES)
def test_logits_equal_transformers(name):
    golden = families.arrays(name)
    assert np.abs(golden["logits"]).max() > 1  # a golden file of zeros would prove nothing
    ours = tiny_model.logits(*build(name), golden["input_ids"])
    np.testing.assert_allclose(ours, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", families.marked(families.ADAPTED))
def test_loss_and_adapter_gradients_equal_peft(name):
    golden = families.arrays(name)
    graphdef, trained, frozen = build(name, adapted=True)
    ids, labels = jnp.asarray(golden["input_ids"]), jnp.asarray(golden["labels"])

    def loss(trained):
        model = nnx.merge(graphdef, trained, frozen)
        hidden, _ = model(ids, positions_of(ids))
        total, count = next_token_loss(hidden, model.head, labels)
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(loss))(trained)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    seen = set()
    for path, gradient in models.flatten(gradients).items():
        for layer, each in enumerate(peft_names(name, path, gradient.shape[0])):
            want = golden[f"grad/{each}"]
            scale = np.abs(want).max()
            assert scale > 0
            np.testing.assert_allclose(gradient[layer] / scale, want / scale, atol=1e-4, err_msg=each)
            seen.add(f"grad/{each}")
    assert seen == {key for key in golden if key.startswith("grad/")}


@pytest.mark.parametrize("name", families.marked(families.CASES))
def test_greedy_continuations_equal_transformers(name):
    case, golden = families.CASES[name], families.arrays(name)
    answers = generate(*build(name), case["prompts"], eos_ids=[], sampling=Sampling(max_new_tokens=12))
    assert answers == golden["generated"].tolist()


@pytest.mark.parametrize("name", [name for name in families.CASES if "packed_ids" in families.arrays(name)])
def test_packed_rows_equal_documents_by_themselves(name):
    golden = families.arrays(name)
    ours = tiny_model.logits(
        *build(name),
        golden["packed_ids"],
        positions=jnp.asarray(golden["packed_positions"]),
        segment_ids=jnp.asarray(golden["packed_segments"]),
    )
    np.testing.assert_allclose(ours, golden["packed_logits"], atol=1e-4, rtol=0)


# By default each family with one policy, and each policy with one family.
POLICIES = [(False, "offload"), (True, "full"), (True, "save_attention")]
TILED = [
    pytest.param(name, *policy, marks=[] if j == i % len(POLICIES) else pytest.mark.e2e)
    for i, name in enumerate(families.ONE_A_FAMILY)
    for j, policy in enumerate(POLICIES)
]


@pytest.mark.parametrize(("name", "packed", "policy"), TILED)
def test_tiles_change_nothing(name, packed, policy, monkeypatch):
    """The hand-written order of long sequences: loss and gradients are those of automatic differentiation."""
    graphdef, trained, frozen = build(name, adapted=True)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 64)))
    segments = jnp.where(positions_of(ids) < 40, 1, 2) if packed else None

    def loss(trained, remat):
        model = nnx.merge(graphdef, trained, frozen)
        hidden, _ = model(ids, positions_of(ids), segment_ids=segments, remat=remat)
        return jnp.sum(jnp.sin(model.logits(hidden)))

    want, want_gradients = jax.jit(jax.value_and_grad(lambda trained: loss(trained, "none")))(trained)
    monkeypatch.setattr(long_sequence, "TILE", 32)
    monkeypatch.setattr(long_sequence, "_MULTIPLE", 8)
    monkeypatch.setattr(attention, "_BUSY_BLOCKS", 1)
    got, gradients = jax.jit(jax.value_and_grad(lambda trained: loss(trained, policy)))(trained)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        np.testing.assert_allclose(a / np.abs(b).max(), b / np.abs(b).max(), atol=2e-5)


@pytest.mark.parametrize("name", families.CASES)
def test_every_spelling_of_a_config_is_read_alike(name):
    spellings = families.configs(name)
    assert len(spellings) > 1
    read = {spelling: models.model_config(config) for spelling, config in spellings.items()}
    want = dataclasses.replace(read["transformers"], eos_token_ids=())
    for config in read.values():
        assert dataclasses.replace(config, eos_token_ids=()) == want
    windows = [facts.window is not None for facts in want.attentions]
    assert windows == [kind == "sliding_attention" for kind in families.CASES[name]["layer_types"]]


@pytest.mark.parametrize("name", families.CASES)
def test_the_table_of_tensors_is_the_checkpoints(name):
    import re

    config = families.config(name)
    specs = {spec.name: spec.shape for spec in models.base_tensors(config)}
    stored = {each: tuple(shape) for each, shape in families.CASES[name]["tensors"].items()}
    skipped = re.compile("|".join(models.ignored_tensors(config)))
    assert specs == {each: shape for each, shape in stored.items() if not skipped.fullmatch(each)}


@pytest.mark.parametrize(
    ("name", "quant_type"),
    [
        pytest.param(name, quant_type, marks=[] if (i + j) % 2 else pytest.mark.slow)
        for i, name in enumerate(families.ONE_A_FAMILY)
        for j, quant_type in enumerate(("nf4", "int8"))
    ],
)
def test_quantised_models_compile_and_keep_close(name, quant_type):
    graphdef, trained, frozen = tiny_model.build(
        families.CASES[name]["config"], quantization=QuantizationConfig(quant_type), weights=families.weights(name)
    )
    golden = families.arrays(name)
    ours = tiny_model.logits(graphdef, trained, frozen, golden["input_ids"])
    error = np.abs(ours - golden["logits"]).mean() / np.abs(golden["logits"]).mean()
    assert 0 < error < 0.5


@pytest.mark.parametrize("name", families.ONE_A_FAMILY)
def test_an_unknown_field_is_named(name):
    config = families.CASES[name]["config"]
    with pytest.raises(UserError, match="field 'num_experts' is not supported"):
        models.model_config({**config, "num_experts": 8})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2_tied", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ("qwen2_tied", {"layer_types": ["full_attention"]}, "layer_types must name each of the 2 layers"),
        (
            "qwen2_tied",
            {"layer_types": ["full_attention", "linear_attention"]},
            "layer_types.1 should.*not 'linear_at",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar should be greater than .*, not 0"),
        ("gemma3_conditional", {"text_config": 3}, "text_config must be an object"),
        ("gemma3_conditional", {"text_config": {}}, "text_config must be an object"),
        ("gemma3_conditional", {"rms_norm_eps": 1e-5}, "'rms_norm_eps' outside text_config is not supported"),
        ("gemma3", {"rope_parameters": [1]}, "rope_parameters must be an object"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern should be greater than or equal to 1, not 0"),
        ("qwen2_sliding", {"use_sliding_window": False}, "use_sliding_window is false"),
        ("qwen3", {"eos_token_id": [[1]]}, "eos_token_id must be a token or a list of tokens"),
        ("qwen3", {"eos_token_id": -5}, "eos_token_id must be"),
        ("qwen3", {"rms_norm_eps": "x"}, "rms_norm_eps should be a valid number, not 'x'"),
        ("qwen3", {"rms_norm_eps": float("nan")}, "rms_norm_eps should be .*, not nan"),
        ("qwen3", {"head_dim": 15}, "head_dim should be a multiple of 2, not 15"),
        (
            "qwen3",
            {"original_max_position_embeddings": "x"},
            "original_max_position_embeddings should be",
        ),
        ("qwen3", {"rope_parameters": {"rope_theta": -5}}, "rope_parameters.rope_theta must be a positive number"),
        ("qwen3", {"rope_parameters": {"rope_type": ["a"]}}, "rope_type"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "rope_parameters.factor must be"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": None}}, "factor is missing"),
        ("qwen3", {"architectures": [["a"]]}, "architectures must name one architecture"),
        ("qwen3", {"num_hidden_layers": 10**6}, "num_hidden_layers should be less than or equal to 4096, not 1000000"),
        ("qwen3", {"tie_word_embeddings": 10**9}, "tie_word_embeddings should be a valid boolean, not 1000000000"),
        ("qwen3", {"use_sliding_window": "no"}, "use_sliding_window should be a valid boolean"),
        ("gemma3", {"query_pre_attn_scalar": "x"}, "query_pre_attn_scalar should be a valid number"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}}, "finite frequencies"),
    ],
)
def test_unsupported_configs_name_the_field(name, change, message):
    with pytest.raises(UserError, match=message):
        models.model_config({**families.CASES[name]["config"], **change})


def test_absent_layer_types_and_null_ones_are_the_same():
    config = families.CASES["qwen2_sliding"]["config"]
    without = {name: value for name, value in config.items() if name != "layer_types"}
    read = models.model_config({**config, "layer_types": None})
    assert read.attentions == models.model_config(without).attentions == models.model_config(config).attentions


def test_the_outer_config_says_whether_the_head_is_tied():
    config = families.CASES["gemma3_conditional"]["config"]
    assert models.model_config(config).tie_word_embeddings
    assert not models.model_config({**config, "tie_word_embeddings": False}).tie_word_embeddings


def test_an_unknown_architecture_lists_the_known_ones_and_the_way_to_add_one():
    with pytest.raises(UserError) as error:
        models.model_config({"architectures": ["FalconForCausalLM"]})
    assert all(name in str(error.value) for name in (*models.FAMILIES, "docs/adding_a_model.md"))
