"""Answers to a file of prompts."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax import data
from qlora_jax.errors import UserError
from qlora_jax.files import atomic_write, user_path, write_errors
from qlora_jax.generation import BeamSearch, Engine, EngineOptions, Request, Sampling, Token
from qlora_jax.generation.engine import no_room
from qlora_jax.generation.text import TextStream
from qlora_jax.json_text import parse_json
from qlora_jax.serving.conversation import check_name
from qlora_jax.serving.model import ServedModel

_SETTINGS = {field.name for field in dataclasses.fields(Sampling)}
_ASKED = ("prompt", "messages", "text")
_WRITTEN = {"answer", "end", "tokens", "token_logprobs", "score"}


class Task(NamedTuple):
    """A row to answer.

    Attributes:
        row: as it was read.
        request: what is asked of the engine.
        stop: strings that end the answer.
        position: of the row in its file, for errors.
    """

    row: Mapping[str, Any]
    request: Request
    stop: tuple[str, ...]
    position: str

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompt and the longest answer together."""
        return len(self.request.tokens) + self.request.sampling.max_new_tokens


def read_tasks(path: str, served: ServedModel, name: str, sampling: Sampling, stop: Sequence[str] = ()) -> list[Task]:
    """Read rows to answer from a file of JSON lines.

    A row has `prompt` (a question, put into the format that the adapter was trained with), `messages` (a conversation),
    or `text` (to be continued as it is). It may have settings of its own, by the names of `Sampling`; `adapter`;
    `stop`, a list of strings; and `logprobs`, how many of the likeliest tokens to return beside each. Everything else
    is copied.

    Args:
        path: of the file.
        served: the model.
        name: of `served.names`, for rows without `adapter`.
        sampling: settings where a row has none; of a row's seed, its number is added.
        stop: strings that end every answer.

    Raises:
        UserError: a file or rows that cannot be read; names the lines.
    """
    file = user_path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    tasks: list[Task] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            seeded = dataclasses.replace(sampling, seed=(sampling.seed + len(tasks)) % 2**32)
            position = f"{file} line {number}"
            tasks.append(task_of(_parsed(line, position), position, served, name, seeded, stop))
    if not tasks:
        raise UserError(f"{file} holds no row; write one a line.")
    return tasks


def _parsed(line: str, position: str) -> Any:
    try:
        return parse_json(line.encode())
    except ValueError as error:
        raise UserError(f"{position} is not valid JSON ({error}).") from None


def task_of(row: Any, position: str, served: ServedModel, name: str, sampling: Sampling, stop: Sequence[str]) -> Task:
    """Check a row and put it into tokens; see `read_tasks`.

    Args:
        row: as it was read.
        position: in its file, for errors.
        served: the model.
        name: that answers if the row names none.
        sampling: settings where the row has none.
        stop: strings that end the answer.

    Raises:
        UserError: the row is wrong.
    """
    asked = [key for key in _ASKED if isinstance(row, dict) and key in row]
    if len(asked) != 1:
        raise UserError(f"{position} must be an object with one of {', '.join(_ASKED)}.")
    if taken := _WRITTEN & row.keys():
        raise UserError(f"{position} has {min(taken)!r}, which the answer is written as; give it another name.")
    try:
        name = check_name(served, row.get("adapter", name))
    except UserError as error:
        raise UserError(f"{position}: {error}") from None
    own = row.get("stop", [])
    if not isinstance(own, list) or not all(isinstance(each, str) for each in own):
        raise UserError(f"{position}: stop must be a list of strings.")
    likeliest = row.get("logprobs", 0)
    if type(likeliest) is not int or not 0 <= likeliest <= 20:
        raise UserError(f"{position}: logprobs must be from 0 to 20.")
    request = Request(
        tuple(_tokens(row, asked[0], position, served, name)),
        _settings(row, position, sampling),
        served.names[name].adapter,
        likeliest,
    )
    ends = served.names[name].format.stops if asked[0] != "text" else ()
    return Task(row, request, (*stop, *own, *ends), position)


def _tokens(row: Mapping[str, Any], key: str, position: str, served: ServedModel, name: str) -> list[int]:
    value = row[key]
    if key == "messages":
        return served.encode_conversation(data.read_messages(row, position), name, position)
    if not isinstance(value, str):
        raise UserError(f"{position}: {key} must be text.")
    if key == "text":
        return served.encode_text(value, position)
    return served.encode_conversation([{"role": "user", "content": value}], name, position)


