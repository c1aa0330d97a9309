"""Row formats: a table of functions from a row to text, and the choice among them."""

import itertools
import json
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_jax.data.loading import Rows
from qlora_jax.errors import UserError

Message = Mapping[str, Any]
"""One turn of a conversation: at least {"role": str, "content": str}."""

SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "model": "assistant", "bing": "assistant", "bard": "assistant", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Name of a turn's author in ShareGPT's data sets -> role that the turn is read as."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of a message; the assistant's turns are trained."""

CHAT = "messages"
"""Format of conversations where nothing says which: they go through the tokenizer's own chat template."""

NOT_YET_SUPPORTED = ("chip2", "self-instruct", "hh-rlhf")
"""The reference program's formats that a later release adds."""

_NAMES_SHOWN = 20

_ALPACA_INTRODUCTION = "Below is an instruction that describes a task"
_ALPACA_REQUEST = "Write a response that appropriately completes the request."
# The trailing space after "Response:" is the reference program's; Stanford's own prompt has none.
ALPACA_PROMPT = f"{_ALPACA_INTRODUCTION}. {_ALPACA_REQUEST}\n\n### Instruction:\n{{instruction}}\n\n### Response: "
ALPACA_PROMPT_WITH_INPUT = (
    f"{_ALPACA_INTRODUCTION}, paired with an input that provides further context. {_ALPACA_REQUEST}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)


@dataclass(frozen=True)
class SourceTarget:
    """A row as a prompt (source, not trained by default) and its completion (target)."""

    source: str
    target: str


@dataclass(frozen=True)
class RowFormat:
    """A format of rows.

    Attributes:
        name: value of the field `dataset_format`.
        columns: alternative sets of required columns; the first that is present is used.
        read: (row, position) -> SourceTarget, or the list of messages; raises UserError naming position and column.
        optional: columns that are read if present.
        prompt: text before and after a user's message, up to where its answer begins; None for a chat format, whose
            `read` returns messages, which go through the tokenizer's chat template.
        turns: conversations may have several; else they are one question and its answer.
        stops: strings that end an answer where no token ends a turn: what the next turn begins with.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Mapping[str, Any], str], SourceTarget | list[Message]]
    optional: tuple[str, ...] = ()
    prompt: tuple[str, str] | None = None
    turns: bool = False
    stops: tuple[str, ...] = ()

    @property
    def chat(self) -> bool:
        """True if rows are messages for the tokenizer's chat template."""
        return self.prompt is None

    @property
    def place(self) -> str:
        """Messages that `prompt` has a place for, for errors."""
        has = "turns of user and assistant, the user's last" if self.turns else "one message of a user"
        return f"the model was trained on data of the format {self.name}, which has {has}; give such messages only."

    @property
    def template(self) -> str | None:
        """`prompt` as a chat template that begins with BOS, for programs that read those; None for a chat format.

        It renders what `conversation_text` does, and refuses the same messages.
        """
        if self.prompt is None:
            return None
        before, after = map(json.dumps, self.prompt)
        length = "messages | length % 2 == 0" if self.turns else "messages | length != 1"
        refuse = f"{{{{ raise_exception({json.dumps(self.place)}) }}}}"
        return (
            f"{{% if {length} %}}{refuse}{{% endif %}}{{{{ bos_token }}}}{{% for message in messages %}}"
            "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}" + refuse + "{% endif %}"
            f"{{% if message['role'] == 'user' %}}{{{{ {before} + message['content'] + {after} }}}}{{% else %}}"
            "{{ (' ' if message['content'] and message['content'].lstrip() == message['content'] else '') "
            "+ message['content'] }}{% endif %}{% endfor %}"
        )


@dataclass(frozen=True)
class ChosenFormat:
    """The format of some rows.

    Attributes:
        format: the format.
        inferred: it was inferred from the columns.
        columns: required columns.
        unused_columns: columns that the format does not read.
    """

    format: RowFormat
    inferred: bool
    columns: tuple[str, ...]
    unused_columns: tuple[str, ...]

    def lacks(self, row: Mapping[str, Any]) -> bool:
        """Tell if a row lacks a required column."""
        return any(column not in row for column in self.columns)

    def read(self, row: Mapping[str, Any], position: str) -> SourceTarget | list[Message]:
        """Read one row; raises UserError naming the position and the column that is not text."""
        return self.format.read(row, position)


def choose_format(rows: Rows, dataset_format: str | None) -> ChosenFormat:
    """Choose the format of `rows`: by name, or, for None, by the columns that occur in them.

    Inference, in this order: "messages" -> messages; "conversations" -> sharegpt; "instruction" and "output" -> alpaca;
    "input" and "output" -> input-output; "prompt" and "completion" -> prompt-completion; "question" and "answer" ->
    question-answer; "text" -> oasst1. Raises UserError for an unknown format, for columns that fit none, or when every
    row lacks a column that the format needs.
    """
    present = dict.fromkeys(column for row in rows for column in row)
    if dataset_format is None:
        for name in _INFERRED:
            if set(FORMATS[name].columns[0]) <= present.keys():
                chosen = FORMATS[name]
                break
        else:
            raise UserError(
                f"{rows.source}: the columns {_names(present)} fit no format; name one with `dataset_format` "
                f"({'; '.join(f'{f.name}: {_names(f.columns[0])}' for f in FORMATS.values())}) or rename the columns."
            )
    elif dataset_format in FORMATS:
        chosen = FORMATS[dataset_format]
    elif dataset_format in NOT_YET_SUPPORTED:
        raise UserError(f"`dataset_format={dataset_format}` is not supported yet; use one of {_names(FORMATS)}.")
    else:
        raise UserError(f"`dataset_format={dataset_format}` is unknown; use one of {_names(FORMATS)}.")
    columns = next((c for c in chosen.columns if set(c) <= present.keys()), chosen.columns[0])
    unused = tuple(column for column in present if column not in columns + chosen.optional)
    choice = ChosenFormat(chosen, dataset_format is None, columns, unused)
    if all(map(choice.lacks, rows)):
        column = next(column for column in columns if column not in rows.rows[0])
        raise UserError(
            f"{rows.positions[0]}: column '{column}' is missing, and no row has all that format '{chosen.name}' needs "
            f"({_names(columns)}); the row has {_names(rows.rows[0])}."
        )
    return choice


def conversation_text(messages: Sequence[Message], dataset_format: str, position: str) -> str:
    """Return the text of a conversation in `dataset_format`, which must not be a chat format, up to the next answer.

    Raises:
        UserError: messages that the format has no place for.
    """
    chosen = FORMATS[dataset_format]
    if chosen.prompt is None:
        raise ValueError(f"format '{dataset_format}' has no prompt text of its own")
    roles = [message["role"] for message in messages]
    alternate = roles == list(itertools.islice(itertools.cycle(("user", "assistant")), len(roles)))
    if not alternate or len(roles) % 2 == 0 or (len(roles) > 1 and not chosen.turns):
        raise UserError(f"{position}: {' '.join(roles) or 'no message'} given, but {chosen.place}")
    before, after = chosen.prompt
    text = ""
    for message in messages:
        said = message["content"]
        text = f"{text}{before}{said}{after}" if message["role"] == "user" else _answered(text, said)
    return text


def _names(names: Iterable[str]) -> str:
    """List names, of many the first few."""
    listed = list(names)
    more = f" and {len(listed) - _NAMES_SHOWN} more" if len(listed) > _NAMES_SHOWN else ""
    return (", ".join(f"'{name}'" for name in listed[:_NAMES_SHOWN]) or "none") + more


def _text(row: Mapping[str, Any], column: str, position: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{position}: column '{column}' must be text, not {kind}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f"{position}: column '{column}'"
        raise UserError(f"{where} has half of a surrogate pair at character {error.start}.") from None
    return value


def _read_alpaca(row: Mapping[str, Any], position: str) -> SourceTarget:
    instruction, target = _text(row, "instruction", position), _text(row, "output", position)
    given = "" if row.get("input") is None else _text(row, "input", position)
    if given:
        return SourceTarget(ALPACA_PROMPT_WITH_INPUT.format(instruction=instruction, input=given), target)
    return SourceTarget(ALPACA_PROMPT.format(instruction=instruction), target)


_PAIRS = {
    "input-output": ("input", "output"), "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
}  # fmt: skip
"""Formats of two columns that are the source and the target as they are."""


def _read_pair(columns: tuple[str, str]) -> Callable[[Mapping[str, Any], str], SourceTarget]:
    return lambda row, position: SourceTarget(*(_text(row, column, position) for column in columns))


def _read_oasst1(row: Mapping[str, Any], position: str) -> SourceTarget:
    if "text" in row:
        return SourceTarget("", _text(row, "text", position))
    prompt, answer = _text(row, "input", position), _text(row, "output", position)
    return SourceTarget("", _answered(prompt, answer))


def _answered(prompt: str, answer: str) -> str:
    """Put an answer of the format oasst1 after its prompt, with the published set's space between them."""
    # An answer that was generated may have brought it.
    apart = prompt and answer and not prompt[-1].isspace() and not answer[0].isspace()
    return f"{prompt} {answer}" if apart else prompt + answer


def read_messages(row: Mapping[str, Any], position: str) -> list[Message]:
    """Read the messages of a row; raises `UserError` naming the position and what is wrong with which."""
    read: list[Message] = []
    for number, message in enumerate(_turns(row, "messages", position), start=1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f"{position}: message {number} must be an object with 'role' and 'content'.")
        if message["role"] not in ROLES:
            role = reprlib.repr(message["role"])
            raise UserError(f"{position}: message {number} has role {role}; use one of {_names(ROLES)}.")
        where = f"{position}, message {number}"
        if isinstance(message["content"], list):
            message = {**message, "content": _joined_parts(message["content"], where)}
        _text(message, "content", where)
        read.append(message)
    return read


def _read_sharegpt(row: Mapping[str, Any], position: str) -> list[Message]:
    read: list[Message] = []
    if row.get("system"):
        read.append({"role": "system", "content": _text(row, "system", position)})
    for number, turn in enumerate(_turns(row, "conversations", position), start=1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise UserError(f"{position}: turn {number} must be an object with 'from' and 'value'.")
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise UserError(f"{position}: turn {number} is from {turn['from']!r}; use one of {_names(SHAREGPT_ROLES)}.")
        read.append({"role": role, "content": _text(turn, "value", f"{position}, turn {number}")})
    return read


def _turns(row: Mapping[str, Any], column: str, position: str) -> list[Any]:
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{position}: column '{column}' must be a list of messages with at least one in it.")
    return turns


def _joined_parts(parts: list[Any], position: str) -> str:
    """Return the text of a content that is a list of parts, all of which must be text."""
    texts = []
    for number, part in enumerate(parts, start=1):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            what = f"of type {kind!r}" if isinstance(part, dict) and kind != "text" else "no text"
            raise UserError(
                f'{position}: part {number} of its content is {what}; only {{"type": "text", "text": ...}} can be read.'
            )
        texts.append(part["text"])
    return "".join(texts)


_before, _after = ALPACA_PROMPT.split("{instruction}")
_ALPACA = (_before, _after)

FORMATS: dict[str, RowFormat] = {
    f.name: f
    for f in (
        RowFormat("alpaca", (("instruction", "output"),), _read_alpaca, ("input",), _ALPACA),
        RowFormat("alpaca-clean", (("instruction", "output"),), _read_alpaca, ("input",), _ALPACA),
        *(RowFormat(name, (columns,), _read_pair(columns), prompt=("", "")) for name, columns in _PAIRS.items()),
        RowFormat(
            "oasst1",
            (("text",), ("input", "output")),
            _read_oasst1,
            prompt=("### Human: ", "### Assistant:"),
            turns=True,
            stops=("### Human:",),
        ),
        RowFormat("messages", (("messages",),), read_messages, turns=True),
        RowFormat("sharegpt", (("conversations",),), _read_sharegpt, ("system",), turns=True),
    )
}
"""Every format by name: the values of the field `dataset_format`."""

_INFERRED = ("messages", "sharegpt", "alpaca", *_PAIRS, "oasst1")
