"""Single flipped bits in every file that this program writes: a run's directory, a converted base, an adapter.

A flip is told in one sentence that names the file, or by the fallback that is documented for it, or changes nothing.
"""

import collections
import dataclasses
import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fixtures.finetune_helpers import SMALL_RUN, as_flags, make_resumable, run_captured

from qlora_jax.checkpoints.conversion import convert
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.peft import load_adapter
from qlora_jax.commands.finetune import finished_summary
from qlora_jax.errors import UserError
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.answers import Questionnaire
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.reporting import read_metrics
from qlora_jax.training.results import changed_results, read_summary
from qlora_jax.training.run_directory import RunDirectory, check_output_dir

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("quick_compilation")]

QUANTIZATION = QuantizationConfig()
STEPS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Place:
    """A finished run of a converted base, and what was read of it whole.

    Attributes:
        run: its directory.
        converted: directory of the base.
        config: of the run, as far as the files' readers look at it.
        state: shapes of the state in its checkpoints.
        base: the loaded base.
        whole: name of a reader -> what it returned.
    """

    run: Path
    converted: Path
    config: TrainConfig
    state: Any
    base: Any
    whole: dict[str, Any]

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.run)

    @property
    def questions(self) -> Questionnaire:
        """With what `recorded` looks at."""
        made = object.__new__(Questionnaire)
        object.__setattr__(made, "prompts", ("say abcd",))
        return made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = make_resumable(tmp_path_factory.mktemp("flips"))
    converted = convert(root / "model", root / "converted", QUANTIZATION, "float32").directory
    values = SMALL_RUN | {"max_steps": STEPS[-1], "eval_steps": 2, "save_steps": 2}
    named = {"model_name_or_path": converted, "dataset": root / "rows.jsonl", "prompts": root / "prompts.txt"}
    states = []
    with pytest.MonkeyPatch.context() as patch:
        save = RunDirectory.save

        def noted(self: RunDirectory, step: int, state: Any, *rest: Any) -> Path:
            states.append(jax.eval_shape(lambda: state))
            return save(self, step, state, *rest)

        patch.setattr(RunDirectory, "save", noted)
        status, _, err = run_captured(as_flags(**(values | named | {"output_dir": root / "run"})))
    assert status == 0, err
    record = json.loads((root / "run" / "run.json").read_bytes())
    config = TrainConfig(**record["flags"])
    base = load_base(converted, quantization=QUANTIZATION, dtype="float32")
    place = Place(root / "run", converted, config, states[0], base, {})
    directory = place.directory
    place.whole.update(
        record=check_output_dir(config),
        summary=read_summary(place.run),
        metrics=read_metrics(place.run / "metrics.jsonl"),
        before=place.questions.recorded(directory),
        adapter=load_adapter(place.run / "adapter", base.config)[0],
        **{f"step {step}": directory.restore(step, states[0]) for step in STEPS},
    )
    assert finished_summary(config) == place.whole["summary"]
    assert len(place.whole["metrics"]) == 7
    return place


def same(one: Any, other: Any) -> bool:
    """Compare trees bit for bit."""
    (xs, x_tree), (ys, y_tree) = jax.tree.flatten(one), jax.tree.flatten(other)
    return x_tree == y_tree and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(xs, ys, strict=True)
    )


def refusal(read: Callable[[], Any]) -> str | None:
    """The one sentence with which a file is refused; None if it is not."""
    try:
        read()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1000, text
        return text
    return None


def checkpoint(place: Place, file: Path, warned: Callable[[], str]) -> str:
    """Resume: a newest checkpoint that is damaged is told and put aside; an older one is refused when it is needed."""
    directory, name = place.directory, file.relative_to(place.run).parts[0]
    path, step = place.run / name, int(name.removeprefix("checkpoint-"))
    damaged = refusal(lambda: directory.restore(step, place.state))
    assert damaged is not None
    assert damaged.startswith(f"{path} is damaged: its file ")
    got, state, position = directory.restore_newest(place.state)
    expected = next(other for other in reversed(STEPS) if other != step or step != STEPS[-1])
    assert got == expected
    assert same((state, position), place.whole[f"step {expected}"])
    if step != STEPS[-1]:
        return "refused"
    assert damaged in warned() and "the checkpoint before it is used" in warned()
    os.replace(path.with_name(f"{path.name}.damaged"), path)
    return "fell back"


