"""Bounds on generation: bytes are those of the arrays that answer, and the least time follows from them."""

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path

import jax
import pytest
from fixtures import families
from fixtures.finetune_helpers import make_model
from fixtures.tiny_configs import BYTE_LLAMA, LLAMA, SMALL
from fixtures.trained_adapters import write_adapter

from qlora_jax import models
from qlora_jax.commands import plan as plan_command
from qlora_jax.errors import UserError
from qlora_jax.generation import Engine, EngineOptions
from qlora_jax.gpus import CHIPS
from qlora_jax.models.presets import PRESETS
from qlora_jax.planner import decoding, tree_bytes
from qlora_jax.serving.model import ServingConfig, load_served
from qlora_jax.training import setup
from qlora_jax.training.config import STEP_FLAGS, TrainConfig

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"


known_steps = functools.cache(decoding.decode_steps)


@pytest.fixture(autouse=True)
def steps_are_kept(monkeypatch):
    monkeypatch.setattr(decoding, "decode_steps", known_steps)


def request(contents, batches, contexts, **settings):
    return decoding.Request("m", models.model_config(contents), TrainConfig(**settings), batches, contexts)


def planned(capsys, *argv):
    plan_command.main([*argv, "--decode", "--json"])
    told = capsys.readouterr()
    assert not told.err
    return json.loads(told.out)


@pytest.mark.parametrize("name", families.ONE_A_FAMILY)
def test_the_cache_has_the_bytes_of_an_engines(name):
    asked = request(families.CASES[name]["config"], (1, 3), (48,), lora_r=2, bits=16)
    parts = setup.declare(asked.config, asked.model_config, "gpu").parts
    _, kv_heads, width = asked.model_config.heads
    # Windows keep no more tokens than they see.
    kept = sum(min(facts.window or 48, 48) for facts in asked.model_config.attentions)
    for step in decoding.decode_steps(asked):
        engine = Engine(parts.graphdef, parts.lora, parts.frozen, EngineOptions(step.batch, 48), eos_ids=[])
        cache = jax.tree.leaves(engine._state.cache)
        assert step.by_class["cache"] == sum(leaf.nbytes for leaf in cache)
        assert step.by_class["cache"] == step.batch * (2 * 2 * kept * kv_heads * width + 4)
        assert step.cache_dtypes == ("bfloat16",)
        (rounded,) = decoding.decode_steps(dataclasses.replace(asked, batches=(step.batch,), cache_dtype="int8"))
        assert rounded.by_class["cache"] == step.batch * (2 * kept * kv_heads * (width + 4) + 4)
        assert step.work.device_bytes - rounded.work.device_bytes == step.by_class["cache"] - rounded.by_class["cache"]
        assert "base_packed" not in step.by_class
    if "gemma3" in name:
        assert kept < 48 * len(asked.model_config.attentions)


def test_bytes_are_those_of_a_model_that_is_served(tmp_path, capsys):
    base, config = make_model(tmp_path / "base"), models.model_config(BYTE_LLAMA)
    adapter = write_adapter(tmp_path / "adapter", config, base=str(base))
    found = planned(capsys, str(base), "--gpu", "l4", "--adapter", str(adapter), "--batch", "3", "--seq", "300")
    served = load_served(ServingConfig({"one": str(adapter)}, str(base), dtype="bfloat16"))
    engine = served.engine(EngineOptions(3, 300))
    (step,) = found["steps"]
    classes = step["by_class"]
    allowance = classes.pop("allowance")
    weights = sum(count for name, count in classes.items() if name.startswith(("base", "scales", "unquantised")))
    assert weights == tree_bytes(served.frozen)
    assert classes["adapters"] == tree_bytes(served.lora)
    assert classes["logits"] == engine._state.logits.nbytes
    assert sum(classes.values()) == tree_bytes((served.frozen, served.lora, engine._state))
    assert step["device_bytes_at_least"] == sum(classes.values()) + allowance
    # Moved: all of it but the logits, the other adapter, and rows of the embedding that no token has.
    rows = 3 * classes["unquantised_embedding"] // config.vocab_size
    assert step["bytes_moved_at_least"] == (
        weights - classes["unquantised_embedding"] + rows + classes["adapters"] // 2 + classes["cache"]
    )
    (warning,) = found["warnings"]
    assert warning.startswith("config.json gives the model 256 positions;")


