"""Models found by file, directory, preset or hub id."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures.tiny_configs import SMALL

from qlora_jax import models
from qlora_jax.checkpoints import hub
from qlora_jax.checkpoints.hub import resolve_config
from qlora_jax.defaults import DEFAULT_MODEL
from qlora_jax.errors import UserError


def test_a_model_is_a_file_a_directory_or_a_preset(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert resolve_config(tmp_path) == resolve_config(str(tmp_path / "config.json")) == models.model_config(SMALL)
    assert resolve_config(tmp_path).source == SMALL
    assert resolve_config("llama-7b").source == models.PRESETS["llama-7b"]


@pytest.mark.parametrize("beside", [[], ["hf_quant_config.json"]])
def test_of_a_hub_id_only_the_config_is_fetched(beside, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    asked = []

    def download(name, file, local_files_only=False, **_):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        asked.append((name, file))
        return str(tmp_path / file)

    class Hub:
        def model_info(self, name, timeout):
            files = ["config.json", "model.safetensors", *beside]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    for file in beside:
        said = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "*.q_proj"]}}
        (tmp_path / file).write_text(json.dumps(said))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    config = resolve_config("some/model")
    assert config.source == SMALL
    assert len(config.stored) == (6 if beside else 0)
    assert asked == [("some/model", file) for file in [*beside, "config.json"]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-9b", r"^llama-9b is neither a file nor a directory; .* or one of llama-7b, .*smollm2-135m\.$"),
        ("some/model", r"hub cannot be reached .* give its config\.json, or one of llama-7b"),
        ("falcon.json", r"architecture 'FalconForCausalLM' is not supported"),
        (".", r"config\.json is missing; give a model directory"),
        ("broken.json", r"broken\.json is not valid JSON"),
    ],
)
def test_a_model_that_is_none_is_told_in_one_sentence(name, message, tmp_path, monkeypatch):
    import huggingface_hub

    class Nowhere:
        def model_info(self, name, timeout):
            raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "HfApi", Nowhere)
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("falcon.json").write_text('{"architectures": ["FalconForCausalLM"]}')
    with pytest.raises(UserError, match=message):
        resolve_config(name)


def test_out_of_reach_the_default_model_is_planned_as_its_package_stores_it(monkeypatch):
    def unreachable(name):
        raise hub._HubUnreachable("no network")

    monkeypatch.setattr(hub, "_config_from_hub", unreachable)
    config = hub.resolve_config(DEFAULT_MODEL)
    assert config.hidden_size == 576
    assert {str(storage) for _, storage in config.stored} == {"q4_1"} and len(config.stored) == 7
    with pytest.raises(UserError, match="cannot be reached"):
        hub.resolve_config("somebody/else")
