"""Adapters in PEFT's format: round trips, refusals, atomic writing, equality with a file written by PEFT."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import families, tiny_model
from fixtures.tiny_configs import BIASED_LLAMA
from safetensors.numpy import load_file, save_file

from qlora_jax import files, models
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.peft import AdapterConfig, load_adapter, save_adapter
from qlora_jax.errors import UserError
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_tiny"  # written by tests/reference/make_peft_golden.py
GOLDEN_MODEL = models.model_config(json.loads(str(np.load(GOLDEN / "golden.npz")["config"])))
MODEL = models.model_config(BIASED_LLAMA)
ALL = models.lora_modules(MODEL, "all")
LAYERS, RANK, IN, OUT = 3, 4, 6, 10
LINEARS = {("layers", "self_attn", "q_proj"): (LAYERS, OUT, IN), ("layers", "mlp", "down_proj"): (LAYERS, IN, OUT)}
A_NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B_NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


def random_adapter(seed=0):
    rng = np.random.default_rng(seed)
    lora = {}
    for module, (layers, fan_out, fan_in) in LINEARS.items():
        lora[(*module, "lora_a")] = rng.standard_normal((layers, RANK, fan_in), dtype=np.float32)
        lora[(*module, "lora_b")] = rng.standard_normal((layers, fan_out, RANK), dtype=np.float32)
    return lora


CONFIG = AdapterConfig(RANK, 16, 0.05, ("q_proj", "down_proj"), "some/model")


def save(directory, lora=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return save_adapter(directory, random_adapter() if lora is None else lora, config, MODEL)


def load(directory):
    return load_adapter(directory, MODEL)


def edit_config(directory, **fields):
    path = directory / peft.CONFIG_NAME
    as_edited(directory)
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(directory, change):
    path = directory / peft.WEIGHTS_NAME
    tensors = load_file(path)
    change(tensors)
    as_edited(directory)
    save_file(tensors, path)


def as_edited(directory):
    """Without the digests that would tell an edit from damage; PEFT writes none."""
    (directory / files.CHECKSUMS_NAME).unlink(missing_ok=True)


def test_round_trip(tmp_path):
    lora = random_adapter()
    assert save(tmp_path / "a" / "adapter", lora) == tmp_path / "a" / "adapter"
    again, config = load(tmp_path / "a" / "adapter")
    assert again.keys() == lora.keys()
    for path, values in lora.items():
        assert again[path].dtype == np.float32
        np.testing.assert_array_equal(again[path], values)
    assert config == AdapterConfig(4, 16.0, 0.05, ("down_proj", "q_proj"), "some/model")
    assert sorted(path.name for path in (tmp_path / "a").rglob("*")) == [
        "SHA256SUMS",
        "adapter",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_keys_and_shapes_are_pefts(tmp_path):
    save(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / peft.WEIGHTS_NAME)
    assert len(tensors) == LAYERS * len(LINEARS) * 2
    assert tensors[A_NAME].shape == (RANK, IN)
    assert tensors[B_NAME].shape == (OUT, RANK)
    np.testing.assert_array_equal(tensors[B_NAME], random_adapter()[("layers", "self_attn", "q_proj", "lora_b")][1])
    config = json.loads((tmp_path / "adapter" / peft.CONFIG_NAME).read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["lora_alpha"] == 16
    assert isinstance(config["lora_alpha"], int)


@pytest.mark.parametrize("name", families.ONE_A_FAMILY)
def test_every_family_both_ways(tmp_path, name):
    """Matrices under our paths, written and read back, are under the names that PEFT gives the modules."""
    model = families.config(name)
    adapter = models.abstract_model(model, QLoRAConfig(tiny_model.PLAIN, lora=LoRAConfig(RANK, 8.0, 0.0, ALL)))
    _, lora, _ = models.split_model(adapter)
    rng = np.random.default_rng(0)
    values = {path: rng.standard_normal(like.shape, np.float32) for path, like in models.flatten(lora).items()}
    save_adapter(tmp_path, values, dataclasses.replace(CONFIG, target_modules=ALL), model)
    written = load_file(tmp_path / peft.WEIGHTS_NAME)
    golden = {key.removeprefix("grad/") for key in families.arrays(name) if key.startswith("grad/")}
    assert written.keys() == golden  # of PEFT's own model
    again, config = load_adapter(tmp_path, model)
    assert again.keys() == values.keys()
    for path, value in values.items():
        np.testing.assert_array_equal(again[path], value)
    assert config.target_modules == tuple(sorted(ALL))


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_reads_what_peft_wrote_for_other_families(name):
    model, directory = families.config(name), families.GOLDEN / f"peft_{name}"
    lora, config = load_adapter(directory, model)
    assert config.target_modules == tuple(sorted(ALL))
    assert len(lora) == 2 * len(ALL)
    file = load_file(directory / peft.WEIGHTS_NAME)
    layers = model.num_hidden_layers
    assert len(file) == layers * len(lora)
    for layer in range(layers):
        theirs = file[f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_B.weight"]
        np.testing.assert_array_equal(lora[("layers", "mlp", "up_proj", "lora_b")][layer], theirs)


def test_a_model_with_other_parts_says_which_modules_are_meant(tmp_path):
    """The vision tower of Gemma 3 has linears called q_proj too; and transformers has renamed the text part once."""
    config = families.config("gemma3_conditional")
    layers = config.num_hidden_layers
    lora = {
        ("layers", "self_attn", "q_proj", "lora_a"): np.ones((layers, RANK, 64), np.float32),
        ("layers", "self_attn", "q_proj", "lora_b"): np.ones((layers, 128, RANK), np.float32),
    }
    save_adapter(tmp_path, lora, dataclasses.replace(CONFIG, target_modules=("q_proj",)), config)
    target = json.loads((tmp_path / peft.CONFIG_NAME).read_text())["target_modules"]
    text, vision = "model.language_model.layers.3.self_attn.q_proj", "model.vision_tower.layers.0.self_attn.q_proj"
    assert re.fullmatch(target, text)
    assert not re.fullmatch(target, vision)
    assert not re.fullmatch(target, text.replace("q_proj", "k_proj"))
    assert load_adapter(tmp_path, config)[1].target_modules == ("q_proj",)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.language_model", "language_model.model")] = tensors.pop(name)

    edit_tensors(tmp_path, rename)
    again, _ = load_adapter(tmp_path, config)
    assert again.keys() == lora.keys()
    edit_tensors(tmp_path, lambda t: t.update({name.replace("language_model.model", "model.language_model"): values
                                               for name, values in dict(t).items()}))  # fmt: skip
    with pytest.raises(UserError, match=r"layers\.self_attn\.q_proj are there under two names"):
        load_adapter(tmp_path, config)


def test_jax_arrays_and_half_precision(tmp_path):
    lora = {path: jnp.asarray(values, jnp.bfloat16) for path, values in random_adapter().items()}
    save(tmp_path / "adapter", lora)
    again, _ = load(tmp_path / "adapter")
    for path, values in lora.items():
        np.testing.assert_array_equal(again[path], np.asarray(values, np.float32))

    edit_tensors(tmp_path / "adapter", lambda t: t.update({A_NAME: np.asarray(jnp.asarray(t[A_NAME], jnp.bfloat16))}))
    np.testing.assert_array_equal(
        load(tmp_path / "adapter")[0][("layers", "self_attn", "q_proj", "lora_a")],
        again[("layers", "self_attn", "q_proj", "lora_a")],
    )


def test_reads_what_peft_wrote():
    lora, config = load_adapter(GOLDEN, GOLDEN_MODEL)
    assert config.rank == 4
    assert config.alpha == 6.0
    assert config.dropout == 0.05
    assert config.base_model_name == "tiny-random-llama"
    assert config.target_modules == tuple(
        sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    )
    assert len(lora) == 14
    assert lora[("layers", "mlp", "down_proj", "lora_a")].shape == (3, 4, 56)
    assert lora[("layers", "self_attn", "k_proj", "lora_b")].shape == (3, 16, 4)
    file = load_file(GOLDEN / peft.WEIGHTS_NAME)
    np.testing.assert_array_equal(lora[("layers", "self_attn", "q_proj", "lora_a")][1], file[A_NAME])


def test_writes_pefts_bytes_again(tmp_path):
    """Read PEFT's file, write it: every tensor under the same name, and no config field PEFT gave another value."""
    lora, config = load_adapter(GOLDEN, GOLDEN_MODEL)
    save_adapter(
        tmp_path / "adapter",
        lora,
        config,
        GOLDEN_MODEL,
    )
    theirs, ours = load_file(GOLDEN / peft.WEIGHTS_NAME), load_file(tmp_path / "adapter" / peft.WEIGHTS_NAME)
    assert theirs.keys() == ours.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values)
    written = json.loads((tmp_path / "adapter" / peft.CONFIG_NAME).read_text())
    expected = json.loads((GOLDEN / peft.CONFIG_NAME).read_text())
    expected["target_modules"] = sorted(expected["target_modules"])
    assert written == {name: expected[name] for name in written}