def _settings(row: Mapping[str, Any], position: str, sampling: Sampling) -> Sampling:
    own = {}
    for key in _SETTINGS & row.keys():
        wanted, value = type(getattr(sampling, key)), row[key]
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise UserError(f"{position}: {key} must be of the type {wanted.__name__}.")
        own[key] = wanted(value)
    try:
        return dataclasses.replace(sampling, **own)
    except UserError as error:
        raise UserError(f"{position}: {error}") from None


def answered(
    tasks: Sequence[Task], served: ServedModel, engine: Engine, progress: Callable[[Token], None] = lambda token: None
) -> Iterator[dict[str, Any]]:
    """Yield the rows with their answers, in their order, while later ones are being answered.

    Added to a row: answer, end ("stop" or "length"), tokens (their number) and, if it asks for logprobs,
    token_logprobs, a list of [token, logprob, {likeliest token: logprob}].

    Args:
        tasks: rows.
        served: the model.
        engine: that answers.
        progress: called for every token.

    Raises:
        UserError: a row leaves no room; before anything is answered.
    """
    for task in tasks:
        _check_room(task, engine.capacity)
    running = {engine.submit(task.request): _Answer(task, served) for task in tasks}
    order = iter(list(running))
    done: dict[int, dict[str, Any]] = {}
    following = next(order, None)
    while following is not None:
        for token in engine.step():
            progress(token)
            answer = running.get(token.request)
            if answer is not None and answer.add(token):
                engine.cancel(token.request)
                done[token.request] = running.pop(token.request).row()
        while following in done:
            yield done.pop(following)
            following = next(order, None)


def searched(
    tasks: Sequence[Task], served: ServedModel, search: BeamSearch, options: EngineOptions
) -> Iterator[dict[str, Any]]:
    """Yield the rows with the best answers that searches find, one after the other.

    Added to a row: answer, up to the first of its stop strings; end, tokens, and score, see `BeamSearch`.

    Args:
        tasks: rows.
        served: the model.
        search: settings of the searches.
        options: room and type of their caches.

    Raises:
        UserError: a row asks for draws or probabilities, or leaves no room; before the first search.
    """
    for task in tasks:
        asked = {"do_sample": task.request.sampling.do_sample, "logprobs": task.request.likeliest > 0}
        if wrong := [name for name, given in asked.items() if given]:
            raise UserError(f"{task.position}: {wrong[0]} cannot go with `num_beams`; leave one of them out.")
        _check_room(task, options.capacity)
    for task in tasks:
        best = served.search(task.request, search, options)[0]
        answer = _Answer(task, served)
        ended = best.tokens[-1] in served.eos_ids
        for i, token in enumerate(best.tokens):
            last = i + 1 == len(best.tokens)
            if answer.add(Token(0, token, None, (), ("stop" if ended else "length") if last else None)):
                break
        yield answer.row() | {"score": best.score}


def _check_room(task: Task, capacity: int) -> None:
    if len(task.request.tokens) >= capacity:
        raise UserError(f"{task.position}: {no_room(len(task.request.tokens), capacity)}")


class _Answer:
    """An answer while it comes."""

    def __init__(self, task: Task, served: ServedModel):
        self._task, self._vocabulary = task, served.vocabulary
        self._stream = TextStream(served.tokenizer, task.stop, task.request.tokens if "text" in task.row else ())
        self._tokens: list[Token] = []
        self._end = "length"

    def add(self, token: Token) -> bool:
        """Take a token; return True after the last."""
        if token.end != "stop":
            self._tokens.append(token)
            self._stream.add(token.token)
        if token.end is not None:
            self._stream.end()
        if self._stream.stopped or token.end == "stop":
            self._end = "stop"
        return self._stream.stopped or token.end is not None

    def row(self) -> dict[str, Any]:
        """Return the row with the answer."""
        row = {**self._task.row, "answer": self._stream.text, "end": self._end, "tokens": len(self._tokens)}
        if "logprobs" in row:
            texts = self._vocabulary
            row["token_logprobs"] = [
                [texts.text(token.token), token.logprob, texts.probabilities(token.likeliest)] for token in self._tokens
            ]
        return row


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; the file appears when it is whole, and so do directories that it is in."""
    with write_errors(path, "free some space or choose another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as new, new.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
