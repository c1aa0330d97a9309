"""Rows of the embedded set, local files, directories of files, or the Hugging Face hub, each with its origin."""

import contextlib
import csv
import dataclasses
import io
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.choices import OnBadRow
from qlora_jax.data.chat_template import TemplateUnusable
from qlora_jax.data.hub import load_from_hub, split_names_on_hub
from qlora_jax.defaults import DEFAULT_DATASET
from qlora_jax.errors import UserError
from qlora_jax.files import user_path
from qlora_jax.json_text import MAX_BYTES, parse_json

HUB_NAMES = {
    "alpaca": "tatsu-lab/alpaca",
    "alpaca-clean": "yahma/alpaca-cleaned",
    "oasst1": "timdettmers/openassistant-guanaco",
}
"""The reference program's short names and the hub data sets they stand for."""

NOT_YET_SUPPORTED = ("self-instruct", "chip2", "hh-rlhf", "longform")
"""The reference program's short names that a later release adds."""

REFERENCE_EVAL_SIZE = 1024
"""Rows held out when `eval_dataset_size` is not given, as in the reference program."""

_BAD_SHOWN = 20

# A value takes memory however short it is in the file; a row and its position, which count as two, 350 bytes.
_MOST_SMALL_VALUES, _SMALL_BYTES = 1 << 20, 16
_MOST_BAD_ROWS = 1 << 17
# Compressed text may take 6 times its file, or 256 MiB. Few rows are unpacked at a time: a large value that a
# dictionary holds once may be that of every row.
_MOST_UNPACKED, _UNPACKED_RATIO, _UNPACKED_ROWS, _UNPACKED_AT_ONCE = 1 << 28, 6, 64, 1 << 29
_JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)

_HELD_OUT_SPLITS = ("heldout", "eval", "validation", "test")
# What a data set is evaluated on: the first of these that it has.
_EVALUATED_SPLITS = ("test", "validation", "valid", "val", "dev", "eval", "heldout")
_SPLIT_FILE = re.compile(r"^(train|validation|valid|val|dev|test|eval|heldout)(?![A-Za-z0-9])", re.IGNORECASE)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


@dataclass(frozen=True)
class Rows:
    """Rows of a data set with their origins.

    Attributes:
        rows: column -> value of each row.
        positions: origin of each row, e.g. "train.jsonl line 17"; lines, items and rows count from 1.
        source: name of the data set.
        notes: decisions taken while reading, for people.
        bad: what is wrong with each row that could not be read; begins with its origin and has no full stop, for it is
            told in lists and in parentheses.
    """

    rows: Sequence[dict[str, Any]]
    positions: Sequence[str]
    source: str
    notes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse rows without a position or positions without a row."""
        if len(self.rows) != len(self.positions):
            raise ValueError(f"{self.source}: {len(self.rows)} rows but {len(self.positions)} positions")

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows' dicts."""
        return iter(self.rows)

    def select(self, indices: Sequence[int] | np.ndarray | range) -> "Rows":
        """Return the rows at `indices`, in that order, with their positions."""
        picked = [int(i) for i in indices]
        rows, positions = [self.rows[i] for i in picked], [self.positions[i] for i in picked]
        return dataclasses.replace(self, rows=rows, positions=positions)


@contextlib.contextmanager
def collected(bad: list[str]) -> Iterator[None]:
    """Run the reading of one row; what is wrong with it goes to `bad`, unless it would be so with all rows."""
    try:
        yield
    except TemplateUnusable:
        raise
    except UserError as error:
        bad.append(str(error).removesuffix("."))


def bad_rows(bad: Sequence[str]) -> UserError:
    """Make the error about rows that cannot be used, which tells about the first twenty of them."""
    if len(bad) == 1:
        return UserError(f"{bad[0]}; mend it, or leave such rows out with `on_bad_row=skip`.")
    more = f"\n  and {len(bad) - _BAD_SHOWN} more." if len(bad) > _BAD_SHOWN else ""
    told = "\n  ".join(f"{message}." for message in bad[:_BAD_SHOWN])
    return UserError(
        f"{len(bad)} rows cannot be used; mend them, or leave such rows out with `on_bad_row=skip`:\n  {told}{more}"
    )


