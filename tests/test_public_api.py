"""The public interface: what it offers, what it loads, and which part of the package may import which."""

import ast
import dataclasses
import graphlib
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_jax

ROOT = Path(__file__).parents[1]

# Lowest floor first. A module imports from its own room and from the floors below it.
FLOORS = (
    ("choices", "defaults", "device_memory", "errors", "extras", "formatting", "repeating"),
    ("environment", "files", "gpus", "quantization"),
    ("cli", "kernels"),
    ("json_text", "pattern_child", "patterns", "sharding"),
    ("nn",),
    ("models",),
    ("checkpoints",),
    ("data",),
    ("generation",),
    ("optimizers",),
    ("training",),
    ("planner",),
    ("exporting", "finetuning", "serving"),
    ("commands",),
)
# Rooms that read a command line and write to the terminal.
COMMAND_LINE = ("cli", "commands")
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def sources() -> dict[str, Path]:
    """Module name -> file of every module of the package."""
    found = {}
    for package, directory in (("qlora_jax", ROOT / "qlora_jax"), ("qlora_jax.kernels", ROOT / "kernels")):
        for path in sorted(directory.rglob("*.py")):
            parts = path.relative_to(directory).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


SOURCES = sources()
# The package's own __init__ offers names of every floor, on demand.
ROOMS = [name for name in SOURCES if name != "qlora_jax"]


# Modules below the command line.
LIBRARY = [name for name in ROOMS if name.split(".")[1] not in COMMAND_LINE]
PROSE = {
    str(path.relative_to(ROOT)): path
    for directory in ("qlora_jax", "kernels", "scripts", "tests")
    for path in sorted((ROOT / directory).rglob("*.py"))
}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def imports(module: str) -> Iterator[str]:
    """Dotted name of everything a module imports, wherever in it."""
    for node in ast.walk(tree_of(SOURCES[module])):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import, line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str:
    """Module that a dotted name is, or lies in; empty for names from outside the package."""
    while name and name not in SOURCES:
        name = name.rpartition(".")[0]
    return name


def third_party(module: str) -> set[str]:
    """Top-level names a module imports that are neither Python's nor the package's."""
    return {name.partition(".")[0] for name in imports(module)} - sys.stdlib_module_names - {"qlora_jax"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules loaded by `code` in a fresh interpreter."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_public_names():
    assert sorted(qlora_jax.__all__) == qlora_jax.__all__
    assert set(qlora_jax.__all__) == {
        "QuantizationConfig", "QuantizedTensor", "TrainConfig", "__version__", "dequantize", "finetune", "generate",
        "load_adapter", "load_base", "load_tokenizer", "matmul", "quantize", "resolve_model", "save_adapter",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in qlora_jax.__all__ if name != "__version__"])
def test_public_names_resolve_and_are_documented(name):
    value = getattr(qlora_jax, name)
    assert value.__name__ == name
    assert getattr(qlora_jax, name) is value
    documented = [value, inspect.getmodule(value)]
    if inspect.isclass(value):
        # What the class body defines, but for what dataclass generates (which is not in the source).
        members = ast.parse(inspect.cleandoc(inspect.getsource(value))).body[-1].body
        defined = [node.name for node in members if isinstance(node, ast.FunctionDef)]
        documented += [inspect.getattr_static(value, member) for member in defined if not member.startswith("_")]
    for each in documented:
        # A dataclass without a docstring is given its signature for one.
        assert each.__doc__ and not each.__doc__.startswith(f"{name}("), each


def test_type_checkers_see_every_public_name():
    tree = tree_of(SOURCES["qlora_jax"])
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"qlora_jax.{module}" for name, module in qlora_jax._MODULES.items()}
    assert {*seen, "__version__"} == set(qlora_jax.__all__)


def test_dir_lists_the_public_names_and_others_are_errors():
    assert set(qlora_jax.__all__) <= set(dir(qlora_jax))
    with pytest.raises(AttributeError, match="module 'qlora_jax' has no attribute 'quantise'"):
        _ = qlora_jax.quantise