def test_llama_8b_on_a_4090_by_hand():
    """From the figures in config.json and on the sheet alone."""
    width, feed_forward, layers, heads, kv_heads, head, vocabulary = 4096, 14336, 32, 32, 8, 128, 128256
    rows, tokens, rank = 4, 8192, 64
    shapes = [(width, width)] * 2 + [(kv_heads * head, width)] * 2 + [(feed_forward, width)] * 3
    weights = layers * sum(n * k for n, k in shapes)
    lora = layers * sum(rank * (n + k) for n, k in shapes)
    # An 8-bit scale for 64 weights, a float32 for 256 scales, and one for a matrix.
    base = weights // 2 + weights // 64 + 4 * weights // 64 // 256 + 4 * layers * len(shapes)
    norms, table = 4 * width * (2 * layers + 1), 2 * vocabulary * width
    cache = rows * (2 * tokens * layers * kv_heads * head * 2 + 4)
    moved = base + norms + table + rows * 2 * width + (2 * lora + 4) + cache
    flops = rows * (2 * (weights + lora + vocabulary * width) + 4 * tokens * heads * head * layers)

    (step,) = decoding.decode_steps(request(PRESETS["llama-3.1-8b"], (rows,), (tokens,)))
    bound = decoding.DecodeBound(CHIPS["rtx4090"], step).bound
    assert step.work.device_bytes == moved
    assert step.work.flops == flops
    assert bound.memory == moved / 1008e9
    assert bound.compute == flops / 165.2e12
    assert bound.limited_by == "memory"
    assert bound.tokens_per_second == pytest.approx(rows * 1008e9 / moved)
    assert sum(step.by_class.values()) == (
        base + norms + 2 * table + 2 * (2 * lora + 4) + cache + rows * (4 * vocabulary + 4 * tokens + 4)
    )


def test_more_rows_and_tokens_take_more_and_rows_share_the_weights():
    asked = request(SMALL, (1, 4, 64, 4096), (128, 8192))
    steps = decoding.decode_steps(asked)
    bounds = {(step.batch, step.context): decoding.DecodeBound(CHIPS["rtx3060"], step) for step in steps}
    columns = [[bounds[batch, context] for batch in asked.batches] for context in asked.contexts]
    for line in (*columns, *zip(*columns, strict=True)):
        for less, more in itertools.pairwise(line):
            assert less.device_bytes < more.device_bytes
            assert less.bound.seconds < more.bound.seconds
            assert less.fits or not more.fits
    for column in columns:
        rates = [one.bound.tokens_per_second for one in column]
        assert rates == sorted(rates)
        # Many rows share what all read: each is left with its own cache, or its own products.
        one, many, most = column[0], column[-2], column[-1]
        chip, more = one.chip, most.step.batch - many.step.batch
        own_bytes = (most.step.work.device_bytes - many.step.work.device_bytes) / more
        limit = max(own_bytes / chip.memory_bandwidth, one.step.work.flops / chip.bf16_flops)
        assert 0.9 / limit < rates[-1] < (1 + 1e-9) / limit
    assert {one.bound.limited_by for one in bounds.values()} == {"memory", "compute"}
    largest = decoding.largest_that_fits(columns[1])
    assert largest is not None and largest.step.batch == 64
    assert decoding.largest_that_fits(columns[1][-1:]) is None


@pytest.mark.parametrize(
    ("contents", "contexts"),
    [(LLAMA, (128,)), (SMALL, (2048, 8192)), (PRESETS["qwen3-8b"], (2048, 8192, 32768))],
)
def test_contexts_end_at_the_models_positions(contents, contexts):
    assert decoding.contexts_within(models.model_config(contents).max_position_embeddings) == contexts


def test_a_cell_says_what_does_not_fit(capsys):
    asked = ["smollm2-135m", "--decode", "--gpu", "rtx3060"]
    plan_command.main(asked)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "smollm2-135m on NVIDIA GeForce RTX 3060: generation with a cache in bfloat16; the model has 8,192 positions"
    )
    assert sum(line.split() == ["batch", "2,048", "8,192"] for line in lines) == 3
    memory, milliseconds, rates = [line for line in lines if re.match(r" +64 ", line)]
    assert re.fullmatch(r" +64 +3\.7 GiB +does not fit: 12\.2 GiB", memory)
    assert re.fullmatch(r" +64 +[\d.]+ +does not fit", milliseconds)
    assert re.fullmatch(r" +64 +[\d,]+ \([\d.]+\) +does not fit", rates)
    assert lines[-3:] == decoding.NOT_MEASURED.splitlines()
    assert lines[-3].startswith("Bounds from data-sheet peaks, not measurements or predictions")
    plan_command.main([*asked, "--batch", "512", "--seq", "128"])
    told = capsys.readouterr()
    assert not told.err
    assert len(re.findall(r"^ +512 .*", told.out, re.MULTILINE)) == 3
    assert re.search(r"^ +512 +[\d.]+ \(compute\)$", told.out, re.MULTILINE)


