"""Signs of life while something takes long: reminders in the log, and a progress bar over the steps."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

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
    begin, ended = time.perf_counter(), threading.Event()
    if at_once:
        logger.info("%s ...", doing)

    def remind() -> None:
        while not ended.wait(interval):
            logger.info("%s ... %.0f s so far", doing, time.perf_counter() - begin)

    thread = threading.Thread(target=remind, name="reminder", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._redraw, args=(interval,), name="progress-bar", daemon=True)
        if shown:
            self._thread.start()

    def _redraw(self, interval: float) -> None:
        while not self._closed.wait(interval):
            self._bar.refresh()

    def show(self, step: int, **values: str) -> None:
        """Move to a step and show its values."""
        self._bar.set_postfix(values, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leave the last line on the screen."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.close()
