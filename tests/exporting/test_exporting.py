"""Exports of runs: whole or not there, of every format, with what is said beside the weights."""

import json
import subprocess
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from fixtures.finetune_helpers import (
    SMALL_RUN,
    make_model_with_merges,
    make_resumable,
    make_tokenizer,
    resumable_flags,
    run_in_process,
)
from fixtures.trained_adapters import write_adapter
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import gguf_writer
from qlora_jax.checkpoints.gguf_source import GGUFSource
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.checkpoints.sources import open_source
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.commands import export as export_command
from qlora_jax.data import FORMATS
from qlora_jax.errors import UserError
from qlora_jax.exporting import EXPORT_FILE, ExportConfig, export, parse_size
from qlora_jax.exporting.modelfile import KNOWN, modelfile
from qlora_jax.files import damaged_file, write_checked_json
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.trained import find_trained

TARGETS = export_command.ExportFlags.__dataclass_fields__["to"].type.__args__


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_with_merges(tmp_path_factory.mktemp("model") / "tiny-model")


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A finished run: run.json, summary.json and an adapter."""
    directory = tmp_path / "run"
    directory.mkdir()
    flags = TrainConfig(
        model_name_or_path=str(model),
        bits=4,
        block_size=64,
        dataset="/secret/place/rows.jsonl",
        output_dir="/secret/out",
    )
    facts = {"versions": {"jax": "1.2.3"}, "dataset_format": "oasst1"}
    contents = {"flags": vars(flags), "identity": {}, "facts": facts, "wrote": []}
    write_checked_json(directory / "run.json", contents)
    summary = {"steps": 7, "last_loss": 1.25, "bytes": {"base_packed": 2048}, "files": {}}
    write_checked_json(directory / "summary.json", summary)
    write_adapter(directory / "adapter", open_source(model).config, base=str(model))
    return directory


@pytest.mark.parametrize("target", TARGETS)
def test_every_format_is_whole_and_says_what_it_is(run: Path, tmp_path: Path, target: Any):
    result = export(ExportConfig(str(run), str(tmp_path / "out"), to=target))
    assert damaged_file(result.directory) is None
    record = json.loads((result.directory / EXPORT_FILE).read_text())
    assert record["format"] == target
    assert record["storage"] == "nf4 in blocks of 64 with double quantisation"
    assert record["model"] == "tiny-model"
    card = (result.directory / "README.md").read_text()
    assert "| last_loss | 1.25 |" in card
    assert "| jax | 1.2.3 |" in card
    assert "| base_packed | 2.0 KiB |" in card
    assert "rows.jsonl" in card
    for file in ("README.md", EXPORT_FILE, "Modelfile"):
        if (result.directory / file).is_file():
            assert "secret" not in (result.directory / file).read_text()
            assert str(tmp_path) not in (result.directory / file).read_text()
    assert len(result.shares) == (0 if target == "gguf-lora" else 14)
    assert {file.suffix for file in result.directory.iterdir()} & {".gguf", ".safetensors"}
    if target == "gguf-lora":
        assert "### Human:" in (result.directory / "Modelfile").read_text()
    else:
        tokenizer = load_tokenizer(next(result.directory.glob("*.gguf"), result.directory))
        assert tokenizer.chat_template == FORMATS["oasst1"].template


@pytest.mark.e2e
def test_a_run_and_its_checkpoints_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_resumable(tmp_path)
    flags = resumable_flags(tmp_path, "run", SMALL_RUN)
    assert run_in_process(flags) == 0
    checkpoint = min(entry.name for entry in (tmp_path / "run").glob("checkpoint-*"))
    for place in ("run", f"run/{checkpoint}"):
        capsys.readouterr()
        export_command.main([str(tmp_path / place), str(tmp_path / "out"), "--overwrite"])
        assert "%" in capsys.readouterr().out
        assert "| lora_r |" in (tmp_path / "out" / "README.md").read_text()


def test_gguf_adapter_holds_the_matrices_with_rows_as_the_base_has_them(run: Path, tmp_path: Path, model: Path):
    config = open_source(model).config
    result = export(ExportConfig(str(run), str(tmp_path / "out"), to="gguf-lora"))
    reader = GGUFReader(result.directory / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    expected = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    assert expected.items() <= fields.items()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    lora, _ = load_adapter(run / "adapter", config)
    assert len(tensors) == sum(len(matrices) for matrices in lora.values())
    # The product of the two is the change of the base's tensor, whose rows GGUF has in another order.
    export(ExportConfig(str(run), str(tmp_path / "merged"), to="gguf-f16", base="original"))
    merged, plain = (
        GGUFReader(tmp_path / "merged" / "model-F16.gguf"),
        GGUFSource(tmp_path / "merged" / "model-F16.gguf"),
    )
    weights = {tensor.name: tensor.data for tensor in merged.tensors}
    base = open_source(model)
    for module, name in (("self_attn.q_proj", "attn_q"), ("mlp.up_proj", "ffn_up")):
        a, b = (tensors[f"blk.1.{name}.weight.lora_{matrix}"].data for matrix in "ab")
        before, after = base.read(f"model.layers.1.{module}.weight"), weights[f"blk.1.{name}.weight"]
        if name == "attn_q":
            before = gguf_writer.interleaved(before, config.head_dim)
            assert not np.allclose(after, plain.read(f"model.layers.1.{module}.weight"), atol=1e-2)
        np.testing.assert_allclose(before + 2 * b @ a, after, atol=1e-3)


def test_earlier_exports_are_replaced_on_request_only(run: Path, tmp_path: Path):
    config = {"adapter": str(run), "output_dir": str(tmp_path / "out")}
    export(ExportConfig(**config))
    with pytest.raises(UserError, match="already holds an export; set `overwrite`"):
        export(ExportConfig(**config))
    export(ExportConfig(**config, to="gguf-lora", overwrite=True))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(UserError, match="is no earlier export"):
        export(ExportConfig(str(run), str(run), overwrite=True))


def test_changes_that_overflow_are_not_written(run: Path, model: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", open_source(model).config, base=str(model), size=1e20)
    with pytest.raises(
        UserError, match=r"adapter: the change of model\.layers\.0\.\S+ overflows float32; .* another\.$"
    ):
        export(ExportConfig(str(adapter), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_repositories_that_cannot_be_are_refused_before_the_export(tmp_path: Path):
    with pytest.raises(UserError, match=r"^`push_to_hub=no repo!`: Repo id must use .*; give OWNER/NAME\.$"):
        export(ExportConfig(str(tmp_path / "run"), str(tmp_path / "out"), push_to_hub="no repo!"))


def test_original_weights_that_are_not_finite_are_not_exported(run: Path, tmp_path: Path):
    model = make_model_with_merges(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight in \S+model\.safetensors holds NaN or infinity; "):
        export(ExportConfig(str(run), str(tmp_path / "out"), base="original", model=str(model)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], r"run\.json is damaged \(it has no flags\)"),
        ({"quant_type": "nf4"}, r"does not say bits, block_size, double_"),
    ],
)
def test_records_of_other_versions_are_refused(run: Path, tmp_path: Path, flags: Any, message: str):
    write_checked_json(run / "run.json", {"flags": flags})
    with pytest.raises(UserError, match=message):
        export(ExportConfig(str(run), str(tmp_path / "out"), to="gguf-lora"))


def test_adapters_are_found_where_they_are(run: Path, tmp_path: Path):
    assert find_trained(run).adapter == run / "adapter"
    alone = find_trained(run / "adapter")
    assert alone.flags["bits"] == 4
    assert alone.summary["steps"] == 7
    (run / "adapter").rename(run / "checkpoint-000003")
    with pytest.raises(UserError, match=r"holds no adapter .*give .*checkpoint-000003\.$"):
        find_trained(run)
    assert find_trained(run / "checkpoint-000003").flags["bits"] == 4
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        find_trained(run / "checkpoint-000003")


def test_an_untrained_adapter_and_an_erased_one_are_told(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = open_source(model).config
    write_adapter(tmp_path / "zero", config, base=str(model), size=0.0)
    export(ExportConfig(str(tmp_path / "zero"), str(tmp_path / "a"), to="safetensors"))
    assert "it was not trained" in caplog.text
    write_adapter(tmp_path / "small", config, base=str(model), size=0.003)
    export(ExportConfig(str(tmp_path / "small"), str(tmp_path / "b"), to="bitsandbytes"))
    told = next(record.getMessage() for record in caplog.records if "less than 10 %" in record.getMessage())
    assert "model.layers.0." in told
    assert "and 9 more" in told


def test_pushing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> None:
            assert damaged_file(options["folder_path"]) is None  # all is written before
            calls.append(("upload", options))
            raise OSError(5, "no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(UserError, match=r"is complete, but could not be pushed to me/it \(no route\)"):
        export(ExportConfig(str(run), str(tmp_path / "out"), to="gguf-lora", push_to_hub="me/it"))
    assert calls[0] == ("me/it", {"private": True, "exist_ok": True})
    assert (tmp_path / "out" / EXPORT_FILE).is_file()


CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}{{ '<start_of_turn>model\n' }}"
)


@pytest.mark.parametrize(
    ("template", "name", "system"),
    [(CHATML, "ChatML", "Be brief."), (LLAMA_3, "Llama 3", None), (GEMMA, "Gemma", None)],
)
def test_modelfiles_have_the_template_of_training(template: str, name: str, system: str | None):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = template
    text = modelfile("./model.gguf", tokenizer)
    assert text.startswith("FROM ./model.gguf\nTEMPLATE")
    assert KNOWN[name].ollama in text
    assert f'PARAMETER stop "{KNOWN[name].stop}"' in text
    assert ("SYSTEM" in text) == (system is not None)
    assert system is None or f'SYSTEM """{system}"""' in text


def test_templates_in_ollamas_language():
    assert KNOWN["ChatML"].ollama == (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )
    assert '{{ if eq .Role "assistant" }}model{{ else }}{{ if eq .Role' not in KNOWN["ChatML"].ollama
    assert KNOWN["Gemma"].ollama.startswith(
        '{{- range .Messages }}<start_of_turn>{{ if eq .Role "system" }}user{{ else }}'
    )


def test_other_templates_are_left_to_the_gguf_file():
    tokenizer = make_tokenizer()
    for template in (
        None,
        CHATML.replace("Be brief.", "Be brief.\n").replace("assistant\n", "assistant\n\n"),
        "{{ x.y.z }}",
    ):
        tokenizer.chat_template = template
        text = modelfile("./model.gguf", tokenizer, adapter="./adapter.gguf", note="Hello.")
        assert text.startswith("# Hello.\nFROM ./model.gguf\nADAPTER ./adapter.gguf\n# The chat template is the GGUF")
        assert f'PARAMETER stop "{tokenizer.eos_token}"' in text
    assert "TEMPLATE" not in text
    text = modelfile("./model.gguf", tokenizer, dataset_format="oasst1")
    assert "### Human: {{ .Content }}### Assistant:" in text
    assert 'PARAMETER stop "### Human:"' in text


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "300mb", "1.5 K", "7")] == [5 * 10**9, 3 * 10**8, 1500, 7]
    for text in ("much", "0.9", "9" * 400):
        with pytest.raises(UserError, match=rf"`max_shard_size={text}`: give a size such as 5GB\."):
            parse_size(text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--to gguf-q8_0 --dtype float16", r"^--dtype has no effect with --to gguf-q8_0;"),
        ("--to gguf-lora --base original", r"^--base has no effect with --to gguf-lora;"),
        ("--block_size 32", r"^--block_size has no effect without --quant_type;"),
        ("--quant_type int8 --double_quant", r"^--double_quant has no effect with --quant_type int8;"),
        ("--base original --quant_type nf4", r"^--quant_type has no effect with --base original;"),
    ],
)
def test_flags_without_an_effect_are_refused(argv: str, message: str):
    with pytest.raises(UserError, match=message):
        export_command.main(["run", "out", *argv.split()])


def test_serving_commands():
    commands = export_command.serving_commands
    assert commands("bitsandbytes", Path("a b"), ["config.json"])[0] == "vllm serve 'a b'"
    assert commands("gguf-lora", Path("out"), ["adapter.gguf"])[0] == "llama-cli -m BASE.gguf --lora out/adapter.gguf"


def test_the_command_prints_what_survives(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export_command.main([str(run), str(tmp_path / "out"), "--to", "gguf-q8_0", "--base", "original"])
    out = capsys.readouterr().out
    assert "share of the trained change that survives rounding" in out
    assert "model-Q8_0.gguf" in out
    assert "(model.layers." in out
    file = tmp_path / "out" / "model-Q8_0.gguf"
    assert out.endswith(f"Serve it\n  llama-cli -m {file}\n  ollama create NAME -f {file.parent}/Modelfile\n")
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path / "out", capture_output=True, check=True)
    assert done.stdout.count(b": OK") == 4
