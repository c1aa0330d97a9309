"""The command that installs an optional extra."""

from pathlib import Path

from qlora_jax import extras


def test_an_extra_is_installed_from_where_the_package_runs(monkeypatch, tmp_path):
    assert extras.install_command("plan") == f"pip install -e '{Path(__file__).parents[1]}[plan]'"
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "qlora_jax" / "extras.py"))
    assert extras.install_command("plan") == "pip install 'qlora-jax[plan]'"
