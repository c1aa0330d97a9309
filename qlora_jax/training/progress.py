"""Signs of life while something takes long: reminders in the log, and a progress bar over the steps."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from qlora_jax.repeating import Repeated

logger = logging.getLogger(__name__)

REMINDER_SECONDS = 8.0
"""Longest silence of `announced`."""


@contextlib.contextmanager
def announced(doing: str, *, at_once: bool = True, interval: float = REMINDER_SECONDS) -> Iterator[None]:
    """Log what is being done while the block runs, and every so often how long it has taken so far.

    Args:
        doing: e.g. "compiling the training step".
        at_once: log it at the beginning too, not only when it takes longer than `interval`.
        interval: seconds between reminders.
    """
    if not logger.isEnabledFor(logging.INFO):
        yield
        return
    begin = time.perf_counter()
    if at_once:
        logger.info("%s ...", doing)

    def remind() -> None:
        logger.info("%s ... %.0f s so far", doing, time.perf_counter() - begin)

    with Repeated(remind, interval, name="reminder"):
        yield


class ProgressBar:
    """A bar over the steps of a run on standard error, shown where the library's messages are (level INFO).

    However long a step takes, the bar is redrawn every `interval` seconds.
    """

    def __init__(self, done: int, total: int, *, interval: float = REMINDER_SECONDS):
        interactive, shown = sys.stderr.isatty(), logger.isEnabledFor(logging.INFO)
        self._bar = tqdm(
            total=total,
            initial=done,
            desc="training",
            unit="step",
            # A log file gets a line now and then instead of an animation.
            mininterval=0.1 if interactive else interval / 2,
            miniters=1,
            disable=not shown,
        )
        self._redrawn = Repeated(self._bar.refresh, interval, name="progress-bar") if shown else None

    def show(self, step: int, **values: str) -> None:
        """Move to a step and show its values."""
        self._bar.set_postfix(values, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leave the last line on the screen."""
        if self._redrawn is not None:
            self._redrawn.close()
        self._bar.close()
