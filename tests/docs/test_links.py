"""README, CONTRIBUTING and docs/: links lead somewhere, linked names are in their files, commands have their flags."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from qlora_jax import models
from qlora_jax.commands import benchmark, chat, convert, export, finetune, generate, merge, plan, serve

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "tests/**/README.md") for path in ROOT.glob(pattern)
)
SCHEMAS = {
    "finetune": finetune.Flags,
    "plan": plan.schema(),
    "convert": convert.ConvertFlags,
    "export": export.ExportFlags,
    "merge": merge.MergeFlags,
    "chat": chat.ChatFlags,
    "generate": generate.GenerateFlags,
    "serve": serve.ServeFlags,
    "benchmark step": benchmark.StepFlags,
    "benchmark kernels": benchmark.KernelsFlags,
}


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[list[str]]:
    """Our commands in a page's blocks of shell, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^    (?:python scripts/|qlora-jax ).*$", text, flags=re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.search(r"(?:python scripts/(\w+)\.py|\bqlora-jax (\w+))\b(.*)", line) for line in lines]
    return [[match[1] or match[2], *shlex.split(match[3], comments=True)] for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if fragment:
            assert fragment in anchors(file), f"{page.name} links to {target}, which has no such heading"
        # [`name`](module.py): what is named is defined there.
        name = re.fullmatch(r"`([\w.]+)(?:\(\))?`", text)
        if name and file.suffix == ".py" and name[1] != file.name:
            assert re.search(rf"\b{name[1].rpartition('.')[2]}\b", file.read_text(encoding="utf-8")), (text, target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_flags_they_are_shown_with(page):
    for name, *words in commands(page.read_text(encoding="utf-8")):
        command = f"{name} {words[0]}" if name == "benchmark" and words else name
        known = {field.name for field in dataclasses.fields(SCHEMAS[command])}
        for word in words:
            if word.startswith("--"):
                assert word[2:].partition("=")[0].replace("-", "_") in known, f"{page.name}: {command} {word}"


def test_the_readme_lists_every_family():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in models.FAMILIES if f"`{name}`" not in text]


def test_there_is_something_to_check():
    names = {page.name for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md"} <= names
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) >= 4