def test_version():
    assert qlora_jax.__version__ == importlib.metadata.version("qlora-jax")


def test_import_is_light():
    heavy = {"jax", "jaxlib", "flax", "numpy", "optax", "orbax", "torch", "transformers", "datasets", "pyarrow"}
    assert not loaded_by("import qlora_jax; qlora_jax.__version__") & heavy
    # Scripts know their flags before they load JAX.
    assert not loaded_by("import qlora_jax; qlora_jax.TrainConfig") & heavy


@pytest.mark.parametrize("module", SOURCES)
def test_no_torch_no_script_and_no_kernels_by_that_name(module):
    # `kernels` at the top level is Hugging Face's package.
    assert not third_party(module) & {"torch", "bitsandbytes", "peft", "scripts", "tests", "kernels"}


@pytest.mark.parametrize("module", ROOMS)
def test_imports_go_down(module):
    room = module.split(".")[1]
    assert room in FLOOR_OF, f"{room} has no floor yet"
    for name in imports(module):
        if name.partition(".")[0] == "qlora_jax":
            below = name.partition(".")[2].partition(".")[0]
            assert below in FLOOR_OF, f"{module} imports {name}; import from the module that defines it"
            assert below == room or FLOOR_OF[below] < FLOOR_OF[room], f"{module} imports {name}, not from a floor below"


def test_imports_make_no_circle():
    # Inside a room too, and wherever in a module the import stands.
    graph = {module: {module_of(name) for name in imports(module)} & set(ROOMS) for module in ROOMS}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules


@pytest.mark.parametrize(
    "module", [name for name in ROOMS if FLOOR_OF.get(name.split(".")[1], 9) <= FLOOR_OF["kernels"]]
)
def test_the_ground_floors_need_jax_and_numpy_only(module):
    assert third_party(module) <= {"jax", "jaxlib", "numpy", "jaxtyping"}


@pytest.mark.parametrize("module", [name for name, path in SOURCES.items() if path.name == "__init__.py"])
def test_packages_say_what_they_export(module):
    imported = importlib.import_module(module)
    assert imported.__doc__
    if any(name.startswith("qlora_jax.") for name in imports(module)):
        names = imported.__all__
        assert len(set(names)) == len(names)
        assert all(hasattr(imported, name) for name in names)


# --- language


@pytest.mark.parametrize("file", PROSE)
def test_docstrings_open_with_a_verb_or_a_noun_phrase(file):
    found = [
        f"{file}:{line}: {text.splitlines()[0]}"
        for line, text in docstrings(tree_of(PROSE[file]))
        if re.match(r"(What|Whether|Where|Who|How)\b", text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_logs_and_does_not_print(module):
    calls = [node for node in ast.walk(tree_of(SOURCES[module])) if isinstance(node, ast.Call)]
    prints = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
    found = [node.lineno for node in prints if not any(keyword.arg == "file" for keyword in node.keywords)]
    assert not found, f"{module}: print in lines {found}"


@pytest.mark.parametrize("module", LIBRARY)
def test_the_library_names_fields_not_flags(module):
    names = {field.name for field in dataclasses.fields(qlora_jax.TrainConfig)}
    tree = tree_of(SOURCES[module])
    explained = {text for _, text in docstrings(tree)}
    found = [
        f"{module}:{node.lineno}: --{flag}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and inspect.cleandoc(node.value) not in explained
        for flag in re.findall(r"--(\w+)", node.value)
        if flag in names
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", SOURCES)
def test_errors_end_with_a_full_stop(module):
    calls = [node for node in ast.walk(tree_of(SOURCES[module])) if isinstance(node, ast.Call)]
    texts = [call.args[0] for call in calls if ast.unparse(call.func) == "UserError"]
    ends = [text.values[-1] if isinstance(text, ast.JoinedStr) else text for text in texts]
    found = [end for end in ends if isinstance(end, ast.Constant) and not end.value.endswith(".")]
    assert not found, "\n".join(f"{module}:{end.lineno}: ...{end.value}" for end in found)
