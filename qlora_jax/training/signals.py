"""Stopping a run by a signal without losing the step it is in."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal ended the block of a `StopOnSignal`: the step it was in is lost."""


class StopOnSignal:
    """While entered, the first SIGINT or SIGTERM asks for a stop after the current step; a second one acts at once.

    Where that raises KeyboardInterrupt, as Python's handler of SIGINT does, the block raises StoppedAtOnce.

    A signal that the process ignores (as one started by `nohup`, or in the background of a script, ignores SIGINT)
    stays ignored. Outside the main thread, where Python sets no handlers, nothing is asked for. Handlers are restored.

    Attributes:
        requested: a stop has been asked for.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: not set from Python, and Python could not restore it
                    self._before[number] = before
                    signal.signal(number, self._request)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Restore the handlers."""
        self._restore()
        if self.requested and isinstance(error, KeyboardInterrupt):
            raise StoppedAtOnce from error

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        logger.info("%s: saving after this step; send it again to stop at once", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
