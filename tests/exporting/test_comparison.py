"""Costs of merges, measured layer by layer, against whole models: trained, written and read back."""

import dataclasses
import functools
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import batches, families
from fixtures.checkpoint_helpers import random_tensors, write_hf
from fixtures.finetune_helpers import SMALL_RUN, make_resumable, read_metrics, resumable_flags, run_in_process
from fixtures.tiny_configs import BIASED_LLAMA, BYTE_LLAMA
from fixtures.trained_adapters import random_adapter, write_adapter

from qlora_jax import data, exporting, models
from qlora_jax.checkpoints import gguf_writer
from qlora_jax.checkpoints.base_weights import BaseStorage, open_base
from qlora_jax.checkpoints.conversion import convert
from qlora_jax.checkpoints.gguf_writer import GGUF_FORMATS, codecs, write_gguf
from qlora_jax.checkpoints.hf_export import HuggingFaceFormat, codec, write_hugging_face
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.merging import Adapter
from qlora_jax.commands import merge as merge_command
from qlora_jax.errors import UserError
from qlora_jax.exporting import ComparisonConfig, compare, comparison
from qlora_jax.exporting.comparison import BASE, BESIDE, measure
from qlora_jax.files import damaged_file, write_checked_json
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.objectives import NextToken
from qlora_jax.training.step import make_eval_step

PLAIN = QuantizationConfig("none")
NF4 = QuantizationConfig("nf4", 32, True)
STORAGE = BaseStorage(NF4, adopt=False)
FLOAT32, BITSANDBYTES = HuggingFaceFormat("float32"), HuggingFaceFormat("float32", quantization=QuantizationConfig())
HF = {"safetensors": functools.partial(codec, storage=FLOAT32)}


def held_out(vocabulary: int, *, packed: bool) -> list[data.Batch]:
    """Two batches of two rows, of other lengths, in which every second and every third token is trained."""
    found = []
    for seed, length in enumerate((16, 24)):
        ids = np.random.default_rng(seed).integers(3, vocabulary, (2, length)).astype(np.int32)
        labels = np.where(np.arange(length) % (2 + seed) == 1, ids, data.IGNORED).astype(np.int32)
        arrays = {k: np.asarray(v) for k, v in batches.batch_of(ids, labels).items()}
        if packed:
            start = length // 2
            arrays["segment_ids"] = np.broadcast_to(1 + (np.arange(length) >= start), ids.shape).astype(np.int32)
            arrays["positions"] = np.broadcast_to(np.arange(length) % start, ids.shape).astype(np.int32)
        else:
            del arrays["segment_ids"]
        found.append(data.Batch(arrays))
    return found


def whole_loss(base: Path, quantization, rows: list[data.Batch], adapter: Adapter | None = None) -> float:
    """Mean loss of a loaded model, computed as a run evaluates."""
    loaded = load_base(base, quantization=quantization, dtype="float32")
    lora = (
        None
        if adapter is None
        else LoRAConfig(adapter.config.rank, adapter.config.alpha, 0.0, adapter.config.target_modules)
    )
    graphdef, trained, frozen = models.split_model(
        models.abstract_model(loaded.config, QLoRAConfig(quantization, jnp.float32, lora))
    )
    if adapter is not None:
        trained = models.unflatten_like(trained, adapter.tensors, what="adapter")
    step = make_eval_step(graphdef, objective=NextToken("segment_ids" in rows[0].arrays))
    sums = [step(trained, models.fill_base(frozen, loaded.tensors), batch) for batch in rows]
    return sum(float(each.loss) for each in sums) / sum(int(each.weight) for each in sums)


def results_of(base, adapter: Adapter, formats, rows: list[data.Batch]):
    return {each.name: each for each in measure(base, "dequantized", adapter, formats, rows, jnp.float32)}


