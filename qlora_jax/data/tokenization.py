"""Rows to token ids and labels, with a count of what is trained, masked and cut."""

import contextlib
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlora_jax.choices import OnBadRow
from qlora_jax.data.chat_template import render
from qlora_jax.data.formats import FORMATS, ChosenFormat, Message, SourceTarget, choose_format, conversation_text
from qlora_jax.data.loading import Rows, bad_rows, collected
from qlora_jax.errors import UserError

IGNORED = -100
"""The label of a token that is not trained."""

Tokenizer = Any
"""A transformers.PreTrainedTokenizerFast; not imported, for importing transformers takes seconds."""

_CHUNK = 2048
_SHOWN = 5
# Of a text, characters that are encoded for each token to be kept; a token has about four.
_CHARACTERS = 32


@dataclass(frozen=True, eq=False)
class Example:
    """One document, ready to be batched.

    Attributes:
        input_ids: int32 [n].
        labels: int32 [n], aligned with input_ids as in transformers (labels[i] is the token *at* i, to be predicted
            from those before it; the loss shifts); IGNORED where not trained, and always at 0, since nothing precedes
            it.
        example_id: origin of the row, "train.jsonl line 17".
        more: values of further fields (`qlora_jax.data.Field`): [n] with an axis S, a scalar without.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    example_id: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self.input_ids)

    @property
    def n_trained(self) -> int:
        """Count the tokens that are trained."""
        return int(np.count_nonzero(self.labels != IGNORED))


@dataclass(frozen=True)
class Tally:
    """A count of rows with the positions of the first few."""

    count: int = 0
    positions: tuple[str, ...] = ()

    def plus(self, position: str) -> "Tally":
        """Return the tally after another row."""
        shown = (*self.positions, position) if len(self.positions) < _SHOWN else self.positions
        return Tally(self.count + 1, shown)

    def __str__(self) -> str:
        """Print as `3 (a.jsonl line 1, a.jsonl line 7, ...)`."""
        more = ", ..." if self.count > len(self.positions) else ""
        return f"{self.count} ({', '.join(self.positions)}{more})" if self.count else "0"


@dataclass
class DataReport:
    """Counts of used, dropped and truncated rows of a data set; `str()` formats them for people.

    rows_read = rows_used + bad.count + lacking_column.count + untrained.count. Truncations count rows that lost
    tokens: sources, targets, whole conversations (`messages`), and examples cut to `max_length`.
    """

    source: str
    dataset_format: str
    format_inferred: bool
    rows_read: int
    rows_used: int = 0
    bad: Tally = field(default_factory=Tally)
    lacking_column: Tally = field(default_factory=Tally)
    untrained: Tally = field(default_factory=Tally)
    source_truncated: Tally = field(default_factory=Tally)
    target_truncated: Tally = field(default_factory=Tally)
    conversation_truncated: Tally = field(default_factory=Tally)
    length_truncated: Tally = field(default_factory=Tally)
    empty_target: Tally = field(default_factory=Tally)
    n_tokens: int = 0
    n_trained: int = 0
    longest: int = 0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Format the counts in a few lines."""
        how = "inferred from the columns" if self.format_inferred else "as asked"
        lines = [
            f"{self.source}: format {self.dataset_format} ({how}); {self.rows_used} of {self.rows_read} rows used",
            f"  tokens: {self.n_tokens} in all, {self.n_trained} trained, longest row {self.longest}",
        ]
        counted = [
            ("cannot be used, left out", self.bad),
            ("lack a column, left out", self.lacking_column),
            ("train on nothing, left out", self.untrained),
            ("source cut to source_max_len", self.source_truncated),
            ("target cut to target_max_len", self.target_truncated),
            ("conversation cut to source_max_len + target_max_len", self.conversation_truncated),
            ("cut to the sequence length", self.length_truncated),
            ("empty target, only end-of-text trained", self.empty_target),
        ]
        lines += [f"  rows that {_verb(label)}: {tally}" for label, tally in counted if tally.count]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _verb(label: str) -> str:
    return (
        label
        if label.startswith(("train", "lack", "cannot"))
        else f"have {label}"
        if label.startswith("empty")
        else f"had {label}"
    )


