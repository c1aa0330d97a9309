"""Stopping by a signal: once asks, twice acts, and a process that ignores a signal goes on ignoring it."""

import signal
import threading

import pytest

from qlora_jax.training.signals import StopOnSignal, StoppedAtOnce

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def test_the_second_signal_acts_at_once(handlers):
    with StopOnSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interrupt_is_told_apart_by_what_came_before_it(handlers):
    with pytest.raises(StoppedAtOnce), StopOnSignal():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as first, StopOnSignal():
        raise KeyboardInterrupt
    assert first.type is KeyboardInterrupt


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_asks_and_is_announced(handlers, caplog, number):
    caplog.set_level("INFO", logger="qlora_jax")
    with StopOnSignal() as stop:
        signal.raise_signal(number)
    assert stop.requested
    assert caplog.messages == [f"{number.name}: saving after this step; send it again to stop at once"]


@pytest.mark.parametrize("ignored", SIGNALS)
def test_what_the_parent_ignores_stays_ignored(handlers, ignored):
    """As under nohup, or in the background of a script."""
    (other,) = set(SIGNALS) - {ignored}
    signal.signal(ignored, signal.SIG_IGN)
    with StopOnSignal() as stop:
        signal.raise_signal(ignored)
        assert not stop.requested
        signal.raise_signal(other)
        assert stop.requested
    assert signal.getsignal(ignored) is signal.SIG_IGN


def test_handlers_are_restored_after_an_error(handlers):
    with pytest.raises(ZeroDivisionError), StopOnSignal():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_in_another_thread_sets_no_handlers(handlers):
    found = []

    def run():
        with StopOnSignal() as stop:
            found.append((signal.getsignal(signal.SIGINT), stop.requested))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(signal.default_int_handler, False)]
