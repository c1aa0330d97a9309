"""metrics.jsonl across interruptions, the plot, and the tables a person reads."""

import json

import pytest

from qlora_jax.errors import UserError
from qlora_jax.formatting import format_bytes, table
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.reporting import MetricsLog, Stopwatch, plot_losses, read_metrics

QUIET = TrainConfig(report_to="none")


def train_line(step):
    return {"step": step, "loss": 1 / step}


def eval_line(step):
    return {"step": step, "eval_loss": 2.0}


def write(directory, lines, resume_step=0, config=QUIET):
    log = MetricsLog(directory, config, resume_step)
    for line in lines:
        log.write(line)
    log.close()
    return log


def test_lines_are_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path, QUIET, 0)
    for step in (1, 2):
        log.write(train_line(step))
        # Read while the log is open: what a killed process leaves.
        assert read_metrics(tmp_path / "metrics.jsonl")[-1] == train_line(step)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.keys() - train_line(1).keys() for line in lines] == [{"crc32"}, {"crc32"}]


def test_a_damaged_line_costs_that_line(tmp_path, caplog):
    lines = [eval_line(0), train_line(1), train_line(2), eval_line(2)]
    write(tmp_path, lines)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"loss": 1.0', b'"loss": 1.1'))
    assert read_metrics(path) == [lines[0], *lines[2:]]
    assert f"{path}: 1 of 4 lines are damaged and left out" in caplog.text


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path):
    lines = [eval_line(0), train_line(1), train_line(2), eval_line(2), train_line(3), train_line(4), eval_line(4)]
    write(tmp_path, lines)
    log = write(tmp_path, [train_line(3)], resume_step=2)
    assert read_metrics(tmp_path / "metrics.jsonl") == [*lines[:4], train_line(3)]
    assert log.evaluated == {0, 2}
    assert not list(tmp_path.glob(".*"))


def test_a_run_without_checkpoint_starts_an_empty_log(tmp_path):
    """Step 0 is evaluated again: its line must not be there twice."""
    write(tmp_path, [eval_line(0), train_line(1)])
    log = write(tmp_path, [eval_line(0)])
    assert read_metrics(tmp_path / "metrics.jsonl") == [eval_line(0)]
    assert log.evaluated == {0}


@pytest.mark.parametrize("half", ['{"step": 3, "lo', '{"step": 3, "loss": 0.1}', "\x00"])
def test_a_half_written_last_line_is_dropped(tmp_path, half):
    """Without its newline even a line that reads as JSON may lack digits."""
    file = tmp_path / "metrics.jsonl"
    write(tmp_path, [train_line(1), train_line(2)])
    with file.open("a") as stream:
        stream.write(half)
    assert read_metrics(file) == [train_line(1), train_line(2)]
    write(tmp_path, [train_line(3)], resume_step=2)
    assert read_metrics(file) == [train_line(1), train_line(2), train_line(3)]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_wandb_that_is_not_installed_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for choice in ("wandb", "all"):
        with pytest.raises(UserError, match=f"^`report_to={choice}`: W&B is not installed; `pip install wandb`"):
            MetricsLog(tmp_path, TrainConfig(report_to=choice), 0)
    assert list(tmp_path.iterdir()) == []


class FakeWandb:
    """Stands for the wandb module."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_gets_every_line_once(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: fake)
    write(tmp_path, [eval_line(0), train_line(1)], config=TrainConfig(report_to="wandb", run_name="mine"))
    (started,) = fake.started
    assert (started["name"], started["dir"]) == ("mine", str(tmp_path))
    assert started["config"]["learning_rate"] == 2e-4
    assert fake.logged == [(0, {"eval_loss": 2.0}), (1, {"loss": 1.0})]
    assert fake.finished == 1


@pytest.mark.parametrize("lines", [[], [train_line(1)], [eval_line(0), train_line(1), eval_line(1)]])
def test_plot_of_any_number_of_points(tmp_path, lines):
    plot_losses(lines, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (102_000_000, "97.3 MiB"), (5 * 2**40, "5120.0 GiB")],
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text


def test_table_aligns_both_columns():
    assert table([("a", "1"), ("long name", "1,234")]) == "  a              1\n  long name  1,234"


def test_stopwatch_goes_on_from_before():
    watch = Stopwatch(100.0)
    first = watch.seconds
    assert 100 <= first <= watch.seconds < 200