def test_logits_equal_pefts():
    """The adapter PEFT wrote, on the same base weights, moves our logits as it moves PEFT's."""
    golden = np.load(GOLDEN / "golden.npz")
    config, seed = json.loads(str(golden["config"])), int(golden["seed"])
    values, adapter = load_adapter(GOLDEN, GOLDEN_MODEL)
    graphdef, lora, frozen = tiny_model.build(config, seed=seed, modules=None)
    base = tiny_model.logits(graphdef, lora, frozen, golden["input_ids"])
    np.testing.assert_allclose(base, golden["base_logits"], atol=1e-4, rtol=0)

    lora_config = LoRAConfig(adapter.rank, adapter.alpha, adapter.dropout, adapter.target_modules)
    precision = QLoRAConfig(tiny_model.PLAIN, jnp.float32, lora_config)
    graphdef, lora, _ = models.split_model(models.abstract_model(models.model_config(config), precision))
    lora = models.unflatten_like(lora, {path: jnp.asarray(value) for path, value in values.items()}, what="adapter")
    adapted = tiny_model.logits(graphdef, lora, frozen, golden["input_ids"])
    np.testing.assert_allclose(adapted, golden["logits"], atol=1e-4, rtol=0)
    assert np.abs(adapted - base).max() > 1


def products(lora, alpha, rank):
    """Change of each weight, float64 {module: [layers, out, in]}."""
    return {
        path[:-1]: alpha / rank * np.float64(lora[(*path[:-1], "lora_b")]) @ np.float64(values)
        for path, values in lora.items()
        if path[-1] == "lora_a"
    }