def load_rows(dataset: str, *, split: str = "train", field: str = "dataset", on_bad_row: OnBadRow = "error") -> Rows:
    """Read every row of a split of `dataset`.

    Args:
        dataset: "default" (the embedded set); a .json, .jsonl, .csv, .tsv or .parquet file; a directory of such files;
            a short name of `HUB_NAMES`; or the id of a data set on the Hugging Face hub. A .json file holds a list of
            objects, or an object with that list under "data". An existing path wins over a hub id of the same name.
        split: of the hub, where "train[:10%]" is one too; of a directory, the files named after it (`train.jsonl`,
            `test-00000.parquet`), or all files for "train" when none is named after a split. A single file is the
            "train" split. "default" has "train" and the held-out rows ("heldout", "eval", "validation" and "test" all
            mean those).
        field: of the configuration that has the name, for errors.
        on_bad_row: "error" refuses a data set in which a row cannot be read, and tells about the first twenty such
            rows; "skip" leaves them out, as `Rows.bad`.

    Raises:
        UserError: something cannot be read; names the file and, where there is one, the line.
    """
    rows = _load(dataset, split, field)
    if rows.bad and on_bad_row == "error":
        raise bad_rows(rows.bad)
    return rows


def _load(dataset: str, split: str, field: str) -> Rows:
    where = _located(dataset, field)
    if where is None:
        return _load_default(split)
    if isinstance(where, str):
        return _load_hub(where, split, _told(dataset, where, field))
    if where.is_dir():
        return _load_directory(where, split)
    if split != "train":
        raise UserError(f"{where} is a single file and has no split '{split}'; its rows are the split 'train'.")
    return _load_file(where)


def split_names(dataset: str, *, field: str = "dataset") -> tuple[str, ...]:
    """List the splits of `dataset`; none of a single file, and of a directory without a file named after one.

    Raises:
        UserError: as `load_rows`.
    """
    where = _located(dataset, field)
    if where is None:
        return ("train", "heldout")
    if isinstance(where, str):
        return split_names_on_hub(where, _told(dataset, where, field))
    return tuple(dict.fromkeys(_split_files(where).values())) if where.is_dir() else ()


def evaluated_split(names: Sequence[str], trained: str = "train") -> str | None:
    """Choose the split to evaluate on: test, else validation or what else it is called; None if there is none.

    Args:
        names: of the splits there are.
        trained: the split, or splits as in "train+test[:10%]", that is trained on and not to be evaluated on.
    """
    left = set(names) - set(re.findall(r"\w+", trained))
    return next((name for name in _EVALUATED_SPLITS if name in left), None)


def _located(dataset: str, field: str) -> Path | str | None:
    """Return the path of local data, the id of a data set on the hub, or None for the embedded set."""
    if dataset == DEFAULT_DATASET:
        return None
    if dataset in NOT_YET_SUPPORTED:
        raise UserError(
            f"`{field}={dataset}` is not supported yet; use one of {', '.join(HUB_NAMES)}, a local file or a hub id."
        )
    path = user_path(dataset)
    if path.is_dir() or path.is_file():
        return path
    if path.suffix.lower() in _READERS or path.is_absolute() or dataset.startswith((".", "~")):
        raise UserError(f"`{field}={dataset}`: there is no such file or directory.")
    hub_id = HUB_NAMES.get(dataset, dataset)
    if not _HUB_ID.match(hub_id):
        raise UserError(f"`{field}={dataset}` is neither a file, a directory nor the id of a data set on the hub.")
    return hub_id


def split_rows(rows: Rows, eval_dataset_size: int | None, *, seed: int) -> tuple[Rows, Rows, str]:
    """Hold out `eval_dataset_size` rows for evaluation; returns (train, evaluation, a line for people).

    The held-out rows are the first ones of a permutation drawn from PCG64(SeedSequence([seed, 0x5EED])); both parts
    keep the order of the file. 0 holds out nothing. None means the reference program's 1024, or a tenth of the rows
    (at least one) if there are fewer than 2048.

    Raises:
        UserError: a given size is negative or leaves no row to train on.
    """
    n = len(rows)
    read = f" that can be read ({rows.bad[0]})" if rows.bad else ""
    if eval_dataset_size is None:
        if n < 2:
            raise UserError(
                f"{rows.source} has {n} row{read}, too few to hold any out for evaluation; give `eval_dataset_size=0`."
            )
        size = REFERENCE_EVAL_SIZE if n >= 2 * REFERENCE_EVAL_SIZE else max(1, n // 10)
        why = "the default" if size == REFERENCE_EVAL_SIZE else f"a tenth, since {n} rows are few"
    else:
        size, why = eval_dataset_size, "`eval_dataset_size`"
        if size < 0:
            raise UserError(f"`eval_dataset_size={size}` is negative.")
        if size >= n:
            raise UserError(
                f"`eval_dataset_size={size}` leaves nothing to train on: {rows.source} has {n} rows{read}; give fewer."
            )
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x5EED]))).permutation(n)
    held_out, kept = np.sort(order[:size]), np.sort(order[size:])
    note = f"{rows.source}: {size} of {n} rows held out for evaluation ({why}), seed {seed}"
    return rows.select(kept), dataclasses.replace(rows.select(held_out), bad=()), note


