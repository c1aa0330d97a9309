"""Orbax without the pages that its threads write about a file which cannot be read or written."""

import contextlib
import gc
import logging
import threading
import warnings
from collections.abc import Iterator

_LONGEST_S = 10.0
"""Seconds that a thread of a load or save that failed is waited for."""


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silence orbax: its threads also log what they raise, in hundreds of lines.

    Where it fails, the threads that it leaves at work are waited for: what one of them says later would not be
    silenced, and it writes into a directory that the caller is about to delete.
    """
    levels = {logger: logger.level for logger in map(logging.getLogger, ("absl", "asyncio"))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            try:
                yield
            except BaseException:
                _wait_for_threads()
                gc.collect()  # of a load or save that failed: what is left of it complains when it is collected
                raise
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _wait_for_threads() -> None:
    for thread in threading.enumerate():
        if type(thread).__module__.partition(".")[0] == "orbax" and thread is not threading.current_thread():
            thread.join(_LONGEST_S)