def tokenize_rows(
    rows: Rows,
    *,
    tokenizer: Tokenizer,
    dataset_format: str | None = None,
    source_max_len: int = 1024,
    target_max_len: int = 256,
    train_on_source: bool = False,
    max_length: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> tuple[list[Example], DataReport]:
    """Turn rows into examples, in the order of the rows, and count what was used, dropped and cut.

    Source/target formats, as in the reference program: ids = (BOS + source)[:source_max_len] + (target +
    EOS)[:target_max_len], each cut by itself, so that a cut target has no EOS. Source labels are IGNORED unless
    `train_on_source`. A tokenizer without BOS adds none (then the first target token of a row without source is not
    trained, since nothing precedes it). Source and target are encoded separately and without the tokenizer's own
    special tokens.

    `messages`: the conversation through the tokenizer's chat template, encoded as a single text; the assistant's turns
    with their end-of-turn token are trained, all else (and white space after that token) is masked unless
    `train_on_source`. Cut at the end to source_max_len + target_max_len.

    A row that lacks a column, or that has no trained token, is left out and counted.

    Args:
        rows: of a data set.
        tokenizer: a fast one, with an EOS token.
        dataset_format: name of a format; inferred from the columns if None.
        source_max_len: most tokens of a source.
        target_max_len: most tokens of a target.
        train_on_source: train the source too.
        max_length: most tokens of an example (the sequence length when packing); truncations are counted.
        on_bad_row: "error" refuses rows that cannot be used, `rows.bad` among them, and tells about the first twenty;
            "skip" leaves them out and counts them.

    Raises:
        UserError: bad rows (names position and column), a tokenizer without EOS, without the fast backend or, for
            `messages`, without a usable chat template, or no row is left.
    """
    for name, value in (("source_max_len", source_max_len), ("target_max_len", target_max_len)):
        if value < 1:
            raise UserError(f"`{name}={value}`: must be at least 1.")
    if max_length is not None and max_length < 2:
        raise UserError(f"the sequence length must be at least 2, not {max_length}.")
    _check_tokenizer(tokenizer)
    chosen = choose_format(rows, dataset_format)
    read = len(rows) + len(rows.bad)
    report = DataReport(rows.source, chosen.format.name, chosen.inferred, read, notes=list(rows.notes))
    lacking = [i for i, row in enumerate(rows) if chosen.lacks(row)]
    for i in lacking:
        report.lacking_column = report.lacking_column.plus(rows.positions[i])
    if lacking:
        rows = rows.select(sorted(set(range(len(rows))) - set(lacking)))
    if chosen.unused_columns:
        report.notes.append(f"columns that the format does not use: {', '.join(chosen.unused_columns)}")

    rows, texts = _read_rows(rows, chosen, tokenizer, on_bad_row, report)
    if chosen.format.chat:
        pairs = _tokenize_messages(rows, texts, tokenizer, source_max_len + target_max_len, report)
    else:
        pairs = _tokenize_pairs(rows, texts, tokenizer, source_max_len, target_max_len, report)

    examples = []
    for position, (ids, trained) in zip(rows.positions, pairs, strict=True):
        if max_length is not None and len(ids) > max_length:
            report.length_truncated = report.length_truncated.plus(position)
            ids, trained = ids[:max_length], trained[:max_length]
        labels = ids.copy() if train_on_source else np.where(trained, ids, np.int32(IGNORED))
        labels[:1] = IGNORED
        example = Example(ids, labels, position)
        if not example.n_trained:
            report.untrained = report.untrained.plus(position)
            continue
        examples.append(example)
        report.n_tokens += len(example)
        report.n_trained += example.n_trained
        report.longest = max(report.longest, len(example))
    report.rows_used = len(examples)
    if not examples:
        raise UserError(
            f"{rows.source}: none of the {len(rows)} rows trains on anything ({report.untrained}); check the columns, "
            "`source_max_len` and `target_max_len`."
        )
    return examples, report


def encode_prompt(prompt: str, *, tokenizer: Tokenizer, dataset_format: str) -> np.ndarray:
    """Encode a prompt as in training on `dataset_format`, up to the beginning of the answer; returns int32 [n]."""
    messages = [{"role": "user", "content": prompt}]
    return encode_conversation(messages, tokenizer=tokenizer, dataset_format=dataset_format, position="prompt")


def encode_conversation(
    messages: Sequence[Message], *, tokenizer: Tokenizer, dataset_format: str, position: str
) -> np.ndarray:
    """Encode a conversation as in training on `dataset_format`, up to the beginning of the next answer.

    Args:
        messages: of the conversation, the last of them not the assistant's.
        tokenizer: of the model.
        dataset_format: of the data that the model was trained on; a chat format for the tokenizer's own template.
        position: of the conversation, for messages.

    Returns:
        int32 [n].

    Raises:
        UserError: the template refuses the messages, the format has no place for them, the last is the assistant's, or
            a text cannot be written in UTF-8.
    """
    _check_tokenizer(tokenizer)
    for message in messages:
        _check_unicode(message["content"], position)
    if not FORMATS[dataset_format].chat:
        text, start = conversation_text(messages, dataset_format, position), _bos(tokenizer)
    elif not tokenizer.chat_template:
        raise UserError(f"{position}: the tokenizer has no chat template; use that of a chat model.")
    elif not messages or messages[-1]["role"] == "assistant":
        raise UserError(f"{position}: the last message must be one to answer, not the assistant's; add such a message.")
    else:
        (text,), start = render(tokenizer, messages, [(len(messages), True)], position), []
    return np.array([*start, *next(_encode(tokenizer, [text])).ids], np.int32)


def _check_unicode(text: Any, position: str) -> None:
    """Refuse what a terminal makes of bytes that are no UTF-8."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        raise UserError(f"{position}: the text has bytes that are no UTF-8; leave them out.") from None


def encode_text(text: str, *, tokenizer: Tokenizer, position: str = "prompt") -> np.ndarray:
    """Encode a text to be continued, after the tokenizer's first token if it has one; returns int32 [n].

    Raises:
        UserError: it cannot be written in UTF-8; begins with `position`.
    """
    _check_tokenizer(tokenizer)
    _check_unicode(text, position)
    return np.array([*_bos(tokenizer), *next(_encode(tokenizer, [text])).ids], np.int32)


def eos_ids(tokenizer: Tokenizer, others: Iterable[int], dataset_format: str) -> tuple[int, ...]:
    """Return the tokens that end an answer, in ascending order.

    Args:
        tokenizer: of the model; its EOS is one.
        others: those of the model's config.json.
        dataset_format: of the data that the model was trained on; in a chat format, the token that is trained at the
            end of a turn is one too, which neither may name.
    """
    ends = {tokenizer.eos_token_id, *others}
    if FORMATS[dataset_format].chat and tokenizer.chat_template:
        with contextlib.suppress(UserError):  # a template that cannot be used is told where it is needed
            ends.add(_turn_end(tokenizer))
    return tuple(sorted(ends - {None}))


def _turn_end(tokenizer: Tokenizer) -> int | None:
    """Return the token that ends the assistant's turns; None if that is not a special one."""
    special = _special(tokenizer)
    messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = _conversation(messages, tokenizer, special, "the end of a turn")
    if not found.ended:
        return None
    turn = found.text[slice(*found.turns[0])]
    token: int = tokenizer.convert_tokens_to_ids(max(filter(turn.endswith, special), key=len))
    return token


def check_tokens(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, vocabulary: int, position: str) -> None:
    """Raise `UserError`, which names position and token, if one is negative or not below the model's `vocab_size`."""
    smallest, largest = int(np.min(ids, initial=0)), int(np.max(ids, initial=0))
    if smallest < 0:
        raise UserError(f"{position}: token {smallest} is negative; use the tokenizer of the model.")
    if largest >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{position}: token {largest} ({reprlib.repr(token)}) is beyond the model's vocab_size {vocabulary}; the "
            f"tokenizer is that of another model, or tokens were added to it."
        )