def _load_default(split: str) -> Rows:
    if split != "train" and split not in _HELD_OUT_SPLITS:
        raise UserError(f"the default data set has no split '{split}'; it has train and {', '.join(_HELD_OUT_SPLITS)}.")
    name = "default_train.jsonl" if split == "train" else "default_heldout.jsonl"
    with resources.as_file(resources.files("qlora_jax.data") / name) as path:
        return dataclasses.replace(_load_file(path), source=f"default ({name})")


def _load_file(path: Path) -> Rows:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown kind of data file; use {', '.join(_READERS)}.")
    found = _Found(path, path.stat().st_size)
    try:
        reader(path, found)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not found.rows:
        raise bad_rows(found.bad) if found.bad else UserError(f"{path} holds no rows.")
    return Rows(found.rows, found.positions, str(path), tuple(found.notes), tuple(found.bad))


@dataclass
class _Found:
    """Rows of a file as they are read; attributes as of `Rows`.

    Attributes:
        path: of the file.
        size: its bytes.
        nbytes: how much of it was read so far; of a compressed one, what was unpacked.
        values: cells read so far, what lists and objects in them hold, and two for each row.
    """

    path: Path
    size: int
    nbytes: int = 0
    values: int = 0
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    positions: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    bad: list[str] = dataclasses.field(default_factory=list)

    def add(self, row: dict[str, Any], position: str) -> None:
        self.values += 1 + _count_values(row)
        self.check(self.values)
        self.rows.append(row)
        self.positions.append(position)

    def take(self, read: Callable[[Any, str], dict[str, Any]], value: Any, place: str) -> None:
        """Add the row that `read` makes of a value at a place such as "line 3", or keep what is wrong with it."""
        try:
            row = read(value, f"{self.path} {place}")
        except UserError as error:
            self.refuse(str(error).removesuffix("."))
        else:
            self.add(row, f"{self.path.name} {place}")

    def refuse(self, message: str) -> None:
        """Keep what is wrong with a row, which has no full stop."""
        self.bad.append(message)
        if len(self.bad) > _MOST_BAD_ROWS:
            raise UserError(f"{self.path} has over {_MOST_BAD_ROWS} rows that cannot be used: {self.bad[0]}; mend it.")

    def check(self, values: int, nbytes: int | None = None) -> None:
        """Refuse a file with many values and little text, which would take many times its size in memory.

        That shows early, if what was read so far has twice as many: rows may be sorted by length.
        """
        if values > _MOST_SMALL_VALUES and values * _SMALL_BYTES > min(
            self.size, 2 * (self.nbytes if nbytes is None else nbytes)
        ):
            raise UserError(
                f"{self.path} holds over {values} values of less than {_SMALL_BYTES} bytes on average, which no text "
                "does; mend it, or split it into smaller files."
            )


def _count_values(value: Any) -> int:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 1
    return 1 + len(value) + sum(_count_values(held) - 1 for held in value if isinstance(held, dict | list))


def _visible_files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.iterdir() if p.is_file() and not p.name.startswith("."))


def _split_files(directory: Path) -> dict[Path, str]:
    """Return the data files that are named after a split, and the split."""
    files = [p for p in _visible_files(directory) if p.suffix.lower() in _READERS]
    return {p: match.group(1).lower() for p in files if (match := _SPLIT_FILE.match(p.name))}