# Gemma 3 has layers of two kinds and a tied head.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gemma3" else pytest.mark.e2e) for name in families.ONE_A_FAMILY]
)
def test_layer_by_layer_is_the_whole_model(name: str, tmp_path: Path):
    config = families.config(name)
    base = write_hf(tmp_path / "base", families.CASES[name]["config"], families.weights(name))
    adapter = random_adapter(tmp_path / "adapter", config, size=0.1)
    rows = held_out(config.vocab_size, packed=name == "gemma3")
    results = results_of(open_base(base, "dequantized", STORAGE), adapter, HF, rows)
    assert list(results) == [BASE, BESIDE, "safetensors"]
    losses = {name: each.held_out.loss for name, each in results.items()}
    assert abs(losses[BASE] - losses[BESIDE]) > 1e-3  # the adapter matters
    assert losses[BESIDE] == pytest.approx(whole_loss(base, NF4, rows, adapter), rel=1e-6)
    assert losses["safetensors"] == pytest.approx(losses[BESIDE], rel=1e-5)
    assert results[BASE].held_out.tokens == sum(int((batch["labels"][:, 1:] != data.IGNORED).sum()) for batch in rows)
    assert all(abs(share - 1) < 1e-3 for share in results["safetensors"].shares.values())


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["biased_llama", "gemma3"])
def test_formats_measure_what_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Losses are those of the exports, read back; shares those that an export prints."""
    monkeypatch.setattr(gguf_writer, "tokenizer_metadata", lambda *_: {})  # there is no tokenizer
    contents = BIASED_LLAMA if name == "biased_llama" else families.CASES[name]["config"]
    if name == "gemma3":  # as GGUF files have it
        contents = {**contents, "query_pre_attn_scalar": contents["head_dim"]}
    weights = random_tensors(BIASED_LLAMA) if name == "biased_llama" else families.weights(name)
    base = write_hf(tmp_path / "base", contents, weights)
    adapter = random_adapter(tmp_path / "adapter", models.model_config(contents), size=0.1)
    rows = held_out(models.model_config(contents).vocab_size, packed=False)
    opened = open_base(base, "dequantized", STORAGE)
    formats = {
        "bitsandbytes": functools.partial(codec, storage=BITSANDBYTES),
        "Q8_0": codecs(opened.config, GGUF_FORMATS["Q8_0"]),
    }
    results = results_of(opened, adapter, formats, rows)
    (tmp_path / "hf").mkdir()
    shares = {
        "bitsandbytes": write_hugging_face(opened, adapter, tmp_path / "hf", BITSANDBYTES),
        "Q8_0": write_gguf(
            opened, adapter, tmp_path / "model.gguf", GGUF_FORMATS["Q8_0"], metadata={"general.name": "t"}
        ),
    }
    for written, file in (("bitsandbytes", "hf"), ("Q8_0", "model.gguf")):
        assert results[written].shares == shares[written]
        assert results[written].held_out.loss == pytest.approx(whole_loss(tmp_path / file, PLAIN, rows), rel=1e-6)
    # Not the base's, nor the other's.
    assert len({each.held_out.loss for each in results.values()}) == 4
    # A converted base is read in another order.
    converted = convert(base, tmp_path / "converted", NF4, "float32").directory
    again = results_of(open_base(converted, "dequantized", BaseStorage()), adapter, formats, rows)
    assert {name: each.held_out for name, each in again.items()} == {
        name: each.held_out for name, each in results.items()
    }
    assert again["Q8_0"].shares == results["Q8_0"].shares


def test_runs_without_held_out_rows_need_some(tmp_path: Path):
    base = write_hf(tmp_path / "base", BIASED_LLAMA, random_tensors(BIASED_LLAMA))
    adapter = random_adapter(tmp_path / "adapter", models.model_config(BIASED_LLAMA), base=str(base))
    with pytest.raises(UserError, match=r"does not say which rows were held out; give some .* `eval_dataset`\.$"):
        compare(ComparisonConfig(str(adapter.path), ("safetensors",)))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--to gguf-q5_0,safetensors",
            r"^--to gguf-q5_0,safetensors: choose from safetensors, bitsandbytes,",
        ),
        ("--to ,", r"^--to ,: choose from safetensors, "),
        ("--eval_split test", r"^--eval_split has no effect without --eval_dataset; give that too"),
        ("--overwrite", r"^--overwrite has no effect without --output_dir;"),
        ("--output_dir out", r"^--output_dir: give the formats to write there as --to\."),
        ("--to gguf-f16 --dtype float32", r"^--dtype has no effect with --to gguf-f16;"),
        ("--to gguf-f16 --base original --quant_type nf4", r"^--quant_type has no effect with --base original;"),
        ("--block_size 32", r"^--block_size has no effect without --quant_type; leave it out\."),
    ],
)
def test_flags_that_cannot_be_are_refused(argv: str, message: str):
    with pytest.raises(UserError, match=message):
        merge_command.main(["run", *argv.split()])


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """Flags for an adapter without a run, and rows of one's own; the tokenizer has no merges."""
    make_resumable(tmp_path)
    write_adapter(tmp_path / "my adapter", models.model_config(BYTE_LLAMA), base=str(tmp_path / "model"))
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write("no row\n")
    return [str(tmp_path / "my adapter"), "--eval_dataset", str(tmp_path / "rows.jsonl"), "--max_eval_samples", "41"]


