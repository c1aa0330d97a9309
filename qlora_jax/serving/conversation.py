"""A conversation with one model, answered token by token."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from qlora_jax.errors import UserError
from qlora_jax.generation import Engine, Request, Sampling
from qlora_jax.generation.text import TextStream
from qlora_jax.serving.model import ServedModel


@dataclasses.dataclass
class Speed:
    """Time that an answer took.

    Attributes:
        prompt: tokens that were read for it.
        reused: tokens of the conversation that need not be read again.
        tokens: of the answer.
        first: seconds until the first of them.
        rest: seconds of the others.
    """

    prompt: int = 0
    reused: int = 0
    tokens: int = 0
    first: float = 0.0
    rest: float = 0.0

    def __str__(self) -> str:
        """Describe in one line for people."""
        rate = f", then {(self.tokens - 1) / self.rest:.1f} tokens/s" if self.tokens > 1 and self.rest else ""
        kept = f" ({self.reused} kept)" if self.reused else ""
        return f"{self.tokens} tokens; {self.prompt} read{kept} in {self.first:.2f} s{rate}"


class Conversation:
    """Turns of a user and a model.

    Args:
        served: the model.
        engine: that answers.
        name: of `served.names`.
        sampling: of answers.
        stop: strings that end an answer, beside those of the name.
        system: first message; None for none.

    Attributes:
        messages: so far.
        name: that answers; another may be put there.
        speed: of the last answer.
    """

    def __init__(
        self,
        served: ServedModel,
        engine: Engine,
        name: str,
        sampling: Sampling,
        *,
        stop: tuple[str, ...] = (),
        system: str | None = None,
    ):
        self.served, self.engine, self.name = served, engine, name
        self._sampling, self._stop = sampling, stop
        self.messages: list[dict[str, str]] = []
        self.speed = Speed()
        self.reset(system)

    @property
    def stands_alone(self) -> bool:
        """Every question is asked without those before: the model's format has no place for them."""
        return not self.served.names[self.name].format.turns

    def reset(self, system: str | None = None) -> None:
        """Forget all turns, and begin with a system prompt if one is given."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, text: str, interrupted: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer to a text as it comes; what was said of one that is interrupted stays in the conversation.

        Args:
            text: the user's turn.
            interrupted: asked before every token; the answer ends where it says so.

        Raises:
            UserError: the conversation does not fit into the context or the model's template; it is as it was.
        """
        question = {"role": "user", "content": text}
        # A system prompt is for every question: it is refused, not passed over, where there is no place for it.
        before = [each for each in self.messages if each["role"] == "system" or not self.stands_alone]
        tokens = self.served.encode_conversation([*before, question], self.name)
        adapter, row_format = self.served.names[self.name].adapter, self.served.names[self.name].format
        self.speed = Speed(prompt=len(tokens))
        reused, started = self.engine.reused, time.perf_counter()
        number = self.engine.submit(Request(tuple(tokens), self._sampling, adapter))
        stream = TextStream(self.served.tokenizer, (*self._stop, *row_format.stops))
        self.messages.append(question)
        try:
            while (self.engine.busy or self.engine.waiting) and not stream.stopped and not interrupted():
                for token in self.engine.step():
                    self._time(time.perf_counter() - started, self.engine.reused - reused)
                    if token.end != "stop" and (new := stream.add(token.token)):
                        yield new
            if rest := stream.end():
                yield rest
        finally:
            self.engine.cancel(number)
            self.messages.append({"role": "assistant", "content": stream.text})

    def _time(self, seconds: float, reused: int) -> None:
        speed = self.speed
        if not speed.tokens:
            speed.first, speed.reused, speed.prompt = seconds, reused, speed.prompt - reused
        speed.tokens += 1
        speed.rest = seconds - speed.first


def check_name(served: ServedModel, name: Any) -> str:
    """Return a name of a served model; `UserError` if it has none such, which lists those it has."""
    if not isinstance(name, str) or name not in served.names:
        raise UserError(f"there is no {name!r} here; choose from {', '.join(served.names)}.")
    return name


def transcript(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation as a row of training data in the format `messages`."""
    return {"model": conversation.name, "messages": conversation.messages}
