"""Metrics of a run: metrics.jsonl, TensorBoard, W&B, the loss plot, and the clocks behind the rates."""

import concurrent.futures
import contextlib
import importlib.util
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.files import atomic_write
from qlora_jax.json_text import parse_json
from qlora_jax.training.config import TrainConfig

METRICS_FILE = "metrics.jsonl"
_CHECKSUM = "crc32"
logger = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without a last line that a killed run left half-written.

    Lines that are not as they were written are left out, and a warning counts them.
    """
    if not path.exists():
        return []
    # Only a line that ends in a newline is whole.
    lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line]
    found = [value for value in map(_metrics_line, lines) if value is not None]
    if len(found) < len(lines):
        logger.warning("%s: %d of %d lines are damaged and left out", path, len(lines) - len(found), len(lines))
    return found


def _metrics_line(raw: bytes) -> dict[str, Any] | None:
    """Contents of a line; None if its checksum is not that of the rest."""
    try:
        value = parse_json(raw)
        return value if value.pop(_CHECKSUM) == _checksum(value) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(line: Mapping[str, Any]) -> str:
    """CRC-32, which any flipped bit changes: a line is short."""
    return f"{zlib.crc32(json.dumps(line, sort_keys=True).encode()):08x}"


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps({**line, _CHECKSUM: _checksum(line)}) + "\n"


def check_reporters(config: TrainConfig) -> None:
    """Refuse a `report_to` whose library is not installed.

    Raises:
        UserError: names it.
    """
    if config.report_to in ("wandb", "all") and importlib.util.find_spec("wandb") is None:
        raise UserError(f"`report_to={config.report_to}`: W&B is not installed; `pip install wandb`.")


class MetricsLog:
    """Appends one JSON object a line to metrics.jsonl and passes it on to TensorBoard and W&B.

    Training lines hold step, loss, learning_rate, grad_norm, tokens, tokens_per_second, seconds; evaluation lines hold
    step, eval_loss, eval_perplexity, eval_tokens. Losses are nats a token, tokens and seconds are totals of the run;
    tokens_per_second is the rate of training since the last training line, without compilation, evaluation and saving.
    Where the optimizer pages, training lines also hold optimizer_on_host_bytes, evicted_bytes, returned_bytes,
    paged_bytes and paging_seconds (see `qlora_jax.optimizers.TransferStats`), since the last line that did; a step that
    evicts or brings back chunks between two training lines has a line of these alone.
    Every line has a checksum of the rest, `crc32`. Lines beyond `resume_step` belong to work that was lost with the
    process that did it; they are removed.
    `evaluated` holds the steps that have an evaluation line.
    """

    def __init__(self, directory: Path, config: TrainConfig, resume_step: int):
        check_reporters(config)
        path = directory / METRICS_FILE
        # A run that starts over evaluates step 0 again.
        kept = [line for line in read_metrics(path) if resume_step and line["step"] <= resume_step]
        self.evaluated = {line["step"] for line in kept if "eval_loss" in line}
        with atomic_write(path) as temporary:
            temporary.write_text("".join(map(_text, kept)), encoding="utf-8")
        self.path = path
        self._file = path.open("a", encoding="utf-8")
        self._board = self._wandb = None
        if config.report_to in ("tensorboard", "all"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)
        if config.report_to in ("wandb", "all"):
            import wandb

            self._wandb = wandb.init(
                project="qlora-jax", name=config.run_name, dir=str(directory), config=vars(config), resume="allow"
            )

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it is with the system when this returns, and survives the end of this process."""
        self._file.write(_text(line))
        self._file.flush()
        if "eval_loss" in line:
            self.evaluated.add(line["step"])
        values = {name: value for name, value in line.items() if name != "step"}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=line["step"])

    def flush_to_disk(self) -> None:
        """Wait until all lines are on disk: a checkpoint's must not be lost where the checkpoint is not."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close every sink."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def plot_losses(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw training and held-out loss over the steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles: dict[str, dict[str, Any]] = {
        "loss": {"label": "training", "color": "#8fb3d9", "linewidth": 1.2},
        "eval_loss": {"label": "held out", "color": "#c0392b", "linewidth": 2, "marker": "o", "markersize": 4},
    }
    for key, style in styles.items():
        points = [(line["step"], line[key]) for line in metrics if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


class Stopwatch:
    """Seconds since it was made, on top of what an interrupted run had spent before."""

    def __init__(self, before: float = 0.0):
        self._start, self._before = time.perf_counter(), before

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + time.perf_counter() - self._start


class Throughput:
    """Tokens a second of training alone: its clock stands still while something else is done.

    Moments are those of `time.perf_counter`.
    """

    def __init__(self, tokens: int):
        self._begin, self._tokens = time.perf_counter(), tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while the block runs; all steps before it must have been waited for."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._begin += time.perf_counter() - begin

    def rate(self, tokens: int, moment: float) -> float:
        """Return tokens a second since the last `restart`, or since the beginning; `tokens` are those of the run."""
        return (tokens - self._tokens) / max(moment - self._begin, 1e-9)

    def restart(self, tokens: int, moment: float) -> None:
        """Count from a moment on."""
        self._begin, self._tokens = moment, tokens


class StepTimer:
    """Notes the moments at which arrays are computed, from a thread that waits for them.

    The loop itself cannot: it reads a step's numbers once the next step is dispatched, and on a CPU dispatching may
    take as long as the step.
    """

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="step-timer")

    def moment(self, array: Any) -> concurrent.futures.Future[float]:
        """Return the moment, by `time.perf_counter`, at which an array will have been computed."""
        return self._thread.submit(self._wait, array)

    @staticmethod
    def _wait(array: Any) -> float:
        array.block_until_ready()
        return time.perf_counter()

    def close(self) -> None:
        """Let the thread end; what it waits for at present is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)
