"""The installed program, its commands, and the scripts of their names."""

import json
import pkgutil
import resource
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from qlora_jax import commands
from qlora_jax.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize("argv", [(), ("-h",), ("--help",)])
def test_without_a_command_they_are_listed(argv, capsys):
    assert commands.main(argv) == 0
    text = capsys.readouterr().out
    for name, description in commands.COMMANDS.items():
        assert f"  {name} " in text and description in text


@pytest.mark.parametrize("argv", [["--version"], ["finetune", "--version"], ["plan", "--version"]])
def test_the_version(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        sys.exit(commands.main(argv))
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qlora-jax {version('qlora-jax')}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["finetun"], r"^unknown command 'finetun'; choose from finetune, .*\. Did you mean finetune\? See qlora-jax"),
        (
            ["--packing"],
            r"^unknown command '--packing'; choose from finetune, chat, generate, serve, plan, convert, merge, export, "
            r"benchmark\. See",
        ),
        (
            ["benchmark", "kernel"],
            r"^unknown command .*Did you mean kernels\? See qlora-jax benchmark --help",
        ),
        (["plan"], r"arguments are required: MODEL\. See qlora-jax plan --help\.$"),
        (["convert", "a", "b", "--block", "3"], r"^unknown flag --block\. .*See qlora-jax convert --help\.$"),
    ],
)
def test_an_unknown_command_is_told_in_one_sentence(argv, message):
    with pytest.raises(UserError, match=message):
        commands.main(argv)


@pytest.mark.parametrize("name", ["rows", "models", "implementations", "direction", "tuning"])
def test_flags_of_timing_are_not_ignored_where_kernels_are_counted(name, tmp_path):
    argv = ["benchmark", "kernels", "--static", "--output_dir", str(tmp_path), f"--{name}", "both"]
    if name == "tuning":
        argv[-1] = "False"
    with pytest.raises(UserError, match=f"^--{name} is for timing, .*instructions are counted; leave it out"):
        commands.main(argv)


def test_the_installed_program_is_the_one_tested_here():
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["qlora-jax"]) is commands.entry


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_script_is_the_command_of_its_name(name, capsys, monkeypatch):
    if name == "benchmark":
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "step", "--help"])
    else:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    script = capsys.readouterr().out
    with pytest.raises(SystemExit):
        commands.main([name, *sys.argv[1:]])
    usage, _, flags = script.partition("\n\n")
    assert usage.startswith(f"usage: python scripts/{name}.py ")
    assert flags == capsys.readouterr().out.partition("\n\n")[2]


def test_help_is_quick_and_loads_no_jax():
    program = """
import json, sys
from qlora_jax import commands
for argv in (*([name] for name in commands.COMMANDS), ["benchmark", "step"], ["benchmark", "kernels"]):
    try:
        commands.main([*argv, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"jax", "jaxlib", "flax", "numpy", "orbax", "transformers", "datasets", "torch", "matplotlib"}
    # Of the processor, all together: a busy machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