@pytest.mark.parametrize(
    ("formats", "taken", "message"),
    [
        ("safetensors,gguf-q8_0", None, r"has a tokenizer\.json without merges, which GGUF files must have; export to"),
        ("bitsandbytes,safetensors", "safetensors", r"safetensors exists and is no earlier export; choose another"),
        ("safetensors", ".", r"out/safetensors cannot be written: Not a directory; choose another output directory\.$"),
    ],
)
def test_what_cannot_be_written_is_refused_before_measuring(
    own: list[str], formats: str, taken: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exporting, "compare", lambda *_: pytest.fail("it was measured"))
    out = tmp_path / "out"
    if taken is not None:
        (out / taken).parent.mkdir(exist_ok=True)
        (out / taken).touch()
    with pytest.raises(UserError, match=message):
        merge_command.main([*own, "--to", formats, "--output_dir", str(out)])
    assert not list(out.glob("*/*"))


def test_rows_that_cannot_be_used_are_left_out_on_request(own: list[str], capsys: pytest.CaptureFixture[str]):
    argv = [*own, "--to", "safetensors", "--base", "original", "--dtype", "float32"]
    with pytest.raises(UserError, match=r"rows\.jsonl line 41: .* or leave such rows out with --on_bad_row skip\.$"):
        merge_command.main(argv)
    assert merge_command.main([*argv, "--on_bad_row", "skip"]) == 0
    out = capsys.readouterr().out
    assert "40 of 41 rows used" in out
    assert f"export '{own[0]}' DIRECTORY --to FORMAT --base BASE --dtype float32\n" in out


def test_formats_that_cannot_hold_the_model_are_left_out_unless_they_are_asked_for(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = []
    monkeypatch.setattr(comparison, "measure", lambda *arguments: measured.append(list(arguments[3])) or [])
    config = ComparisonConfig(own[0], eval_dataset=str(tmp_path / "rows.jsonl"), on_bad_row="skip")
    _, notes = compare(config)
    assert measured == [["safetensors", "bitsandbytes"]] * 2
    (note,) = (note for note in notes if "GGUF" in note)
    assert "without merges" in note
    with pytest.raises(UserError, match="without merges"):
        compare(dataclasses.replace(config, formats=("gguf-f16",)))


def test_adapters_of_other_models_are_refused_before_rows_are_read(own: list[str], tmp_path: Path):
    other = write_hf(tmp_path / "other", BIASED_LLAMA, random_tensors(BIASED_LLAMA))
    config = ComparisonConfig(own[0], ("safetensors",), model=str(other), eval_dataset=str(tmp_path / "missing"))
    layers = BIASED_LLAMA["num_hidden_layers"]
    with pytest.raises(
        UserError, match=rf"my adapter/\S+: \S+ is missing; every layer, of which the model has {layers}, "
    ):
        compare(config)


def test_flags_of_other_versions_are_not_ignored(own: list[str], tmp_path: Path):
    write_checked_json(tmp_path / "run.json", {"flags": {"do_eval": True, "held_out": 3}})
    shutil.copytree(own[0], tmp_path / "adapter")
    with pytest.raises(UserError, match=r"run\.json of \S+ has held_out, which this version .* with `eval_dataset`\.$"):
        compare(ComparisonConfig(str(tmp_path), ("safetensors",), model=str(tmp_path / "model")))


@pytest.mark.e2e
def test_a_run_is_measured_as_it_measured_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_resumable(tmp_path)
    assert run_in_process(resumable_flags(tmp_path, "run", SMALL_RUN | {"max_steps": 3})) == 0
    ending = [line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line]
    config = ComparisonConfig(str(tmp_path / "run"), ("safetensors",), dtype="float32")
    results, notes = compare(config)
    by_name = {(each.base, each.name): each for each in results}
    assert by_name["dequantized", BASE].held_out.loss == pytest.approx(ending[0], rel=1e-6)
    assert by_name["dequantized", BESIDE].held_out.loss == pytest.approx(ending[-1], rel=1e-6)
    assert by_name["dequantized", "safetensors"].held_out.loss == pytest.approx(ending[-1], rel=1e-5)
    assert by_name["original", BASE].held_out.loss != pytest.approx(ending[0], rel=1e-6)
    assert sum("rows" in note for note in notes) == 2
    # With rows of one's own, and the merged models written.
    capsys.readouterr()
    own = ["--eval_dataset", str(tmp_path / "rows.jsonl"), "--max_eval_samples", "2"]
    argv = [str(tmp_path / "run"), *own, "--to", "bitsandbytes,safetensors", "--output_dir", str(tmp_path / "out")]
    assert merge_command.main(argv) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^  (dequantized|original): bitsandbytes +\d\.\d{4} ", out, re.MULTILINE)) == 2
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["bitsandbytes", "safetensors"]
    assert damaged_file(tmp_path / "out" / "bitsandbytes") is None
