"""Orbax without the pages that its threads write about a file which cannot be read or written."""

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Silence orbax: its threads also log what they raise, in hundreds of lines."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("absl", "asyncio"))}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            try:
                yield
            except BaseException:
                gc.collect()  # of a load or save that failed: what is left of it complains when it is collected
                raise
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
