"""A thread that owns an engine, and calls that asyncio code waits on.

The thread takes requests between two steps of the engine, and hands the tokens of a step to the event loop at once. It
sleeps where there is nothing to answer. An error of the engine ends it: all calls fail, then and later.
"""

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple

from qlora_jax.errors import UserError
from qlora_jax.generation import Engine, Request, Token

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """No place for more requests at present."""


class EngineFailed(Exception):
    """The engine raised an error, or was stopped; nothing is answered any more."""


class Event(NamedTuple):
    """Progress of a call.

    Attributes:
        request: its place in the call.
        token: that was added to its answer, or why there will be none.
    """

    request: int
    token: Token | Exception


class Call:
    """Requests that are answered together.

    Attributes:
        requests: as submitted.
        events: tokens of all of them, as they come.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = tuple(requests)
        self.events: asyncio.Queue[Event] = asyncio.Queue()


@dataclasses.dataclass(frozen=True)
class _Place:
    """A request of a call."""

    call: Call
    index: int

    def is_of(self, call: Call, index: int | None) -> bool:
        """Return True for a request of that call, or for that request of it."""
        return self.call is call and index in (None, self.index)


class Worker:
    """Answers calls; see the module. Its methods are for the thread of the event loop.

    Args:
        engine: is the worker's from now on.
        slots: of the engine.
        queue: most requests that wait for a slot.
        warm_up: compile programs before the first request is answered; requests wait for it.

    Attributes:
        most: requests that can be taken at a time.
    """

    def __init__(self, engine: Engine, slots: int, queue: int, *, warm_up: bool = False):
        self._engine, self._slots, self._queue = engine, slots, queue
        self.most = slots + queue
        # Guards what follows; not held during a step, in which the engine's counts may change.
        self._changed = threading.Condition()
        self._new: list[_Place] = []
        self._places: dict[int, _Place] = {}
        self._unwanted: list[int] = []
        self._cold = warm_up
        self._ended: str | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def status(self) -> Literal["ok", "starting", "failed"]:
        """Progress of the thread: "ok" while calls are answered, "starting" while they wait for programs."""
        if self._ended is not None or not self._thread.is_alive():
            return "failed"
        return "starting" if self._cold else "ok"

    @property
    def capacity(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._engine.capacity

    @property
    def busy(self) -> int:
        """Requests that have a slot."""
        return 0 if self._cold else self._engine.busy

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._new) + self._engine.waiting

    def start(self) -> None:
        """Start the thread, which serves the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is at; calls that are not answered by then fail."""
        with self._changed:
            self._ended = self._ended or "the server is shutting down"
            self._changed.notify()

    def close(self, seconds: float = 10.0) -> None:
        """`stop`, and wait for the end of the thread.

        Args:
            seconds: to wait at most; a program that is being compiled cannot be interrupted.
        """
        self.stop()
        self._thread.join(seconds)

    def submit(self, requests: Sequence[Request]) -> Call:
        """Take requests; whoever does has to `cancel` the call in the end, whether it is answered or not.

        Raises:
            QueueFull: some of them would wait beyond the queue; none is taken.
            EngineFailed: none is taken any more.
        """
        call = Call(requests)
        with self._changed:
            if self._ended is not None:
                raise EngineFailed(self._ended)
            if self.waiting + len(requests) > self._queue + self._slots - self._engine.busy:
                raise QueueFull
            self._new += [_Place(call, i) for i in range(len(requests))]
            self._changed.notify()
        return call

    def cancel(self, call: Call, index: int | None = None) -> None:
        """Forget a call, or one of its requests; nothing happens to those that have been answered."""
        with self._changed:
            self._new = [place for place in self._new if not place.is_of(call, index)]
            self._unwanted += [number for number, place in self._places.items() if place.is_of(call, index)]
            self._changed.notify()

    def _run(self) -> None:
        try:
            if self._cold:
                self._engine.warm_up(lambda: self._ended is not None)
                self._cold = False
            while self._prepared():
                self._publish(self._engine.step())
        except Exception as error:
            logger.exception("the engine failed; nothing is answered any more")
            self._ended = f"the engine failed: {type(error).__name__}"
        self._fail()

    def _prepared(self) -> bool:
        """Wait for work and hand it to the engine; return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._new or self._unwanted or self._places)
            for number in self._unwanted:
                if self._places.pop(number, None) is not None:
                    self._engine.cancel(number)
            self._unwanted.clear()
            for place in self._new:
                try:
                    self._places[self._engine.submit(place.call.requests[place.index])] = place
                except UserError as error:
                    self._deliver([(place, error)])
            self._new.clear()
            return self._ended is None

    def _publish(self, tokens: Sequence[Token]) -> None:
        with self._changed:
            wanted = [(self._places[token.request], token) for token in tokens]
            for token in tokens:
                if token.end is not None:
                    del self._places[token.request]
        self._deliver(wanted)

    def _fail(self) -> None:
        with self._changed:
            places = [*self._places.values(), *self._new]
            self._places.clear()
            self._new.clear()
            self._deliver([(place, EngineFailed(self._ended)) for place in places])

    def _deliver(self, news: Sequence[tuple[_Place, Token | Exception]]) -> None:
        assert self._loop is not None
        if news and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put, news)


def _put(news: Sequence[tuple[_Place, Token | Exception]]) -> None:
    for place, token in news:
        place.call.events.put_nowait(Event(place.index, token))