def _special(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the tokens that can end a turn: all but those of the vocabulary proper."""
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]))


def _read_rows(
    rows: Rows, chosen: ChosenFormat, tokenizer: Tokenizer, on_bad_row: OnBadRow, report: DataReport
) -> tuple[Rows, list[Any]]:
    """Return the rows that can be used, and of each a `SourceTarget` or `_Conversation`."""
    if chosen.format.chat and not tokenizer.chat_template:
        raise UserError(
            f"{rows.source} holds chat messages, but the tokenizer has no chat template; use the tokenizer of a chat "
            "model, or data of another `dataset_format`."
        )
    special = _special(tokenizer)
    bad: list[str] = list(rows.bad)
    kept, texts = [], []
    for i, (row, position) in enumerate(zip(rows.rows, rows.positions, strict=True)):
        with collected(bad):
            read = chosen.read(row, position)
            texts.append(_conversation(read, tokenizer, special, position) if isinstance(read, list) else read)
            kept.append(i)
    if bad and on_bad_row == "error":
        raise bad_rows(bad)
    for message in bad:
        report.bad = report.bad.plus(message)
    return rows.select(kept), texts


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} has no fast version (tokenizer.json), which is needed."
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so the model could not learn to stop; set its 'eos_token'.")


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _encode(tokenizer: Tokenizer, texts: Sequence[str], most: int | None = None) -> Iterator[Any]:
    """Yield the tokenizers.Encoding of each text, without special tokens; texts are encoded in chunks.

    With `most`, the number of tokens that will be kept, of a long text only a beginning is encoded: one that has at
    least twice as many tokens, so that what is kept is far from where it was cut.
    """
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        if most is None:
            yield from _encodings(tokenizer, list(chunk))
            continue
        length = most * _CHARACTERS
        for text, encoding in zip(chunk, _encodings(tokenizer, [text[:length] for text in chunk]), strict=True):
            encoded, covered = encoding, length
            while covered < len(text) and len(encoded.ids) < 2 * most:
                covered *= 4
                (encoded,) = _encodings(tokenizer, [text[:covered]])
            yield encoded


def _encodings(tokenizer: Tokenizer, texts: list[str]) -> list[Any]:
    encodings: list[Any] = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    ).encodings
    return encodings


def _tokenize_pairs(
    rows: Rows,
    pairs: Sequence[SourceTarget],
    tokenizer: Tokenizer,
    source_max_len: int,
    target_max_len: int,
    report: DataReport,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids int32 [n], trained bool [n]) of each row."""
    for position, pair in zip(rows.positions, pairs, strict=True):
        if not pair.target:
            report.empty_target = report.empty_target.plus(position)
    bos, eos = _bos(tokenizer), [tokenizer.eos_token_id]
    if not bos:
        report.notes.append("the tokenizer has no BOS token; none is added")
    sources = _encode(tokenizer, [pair.source for pair in pairs], source_max_len)
    targets = _encode(tokenizer, [pair.target for pair in pairs], target_max_len)
    for position, source, target in zip(rows.positions, sources, targets, strict=True):
        source_ids, target_ids = bos + source.ids, target.ids + eos
        if len(source_ids) > source_max_len:
            report.source_truncated = report.source_truncated.plus(position)
            source_ids = source_ids[:source_max_len]
        if len(target_ids) > target_max_len:
            report.target_truncated = report.target_truncated.plus(position)
            target_ids = target_ids[:target_max_len]
        ids = np.array(source_ids + target_ids, np.int32)
        yield ids, np.arange(len(ids)) >= len(source_ids)


@dataclass(frozen=True)
class _Conversation:
    """A rendered conversation.

    Attributes:
        text: the rendering.
        turns: [start, end) of the trained characters of each turn of the assistant.
        ended: every turn has an end token.
        extra: keys of its messages beside role and content.
    """

    text: str
    turns: list[tuple[int, int]]
    ended: bool
    extra: dict[str, None]


def _tokenize_messages(
    rows: Rows, conversations: Sequence[_Conversation], tokenizer: Tokenizer, max_len: int, report: DataReport
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids int32 [n], trained bool [n]) of each conversation."""
    endless = Tally()
    extra: dict[str, None] = {}
    for conversation, position in zip(conversations, rows.positions, strict=True):
        extra.update(conversation.extra)
        if not conversation.ended:
            endless = endless.plus(position)
    if extra:
        report.notes.append(f"message keys left to the chat template, which may ignore them: {', '.join(extra)}")
    if endless.count:
        report.notes.append(
            f"the chat template ends assistant turns without a special token, so stopping is not learnt: {endless}"
        )
    encodings = _encode(tokenizer, [conversation.text for conversation in conversations], max_len)
    for position, conversation, encoding in zip(rows.positions, conversations, encodings, strict=True):
        ids = np.array(encoding.ids, np.int32)
        trained = np.zeros(len(ids), bool)
        covered = encoding.offsets[-1][1] if len(ids) else 0  # of a long text only a beginning was encoded
        for start, end in conversation.turns:
            trained[_token_at(encoding, start, covered) : _token_at(encoding, end, covered)] = True
        if len(ids) > max_len:
            report.conversation_truncated = report.conversation_truncated.plus(position)
        yield ids[:max_len], trained[:max_len]


def _token_at(encoding: Any, char: int, n_chars: int) -> int:
    """Return the index of the first token that starts at or after `char`; the number of tokens if there is none."""
    # Tokens may leave characters uncovered (byte-level tokenizers trim spaces off the offsets they report).
    for at in range(char, n_chars):
        token = encoding.char_to_token(at)
        if token is not None:
            while token < len(encoding.ids) and encoding.token_to_chars(token)[0] < char:
                token += 1
            return token
    return len(encoding.ids)


def _conversation(
    messages: list[Message], tokenizer: Tokenizer, special: tuple[str, ...], position: str
) -> _Conversation:
    """Render a conversation and locate the assistant's turns.

    A turn starts where the rendering of all before it, with the generation prompt, ends, and runs to the end of the
    rendering that includes it. That needs each rendering to be a prefix of the next, which is checked.
    """
    if messages[0]["role"] == "assistant":
        raise UserError(f"{position}: the conversation starts with the assistant; put a user message before it.")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    asked = [(len(messages), False), *(each for i in answers for each in ((i, True), (i + 1, False)))]
    full, *others = render(tokenizer, messages, asked, position)
    spans, ended, reached = [], True, ""
    for i, before, after in zip(answers, others[::2], others[1::2], strict=True):
        for longer, shorter in ((before, reached), (after, before), (full, after)):
            if not longer.startswith(shorter):
                raise UserError(
                    f"{position}: the tokenizer's chat template renders the conversation up to message {i + 1} "
                    "differently than within the whole, so the assistant's tokens cannot be located; use a template "
                    "that only appends, or split the row into single exchanges."
                )
        turn = after[len(before) :].rstrip()
        if turn.endswith(special):
            spans.append((len(before), len(before) + len(turn)))
        else:
            spans.append((len(before), len(after)))
            ended = False
        reached = after
    extra = dict.fromkeys(key for message in messages for key in message if key not in ("role", "content"))
    return _Conversation(full, spans, ended, extra)