def test_rslora_computes_the_same(tmp_path):
    save(tmp_path)
    edit_config(tmp_path, use_rslora=True)
    lora, config = load(tmp_path)
    assert config.alpha == pytest.approx(16 * RANK**0.5) and config.rank == RANK
    for path, values in random_adapter().items():
        np.testing.assert_array_equal(lora[path], values)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_modules_compute_the_same(rslora, tmp_path):
    """One module, and one layer of another, have a rank and an alpha of their own."""
    whole = random_adapter()
    save(tmp_path)
    single = "model.layers.1.mlp.down_proj"

    def own(name):
        return (2, 16.0) if "q_proj" in name else (3, 5.0) if single in name else (RANK, 16.0)

    def change(tensors):
        for name, values in tensors.items():
            rank, _ = own(name)
            tensors[name] = np.ascontiguousarray(values[:rank] if "lora_A" in name else values[:, :rank])

    edit_tensors(tmp_path, change)
    edit_config(tmp_path, use_rslora=rslora, rank_pattern={"q_proj": 2, f"^{single}": 3}, alpha_pattern={single: 5.0})
    lora, config = load(tmp_path)
    found = products(lora, config.alpha, config.rank)
    for module, (layers, _, _) in LINEARS.items():
        for i in range(layers):
            rank, alpha = own(f"model.layers.{i}.{'.'.join(module[1:])}")
            a, b = (np.float64(whole[(*module, leaf)][i]) for leaf in ("lora_a", "lora_b"))
            want = alpha / (rank**0.5 if rslora else rank) * b[:, :rank] @ a[:rank]
            np.testing.assert_allclose(found[module][i], want, rtol=1e-5, atol=1e-5)
    assert config.rank == RANK and not lora[("layers", "self_attn", "q_proj", "lora_a")][:, 2:].any()
    save_adapter(tmp_path / "again", lora, config, MODEL)
    again, plain = load(tmp_path / "again")
    for module, values in products(again, plain.alpha, plain.rank).items():
        np.testing.assert_allclose(values, found[module], rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": "yes"}, "use_rslora should be a valid boolean"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj\.lora_A\.weight has shape \[4, 6\], but r=8 needs \[8, in\]"),
        ({"rank_pattern": {"v_proj": 8}}, "rank_pattern names v_proj, but"),
        ({"rank_pattern": {"q_proj": 4, "(v_proj": 8}}, r"rank_pattern has '\(v_proj', which is no regular expression"),
        ({"target_modules": r"(.+)+!"}, "target_modules is .*, which takes too long or too much memory to match"),
        ({"target_modules": "(" * 5000}, r"target_modules has '\({12}.*', which is no regular expression"),
        ({"exclude_modules": "*"}, "exclude_modules has '\\*', which is no regular expression that can be used"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.q_proj should be greater than 0"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern should be a valid dictionary"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": 0}, "layers_to_transform=0 is not supported"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"some_future_field": 7}, "some_future_field"),
        ({"r": 0}, "r should be greater than or equal to 1, not 0"),
        ({"r": "4"}, "r should be a valid integer, not '4'"),
        ({"lora_alpha": None}, "lora_alpha should be a valid number, not None"),
        ({"lora_alpha": 0}, "lora_alpha should be greater than 0, not 0"),
        ({"lora_alpha": -16}, "lora_alpha should be greater than 0, not -16"),
        ({"lora_alpha": 1e308}, "lora_alpha should be less than or equal to 1000000"),
        ({"lora_alpha": 2**64}, "lora_alpha should be less than or equal to 1000000"),
        ({"lora_alpha": float("nan")}, "lora_alpha should be .*, not nan"),
        ({"lora_dropout": 1.5}, "lora_dropout"),
        ({"target_modules": ["q_proj"]}, r"mlp\.down_proj, which target_modules does not name"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, "target_modules names v_proj"),
        ({"target_modules": None}, "target_modules"),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["down_proj"]},
            "down_proj, which target_modules does",
        ),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"], "exclude_modules": []}, "target_modules names v_proj"),
        ({"target_modules": "all-linear"}, r"target_modules names model\.layers\.0\.self_attn\.k_proj, but"),
        ({"target_modules": ".*_proj"}, r"target_modules names model\.layers\.0\.self_attn\.k_proj, but"),
        ({"target_modules": r".*\.q_proj|.*\.down"}, r"0\.mlp\.down_proj, which target_modules does not"),
        ({"target_modules": r".*[01].*(q|down)_proj"}, r"2\.self_attn\.q_proj, which target_modules does"),
        ({"target_modules": r".*(q_proj|down_proj|lm_head)"}, "target_modules names lm_head, but"),
        ({"target_modules": ["q_proj", "down_proj", "layers.1.mlp.up_proj"]}, r"names layers\.1\.mlp\.up_proj, but"),
        ({"exclude_modules": ["1.mlp.down_proj"]}, r"layers\.1\.mlp\.down_proj, which exclude_modules names"),
        ({"exclude_modules": [3]}, "exclude_modules must be"),
        ({"target_modules": ["q_proj"] * 20_000}, "target_modules must be a non-empty list of up to 2048 names"),
        ({"rank_pattern": {f"x{i}": 1 for i in range(20_000)}}, "rank_pattern should have at most 2048 items"),
        ({"r": 8}, r"lora_A.weight has shape \[4, 10\], but r=8"),
    ],
)
def test_refuses_config(tmp_path, fields, message):
    save(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **fields)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("targets", [r".*\.(q_proj|down_proj)", ["self_attn.q_proj", "mlp.down_proj"]])
