"""Silence of orbax's threads, those included that outlive a save that failed."""

import logging
import threading
import time

import pytest

from qlora_jax.checkpoints.quiet import quiet_orbax


class Late(threading.Thread):
    """Stands for a thread of orbax that fails after the save has."""

    __module__ = "orbax.checkpoint.futures"

    def run(self):
        time.sleep(0.2)
        logging.getLogger("absl").error("Traceback of a thread")


def test_a_thread_that_fails_late_is_waited_for(caplog):
    before = logging.getLogger("absl").level
    with pytest.raises(OSError, match="the disk is full"), quiet_orbax():
        Late().start()
        raise OSError("the disk is full")
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Late)]
    assert not caplog.records and logging.getLogger("absl").level == before