def test_all_gpus_and_json_say_the_same(capsys):
    plan_command.main(["smollm2-135m", "--decode", "--all_gpus", "--seq", "4096"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.split()[0] in CHIPS}
    found = planned(capsys, "smollm2-135m", "--all_gpus", "--seq", "4096")
    assert list(rows) == list(found) == list(CHIPS)
    for name, value in found.items():
        steps = {step["batch"]: step for step in value["steps"]}
        assert tuple(steps) == decoding.BATCHES
        largest = max(batch for batch, step in steps.items() if step["fits"])
        expected = [f"{1e3 * steps[1]['seconds_a_token_at_least']:#.3g}", f"{largest}"]
        assert [rows[name][5], rows[name][7]] == expected
        assert value["device_limit_bytes"] == CHIPS[name].memory_bytes
        # The head is the embedding here, of which a step reads every row.
        classes = steps[1]["by_class"]
        base = sum(classes[kind] for kind in ("base_packed", "scales", "unquantised_embedding", "unquantised_norm"))
        assert steps[1]["bytes_moved_at_least"] == base + classes["adapters"] // 2 + classes["cache"]
        for batch, step in steps.items():
            assert step["fits"] == (step["device_bytes_at_least"] <= value["device_limit_bytes"])
            assert step["tokens_per_second_at_most"] == pytest.approx(batch / step["seconds_a_token_at_least"])
            assert step["tokens_per_second_a_row_at_most"] == pytest.approx(1 / step["seconds_a_token_at_least"])
    plan_command.main(["llama-65b", "--decode", "--all_gpus", "--batch", "2", "--seq", "4096"])
    told = capsys.readouterr()
    assert "largest batch" not in told.out
    assert re.search(r"^  rtx4090 +24\.0 GiB +does not fit: [\d.]+ GiB +- +-$", told.out, re.MULTILINE)
    assert told.err.startswith("Note: config.json gives the model 2,048 positions;")


TRAINING = [
    name for name in (*STEP_FLAGS, "max_seq", "host_memory_gb", "dataset_tokens", "dataset_rows")
    if name not in plan_command.SHAPES_GENERATION
]  # fmt: skip


def test_flags_of_training_are_refused():
    defaults = {field.name: field.default for field in dataclasses.fields(plan_command.schema())}
    given = {"remat": "full", "optim_placement": "host"}
    argv = ["llama-7b", "--decode", "--gpu", "l4"]
    for name in TRAINING:
        argv += [f"--{name}", str(given.get(name, 5 if defaults[name] is None else defaults[name]))]
    with pytest.raises(UserError) as refused:
        plan_command.main(argv)
    for name in TRAINING:
        assert f"--{name} has no effect with --decode, which plans no training; leave it out." in str(refused.value)
    assert {"optim", "remat", "max_seq", "dataset_tokens", "packing", "lora_alpha", "kernel"} <= set(TRAINING)
    with pytest.raises(UserError, match=r"^--max_seq has no effect with --decode, .*; leave it out\. See"):
        plan_command.main(["llama-7b", "--decode", "--gpu", "l4", "--max_seq"])
    with pytest.raises(UserError, match=r"^Give --gpu NAME, one of a100, .*, or --all_gpus\."):
        plan_command.main(["llama-7b", "--decode"])


@pytest.mark.e2e
@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-3.3-70b"])
def test_the_page_has_what_the_command_prints(model, capsys):
    text = PAGE.read_text(encoding="utf-8").partition(f"\n| {model} |")[2].partition("\n\n")[0]
    header, _, *lines = text.splitlines()
    contexts = [int(cell.replace(",", "")) for cell in header.strip("| ").split(" | ")]
    assert contexts == list(decoding.CONTEXTS)
    table = {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in lines)}
    assert set(table) <= set(CHIPS)
    for column, context in enumerate(contexts):
        plan_command.main([model, "--decode", "--all_gpus", "--seq", str(context)])
        printed = [line.split() for line in capsys.readouterr().out.splitlines()]
        for name, *words in (words for words in printed if words[0] in table):
            cell = table[name][column]
            if "fit:" in words:
                assert cell == f"needs {words[5]} GiB"
            else:
                one, batch, _, rate = words[-4:]
                assert cell == (one if batch == "1" else f"{one}; {batch} rows {rate}")