def test_accepts_other_ways_to_name_targets(tmp_path, targets):
    save(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", target_modules=targets)
    assert load(tmp_path / "adapter")[1].target_modules == ("down_proj", "q_proj")


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        (["q_proj", "down_proj", "v_proj"], ["v_proj"]),
        (["q_proj", "down_proj", "lm_head"], r"lm_head|.*\.v_proj"),
        ("all-linear", ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]),
        (["q_proj", "down_proj"], []),
    ],
)
def test_excluded_modules_are_those_without_matrices(tmp_path, targets, excluded):
    save(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", target_modules=targets, exclude_modules=excluded)
    assert load(tmp_path / "adapter")[1].target_modules == ("down_proj", "q_proj")


REFERENCE = json.loads((GOLDEN.parent / "peft_config.json").read_text())  # tests/reference/make_peft_config_golden.py


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: str(case["fields"]))
def test_adapts_what_peft_adapts(tmp_path, case):
    """Linears, ranks and scales are those that PEFT gives a model of the same configuration."""
    model = models.model_config(REFERENCE["config"])
    expected = case.get("adapted", {})
    fields = {"r": 4, "lora_alpha": 6, **case["fields"]}
    tensors = {}
    for name, (rank, _) in (expected or {"model.layers.0.self_attn.q_proj": (4, 1.5)}).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ones((rank, 1), np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones((1, rank), np.float32)
    (tmp_path / peft.CONFIG_NAME).write_text(json.dumps({**REFERENCE["fields"], **fields}))
    save_file(tensors, tmp_path / peft.WEIGHTS_NAME)

    every_layer = all(re.sub(r"\d", str(i), name) in expected for name in expected for i in range(LAYERS))
    unused = {"proj": 2, "self_attn": 3} in fields.values() or r"^self_attn\.q_proj" in fields.get("rank_pattern", {})
    if not expected or not every_layer or "lm_head" in expected or unused:
        message = "target_modules names|which target_modules does not|every layer|lm_head|rank_pattern names"
        with pytest.raises(UserError, match=message):
            load_adapter(tmp_path, model)
        return
    lora, config = load_adapter(tmp_path, model)
    found = {
        f"model.layers.{layer}.{'.'.join(module[1:])}": value.item()
        for module, values in products(lora, config.alpha, config.rank).items()
        for layer, value in enumerate(values)
    }
    assert found == {name: pytest.approx(rank * scale, rel=1e-6) for name, (rank, scale) in expected.items()}


# A value of every field of PEFT's configuration that says something else than its default.
OTHER_VALUES = {
    "alora_invocation_tokens": [1], "alpha_pattern": {"q_proj": 3}, "arrow_config": {"top_k": 3},
    "auto_mapping": {"base_model_class": "X"}, "base_model_name_or_path": "x", "bias": "lora_only",
    "corda_config": {"corda_method": "ipm"}, "ensure_weight_tying": True, "eva_config": {"rho": 1.0},
    "exclude_modules": ["q_proj"], "fan_in_fan_out": True, "inference_mode": True, "init_lora_weights": "olora",
    "kasa_config": {"beta": 1.0}, "layer_replication": [[0, 2]], "layers_pattern": "layers", "layers_to_transform": 0,
    "loftq_config": {"loftq_bits": 4}, "lora_alpha": 3, "lora_bias": True, "lora_dropout": 0.5,
    "lora_ga_config": {"direction": "x"}, "megatron_config": {"x": 1}, "megatron_core": "x",
    "modules_to_save": ["lm_head"], "monteclora_config": {"x": 1}, "peft_type": "ADALORA", "peft_version": "0.1",
    "qalora_group_size": 32, "r": 5, "rank_pattern": {"q_proj": 3}, "revision": "main", "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.up"], "task_type": "SEQ_CLS", "trainable_token_indices": [0],
    "use_bdlora": {"nblocks": 2}, "use_dora": True, "use_qalora": True, "use_rslora": True, "velora_config": {"x": 2},
}  # fmt: skip
# Of those, the ones that change nothing of what a trained adapter computes.
SAYS_NOTHING = {
    "auto_mapping", "ensure_weight_tying", "eva_config", "inference_mode", "megatron_core", "peft_version",
    "qalora_group_size", "revision",
}  # fmt: skip


