"""Progress bars and figures that several commands print."""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (tensors done, tensors in all) that draws a bar; it may begin anew."""
    from tqdm import tqdm

    with tqdm(unit=" tensors", desc=description, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            if done < bar.n:
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