def _load_directory(directory: Path, split: str) -> Rows:
    visible = _visible_files(directory)
    data_files = [p for p in visible if p.suffix.lower() in _READERS]
    if not data_files:
        raise UserError(f"{directory} holds no data file ({', '.join(_READERS)}).")
    named = _split_files(directory)
    if named:
        chosen = [p for p in data_files if named.get(p) == split]
        if not chosen:
            raise UserError(
                f"{directory} has no file of split '{split}'; it has {', '.join(sorted(p.name for p in named))}."
            )
    elif split == "train":
        chosen = data_files
    else:
        raise UserError(
            f"{directory} has no split '{split}': no file is named after one, so all are the split 'train'."
        )
    parts = [_load_file(p) for p in chosen]
    notes = [f"{directory}: read {', '.join(p.name for p in chosen)}"]
    others = [p.name for p in named if p not in chosen]
    if others:
        notes.append(f"{directory}: of other splits: {', '.join(others)}")
    left = [p.name for p in visible if p not in chosen and p not in named]
    if left:
        notes.append(f"{directory}: not read: {', '.join(left)}")
    return Rows(
        [row for part in parts for row in part.rows],
        [position for part in parts for position in part.positions],
        f"{directory} ({split})" if named else str(directory),
        (*notes, *(note for part in parts for note in part.notes)),
        tuple(message for part in parts for message in part.bad),
    )


def _told(dataset: str, hub_id: str, field: str) -> str:
    return f"`{field}={dataset}`" if dataset == hub_id else f"`{field}={dataset}` ({hub_id})"


def _load_hub(hub_id: str, split: str, told: str) -> Rows:
    rows = [dict(row) for row in load_from_hub(hub_id, split, told)]
    if not rows:
        raise UserError(f"the hub's data set '{hub_id}' holds no rows in split '{split}'.")
    return Rows(rows, [f"{hub_id} {split} row {i}" for i in range(1, len(rows) + 1)], f"{hub_id} ({split})")


def _as_row(value: Any, position: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{position}: a row must be an object with named columns, not {_json_kind(value)}.")
    return value


def _json_kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _read_jsonl(path: Path, found: _Found) -> None:
    with path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_BYTES + 1), b""), start=1):
            if len(line) > MAX_BYTES:
                raise UserError(f"{path} line {number}: longer than {MAX_BYTES} bytes, the most for a row; split it.")
            found.nbytes += len(line)
            found.check(number)
            if len(line) > _MOST_SMALL_VALUES:
                _check_structure(line, found)
            if not line.strip():
                continue
            found.take(_parse_row, line, f"line {number}")