@pytest.mark.parametrize("field", REFERENCE["fields"])
def test_no_field_of_pefts_is_ignored(tmp_path, field):
    """It is refused by its name, or what is read differs, or it says nothing of a trained adapter."""
    assert OTHER_VALUES[field] != REFERENCE["fields"][field]
    save(tmp_path)
    edit_config(tmp_path, **{**REFERENCE["fields"], "r": RANK, "target_modules": ["q_proj", "down_proj"]})
    lora, config = load(tmp_path)
    edit_config(tmp_path, **{field: OTHER_VALUES[field]})
    try:
        other, changed = load(tmp_path)
    except UserError as error:
        named = field if field != "rank_pattern" else "r=3"
        assert re.search(rf"\b{named}\b", str(error)) and field not in SAYS_NOTHING
        return
    same = changed == config and all(np.array_equal(lora[path], other[path]) for path in lora)
    assert same == (field in SAYS_NOTHING)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A_NAME), f"{A_NAME} is missing"),
        (lambda t: t.pop(B_NAME), f"{B_NAME} is missing"),
        (lambda t: [t.pop(name) for name in list(t) if ".q_proj." in name and ".1." in name], f"{A_NAME} is missing"),
        (lambda t: t.update({A_NAME: t[A_NAME][:2]}), rf"{A_NAME} has shape \[2, 6\]"),
        (lambda t: t.update({A_NAME: t[A_NAME][:, :2].copy()}), rf"{A_NAME} has shape \[4, 2\], but layer 0"),
        (lambda t: t.update({B_NAME: t[B_NAME].T.copy()}), rf"{B_NAME} has shape \[4, 10\]"),
        (lambda t: t[A_NAME].__setitem__((0, 0), np.nan), f"{A_NAME} holds NaN or Inf"),
        (lambda t: t[B_NAME].__setitem__((0, 0), -np.inf), f"{B_NAME} holds NaN or Inf"),
        (lambda t: t.update({A_NAME: t[A_NAME].astype(np.int32)}), f"{A_NAME} is int32"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.ones((4, 6), np.float32)}), "lm_head"),
        (lambda t: t.update({A_NAME.replace("lora_A", "lora_C"): np.ones((4, 6), np.float32)}), "lora_C"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_refuses_tensors(tmp_path, change, message):
    save(tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", change)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_refuses_empty_and_truncated_files(tmp_path, keep):
    path = save(tmp_path / "adapter") / peft.WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    as_edited(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is empty, truncated or corrupt"):
        load(tmp_path / "adapter")


def test_refuses_missing_files(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no PEFT adapter"):
        load(tmp_path)

    directory = save(tmp_path / "adapter")
    (directory / peft.WEIGHTS_NAME).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing or not as it was written; if that was"):
        load(directory)
    as_edited(directory)
    with pytest.raises(UserError, match=r"has adapter_config\.json but no adapter_model\.safetensors"):
        load(directory)
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle.*refused"):
        load(directory)

    for text in ("{", "[]", ""):
        (directory / peft.CONFIG_NAME).write_text(text)
        with pytest.raises(UserError, match=r"adapter_config\.json"):
            load(directory)


def replaced(key, values):
    return {**random_adapter(), key: values}


Q = ("layers", "self_attn", "q_proj")


@pytest.mark.parametrize(
    ("lora", "changes", "message"),
    [
        ({}, {}, "no matrices"),
        (replaced((*Q, "lora_a"), np.full((LAYERS, RANK, IN), np.nan, np.float32)), {}, "NaN or Inf"),
        (replaced((*Q, "lora_a"), np.ones((LAYERS, RANK + 1, IN), np.float32)), {}, r"q_proj has lora_a \(3, 5, 6\)"),
        (replaced((*Q, "lora_b"), np.ones((LAYERS - 1, OUT, RANK), np.float32)), {}, "q_proj has lora_a"),
        (replaced((*Q, "lora_b"), np.ones((OUT, RANK), np.float32)), {}, "q_proj has lora_a"),
        (replaced((*Q, "lora_c"), np.ones((LAYERS, OUT, RANK), np.float32)), {}, "lora_c is no LoRA matrix"),
        ({(*Q, "lora_a"): np.ones((LAYERS, RANK, IN), np.float32)}, {}, r"q_proj\.lora_b is missing"),
        (random_adapter(), {"target_modules": ("q_proj",)}, "target_modules"),
        (
            {("layers", "mlp", "fc", leaf[-1]): v for leaf, v in random_adapter().items() if "mlp" in leaf},
            {"target_modules": ("fc",)},
            r"layers\.mlp\.fc is no linear inside the layers of this model",
        ),
    ],
)
def test_refuses_to_save(tmp_path, lora, changes, message):
    with pytest.raises(UserError, match=message):
        save(tmp_path / "adapter", lora, **changes)
    assert list(tmp_path.iterdir()) == []


def test_overwrites_and_leaves_other_files_alone(tmp_path):
    directory = save(tmp_path / "adapter")
    (directory / "notes.txt").write_text("mine")
    second = random_adapter(seed=1)
    save(directory, second, alpha=8.5)
    again, config = load(directory)
    np.testing.assert_array_equal(again[(*Q, "lora_a")], second[(*Q, "lora_a")])
    assert config.alpha == 8.5
    assert (directory / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_failed_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    directory = save(tmp_path / "adapter")
    old = random_adapter()

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "save_file", disk_full)
    with pytest.raises(UserError, match=r"adapter cannot be written: the disk is full"):
        save(directory, random_adapter(seed=1))
    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path / "new", random_adapter(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    np.testing.assert_array_equal(load(directory)[0][(*Q, "lora_a")], old[(*Q, "lora_a")])


def test_what_a_failing_disk_wrote_is_not_kept(tmp_path, monkeypatch):
    """The empty and the altered adapter are caught by reading back."""
    write = peft.save_file

    def empty(tensors, path, metadata):
        write({}, path, metadata=metadata)

    def altered(tensors, path, metadata):
        write({name: values + 1 for name, values in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(peft, "save_file", empty)
    with pytest.raises(UserError, match="adapter is empty"):
        save(tmp_path / "adapter")
    monkeypatch.setattr(peft, "save_file", altered)
    with pytest.raises(UserError, match="reads back differently"):
        save(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_killed_while_replacing_leaves_nothing_that_loads(tmp_path, monkeypatch, killed_at):
    """Never the old matrices under the new configuration, or the reverse."""
    directory = save(tmp_path / "adapter")
    replace, calls = files.os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(directory, random_adapter(seed=1), alpha=8)
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        load(directory)

    (directory / f".{peft.WEIGHTS_NAME}.tmp").write_text("as SIGKILL would have left it")
    save(directory, random_adapter(seed=1), alpha=8)
    assert load(directory)[1].alpha == 8.0
    assert sorted(path.name for path in directory.iterdir()) == [
        files.CHECKSUMS_NAME, peft.CONFIG_NAME, peft.WEIGHTS_NAME,
    ]  # fmt: skip


def test_save_to_a_file_is_an_error(tmp_path):
    (tmp_path / "adapter").write_text("in the way")
    with pytest.raises(UserError, match="adapter cannot be written: File exists"):
        save(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    assert (tmp_path / "adapter").read_text() == "in the way"