def record(place: Place, file: Path, warned: Callable[[], str]) -> str:
    """Its copy in a checkpoint takes its place, with a warning; the run is then not known to be finished."""
    assert check_output_dir(place.config) == place.whole["record"]
    summary = finished_summary(place.config)
    if not warned():
        assert summary == place.whole["summary"]
        return "same"
    assert f"{file} cannot be used (" in warned()
    assert summary is None
    return "fell back"


def metrics(place: Place, file: Path, warned: Callable[[], str]) -> str:
    """The damaged line is lost, or two where a newline is; that the last line has no newline is what a kill leaves."""
    whole, found = place.whole["metrics"], read_metrics(file)
    if found == whole:
        return "same"
    assert all(line in whole for line in found)
    assert len(found) >= len(whole) - 2
    assert f"{file}: " in warned() or found == whole[:-1]
    return "lines lost"


def before(place: Place, file: Path, warned: Callable[[], str]) -> str:
    found = place.questions.recorded(place.directory)
    if found == place.whole["before"]:
        return "same"
    assert found == ["(lost)"]
    assert f"{file} is damaged (" in warned()
    return "fell back"


def summary(place: Place, file: Path, warned: Callable[[], str]) -> str:
    said = refusal(lambda: read_summary(place.run))
    found = finished_summary(place.config)
    if said is None:
        assert found == place.whole["summary"]
        return "same"
    assert found is None
    assert said.startswith(f"{file} is damaged (")
    return "refused"


def result(place: Place, file: Path, warned: Callable[[], str]) -> str:
    """The command that says that the run is already done names what has changed since."""
    assert changed_results(place.run, place.whole["summary"]) == [str(file.relative_to(place.run))]
    return "told"


def adapter(place: Place, file: Path, warned: Callable[[], str]) -> str:
    said = refusal(lambda: load_adapter(file.parent, place.base.config))
    assert said is not None
    assert "is missing or not as it was written" in said and str(file.parent) in said
    if file.name != "SHA256SUMS":
        result(place, file, warned)
    return "refused"


def converted(place: Place, file: Path, warned: Callable[[], str]) -> str:
    found = []
    said = refusal(lambda: found.append(load_base(place.converted, quantization=QUANTIZATION, dtype="float32")))
    if said is None:
        assert found[0].digest == place.base.digest
        assert same(found[0].tensors, place.base.tensors)
        return "same"
    assert str(file) in said
    return "refused"


# By the first part of a file's path in the run's directory, without a checkpoint's number.
READERS: dict[str, Callable[[Place, Path, Callable[[], str]], str]] = {
    "checkpoint": checkpoint,
    "run.json": record,
    "metrics.jsonl": metrics,
    "answers_before.json": before,
    "summary.json": summary,
    "answers.json": result,
    "loss.png": result,
    "adapter": adapter,
}


def files_below(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file() and file.stat().st_size)


def test_any_flipped_bit(cases, place, caplog, capsys):
    """Files are drawn alike, whatever their size: each has its share of the flips.

    One flip for every four mutants of a format: each is a run or a model that is read whole.
    """
    cases //= 4
    readers = {file: converted for file in files_below(place.converted)}
    readers |= {
        file: READERS[file.relative_to(place.run).parts[0].partition("-")[0]] for file in files_below(place.run)
    }
    caplog.set_level(logging.WARNING, "qlora_jax")
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    rng = random.Random(0)
    for number in range(cases):
        file = list(readers)[number % len(readers)]
        status = file.stat()
        whole, bit = file.read_bytes(), rng.randrange(8 * status.st_size)
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        caplog.clear()
        try:
            outcome = readers[file](place, file, lambda: caplog.text)
        except Exception as error:
            pytest.fail(f"flip {number}, bit {bit} of {file}: {type(error).__name__}: {error}")
        file.write_bytes(whole)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # by which a finished run knows its inputs
        outcomes[readers[file].__name__][outcome] += 1
    with capsys.disabled():
        print(f"\n{cases} flips in {len(readers)} files")
        for name, counts in outcomes.items():
            print(f"  {name}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    assert all(counts["same"] < counts.total() / 4 for counts in outcomes.values())
