"""Work of threads on what comes next, while the caller is at work on what came before."""

import collections
import concurrent.futures
import itertools
from collections.abc import Callable, Generator, Iterable


def results_ahead[T](jobs: Iterable[Callable[[], T]], ahead: int) -> Generator[T]:
    """Yield the results of jobs in their order, while as many threads are at work on the next `ahead` of them.

    What a job raises is raised when it is its turn. The threads have ended when the generator has, or was closed.
    """
    threads = concurrent.futures.ThreadPoolExecutor(ahead)
    try:
        futures = map(threads.submit, jobs)
        begun = collections.deque(itertools.islice(futures, 1))
        while begun:
            begun.extend(itertools.islice(futures, ahead + 1 - len(begun)))
            yield begun.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
