"""Something done every so often while something else takes long."""

import threading
from collections.abc import Callable


class Repeated:
    """Calls of a function at an interval, in a thread that ends with the block or `close`.

    The first comes after one interval; an error of the function ends the calls, as it ends any thread.

    Args:
        action: function to call.
        interval: seconds between calls.
        name: of the thread.
    """

    def __init__(self, action: Callable[[], None], interval: float, *, name: str) -> None:
        self._action, self._interval, self._closed = action, interval, threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            self._action()

    def close(self) -> None:
        """Return once no call is running, and none will come."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "Repeated":
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
