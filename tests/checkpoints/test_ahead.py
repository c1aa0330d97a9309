"""Jobs that threads do ahead of the one whose result is in use."""

import threading
import time

import pytest

from qlora_jax.checkpoints.ahead import results_ahead


def jobs_that_note(begun: list[int], count: int, seconds: float = 0.0):
    def job(i):
        begun.append(i)
        time.sleep(seconds)
        return i

    return (lambda i=i: job(i) for i in range(count))


def wait_until(true):
    limit = time.monotonic() + 10
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_results_come_in_order_and_no_more_jobs_are_begun_than_asked():
    begun: list[int] = []
    for n, result in enumerate(results_ahead(jobs_that_note(begun, 6), 2)):
        assert result == n
        wait_until(lambda n=n: len(begun) == min(n + 3, 6))
    assert begun == list(range(6))
    assert list(results_ahead([], 2)) == []


def test_a_job_fails_when_it_is_its_turn():
    def fail():
        raise OSError("no such block")

    threads = threading.active_count()
    results = results_ahead([lambda: 0, fail, lambda: time.sleep(0.1)], 2)
    assert next(results) == 0
    with pytest.raises(OSError, match="no such block"):
        next(results)
    assert threading.active_count() == threads


def test_threads_end_when_closed():
    threads, begun = threading.active_count(), []
    results = results_ahead(jobs_that_note(begun, 9, seconds=0.05), 1)
    assert next(results) == 0
    assert threading.active_count() == threads + 1
    results.close()
    assert threading.active_count() == threads
    assert begun == [0, 1]