def _parse_row(line: bytes, position: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError as error:
        _, reason = _json_mistake(error)
        raise UserError(f"{position}: not valid JSON ({reason}).") from error
    return _as_row(value, position)


def _json_mistake(error: ValueError) -> tuple[str, str]:
    """Return (line, "reason, column 7") of an error of `parse_json`."""
    reason, _, place = str(error).rpartition(" at line ")
    line, _, column = place.partition(" column ")
    return line, f"{reason}, column {column}"


def _read_json(path: Path, found: _Found) -> None:
    text = path.read_bytes()
    if not text.strip():
        return
    found.size = found.nbytes = len(text)
    _check_structure(text, found)
    try:
        content = parse_json(text)
    except ValueError as error:
        hint = "; JSON lines belong in a .jsonl file" if "trailing characters" in str(error) else ""
        line, reason = _json_mistake(error)
        raise UserError(f"{path} line {line}: not valid JSON ({reason}){hint}.") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise UserError(f'{path} must hold a list of objects, or an object whose "data" is one.')
    for number, value in enumerate(content, start=1):
        found.take(_as_row, value, f"item {number}")


def _check_structure(text: bytes, found: _Found) -> None:
    """Refuse JSON with many values before it is parsed, by its punctuation: that in strings does not count."""
    marks = (b",", b"[", b"{", b":")
    if sum(map(text.count, marks)) * _SMALL_BYTES > max(len(text), _MOST_SMALL_VALUES * _SMALL_BYTES):
        found.check((text.count(b'"') - text.count(b'\\"')) // 4)  # a value may have a name and be text
        most = max(len(text) // _SMALL_BYTES, _MOST_SMALL_VALUES) + 1
        bare, strings = _JSON_STRING.subn(b"", text, count=most)
        found.check(max(strings, sum(map(bare.count, marks))))


def _read_delimited(path: Path, found: _Found, delimiter: str) -> None:
    # The module's own limit of 128 kB a field is process-wide and refuses long documents.
    limit = csv.field_size_limit(MAX_BYTES)
    try:
        with path.open("rb") as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header: list[str] | None = None
            first_line = 1
            for cells in reader:
                line, first_line = first_line, reader.line_num + 1
                found.nbytes = file.tell()
                found.check(max(found.values + len(cells), reader.line_num))
                if not cells:
                    continue
                if header is None:
                    header = cells
                    _refuse_twice(header, f"{path} line {line}")
                elif len(cells) != len(header):
                    found.refuse(f"{path} line {line}: {len(cells)} fields, but the header has {len(header)}")
                else:
                    found.add(dict(zip(header, cells, strict=True)), f"{path.name} line {line}")
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _refuse_twice(columns: Sequence[str], position: str) -> None:
    twice = sorted(name for name, count in Counter(columns).items() if count > 1)
    if twice:
        raise UserError(f"{position}: column {reprlib.repr(twice[0])} appears twice in the header.")


def _read_csv(path: Path, found: _Found) -> None:
    _read_delimited(path, found, ",")


def _read_tsv(path: Path, found: _Found) -> None:
    _read_delimited(path, found, "\t")


def _read_parquet(path: Path, found: _Found) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def too_large(unpacked: int) -> UserError:
        return UserError(f"{path} unpacks to {unpacked} bytes or more, over {most}, the most for its size; split it.")

    try:
        file = pq.ParquetFile(path)
        size, rows = found.size, file.metadata.num_rows
        # Runs of equal values take no room in a file, and all of it in memory.
        if rows > 8 * size:
            raise UserError(f"{path} says that it has {rows} rows in {size} bytes, which no text takes.")
        _refuse_twice(file.schema_arrow.names, str(path))
        most = max(_MOST_UNPACKED, _UNPACKED_RATIO * size)
        # Not the sizes of their columns: pyarrow ends the process when it is asked for those of a damaged one.
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
        if sum(sizes) > most:
            raise too_large(sum(sizes))
        found.check(rows * (2 + len(file.schema_arrow)), most)
        left_out: set[str] = set()
        at_a_time = max(2, min(_UNPACKED_ROWS, _UNPACKED_AT_ONCE // max([1, *sizes])))
        for batch in file.iter_batches(at_a_time):
            columns = [_without_dictionary(batch, name, found) for name in batch.schema.names]
            nbytes = sum(column.nbytes for column in columns)
            if nbytes > batch.num_rows * MAX_BYTES:
                raise UserError(
                    f"{path} row {len(found.rows) + 1} or one of the next {at_a_time}: longer than {MAX_BYTES} bytes, "
                    "the most for a row; split it."
                )
            found.nbytes += nbytes
            if found.nbytes > most:
                raise too_large(found.nbytes)
            found.check(found.values + sum(map(_count_cells, columns)))
            _add_batch(batch.schema.names, columns, found, left_out)
    except pa.ArrowException as error:
        raise UserError(f"{path} is not a readable parquet file ({' '.join(str(error).split())[:200]}).") from error
    for row in found.rows if left_out else ():
        for name in left_out:
            row.pop(name, None)


def _without_dictionary(batch: Any, name: str, found: _Found) -> Any:
    """Return a column of a batch as large as its values are, for each of them is an object of its own in a row."""
    import pyarrow as pa

    column = batch.column(name)
    if isinstance(column, pa.DictionaryArray):
        return column.dictionary_decode()
    if "dictionary<" in str(column.type):
        raise UserError(f"{found.path}: column {name!r} holds dictionaries inside lists or objects; write plain ones.")
    return column


def _count_cells(column: Any) -> int:
    """Count the values of a column, and those in its lists and objects, before they are made Python's."""
    import pyarrow as pa

    held: list[Any] = []
    if isinstance(column, pa.StructArray):
        held = column.flatten()
    elif isinstance(column, pa.MapArray):
        held = [column.keys, column.items]
    elif isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        held = [column.flatten()]
    return len(column) + sum(map(_count_cells, held))


def _add_batch(names: Sequence[str], parts: Sequence[Any], found: _Found, left_out: set[str]) -> None:
    """Add the rows of a part of a parquet file, without the columns that cannot be read."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {}
    for name, column in zip(names, parts, strict=True):
        if name in left_out:
            continue
        try:
            columns[name] = column.to_pylist()
        except (pa.ArrowException, OverflowError, ValueError) as error:  # a date that Python does not have
            found.notes.append(f"{found.path}: column {name!r} is left out, for it cannot be read ({error})")
            left_out.add(name)
    first = len(found.rows) + 1
    for number in range(len(parts[0]) if parts else 0):
        row = {name: values[number] for name, values in columns.items()}
        found.add(row, f"{found.path.name} row {first + number}")


_READERS: dict[str, Callable[[Path, _Found], None]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
