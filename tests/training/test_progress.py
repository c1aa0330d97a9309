"""Signs of life: messages while something takes long, and none where nobody listens."""

import threading
import time

import pytest

from qlora_jax.training.progress import ProgressBar, announced


@pytest.fixture
def messages(caplog):
    caplog.set_level("INFO", logger="qlora_jax")
    return lambda: caplog.messages


def reminders():
    return [thread for thread in threading.enumerate() if thread.name in ("reminder", "progress-bar")]


def test_reminders_come_while_the_block_runs(messages):
    with announced("compiling", interval=0.01):
        deadline = time.monotonic() + 10
        while len(messages()) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert messages()[:3] == ["compiling ...", "compiling ... 0 s so far", "compiling ... 0 s so far"]
    ended = len(messages())
    assert not reminders()
    time.sleep(0.05)
    assert len(messages()) == ended


def test_a_short_block_says_nothing_unless_asked_to(messages):
    with announced("evaluating", at_once=False):
        pass
    assert messages() == []
    with announced("loading"):
        pass
    assert messages() == ["loading ..."]


def test_an_error_ends_the_reminders(messages):
    with pytest.raises(KeyError), announced("loading", interval=60.0):
        assert reminders()
        raise KeyError
    assert not reminders()


def test_no_thread_and_no_bar_without_listeners(caplog, capfd):
    caplog.set_level("WARNING", logger="qlora_jax")
    with announced("loading", interval=0.001):
        assert not reminders()
    bar = ProgressBar(0, 3)
    assert not reminders()
    bar.show(3, loss="1")
    bar.close()
    assert capfd.readouterr() == ("", "")


def test_a_bar_that_goes_on_from_earlier_steps(messages, capfd):
    bar = ProgressBar(2, 4)
    bar.show(3, loss="0.5")
    bar.show(4, loss="0.25")
    bar.close()
    last = capfd.readouterr().err.split("\r")[-1]
    assert "4/4" in last
    assert "loss=0.25" in last


def test_the_bar_is_redrawn_during_a_long_step(messages, capfd):
    bar = ProgressBar(0, 4, interval=0.01)
    drawn, deadline = "", time.monotonic() + 10
    while drawn.count("0/4") < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
        drawn += capfd.readouterr().err
    assert drawn.count("0/4") >= 4
    bar.close()
    assert not reminders()
    bar.close()
