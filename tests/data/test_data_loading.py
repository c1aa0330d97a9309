"""Rows: every kind of file, every way it can be wrong, splits, and the embedded data set."""

import dataclasses
import json
import re
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_jax.data import (
    Rows,
    default_prompts,
    evaluated_split,
    follows_style,
    load_rows,
    loading,
    split_names,
    split_rows,
)
from qlora_jax.data.formats import choose_format
from qlora_jax.errors import UserError

ROWS = [{"input": "a, b", "output": 'say "ä"'}, {"input": "two\nlines", "output": "c"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbered(n):
    return Rows([{"text": str(i)} for i in range(n)], [f"row {i}" for i in range(n)], "numbers")


def test_every_kind_of_file_gives_the_same_rows_and_its_own_positions(tmp_path):
    files = {
        "rows.jsonl": (jsonl(ROWS[:1]) + "\n" + jsonl(ROWS[1:]), ["rows.jsonl line 1", "rows.jsonl line 3"]),
        "rows.json": (json.dumps(ROWS, indent=1), ["rows.json item 1", "rows.json item 2"]),
        "data.json": (json.dumps({"data": ROWS}), ["data.json item 1", "data.json item 2"]),
        "rows.csv": (
            'input,output\n"a, b","say ""ä"""\n"two\nlines",c\n',
            ["rows.csv line 2", "rows.csv line 3"],
        ),
        "rows.tsv": (
            'input\toutput\na, b\t"say ""ä"""\n"two\nlines"\tc\n',
            ["rows.tsv line 2", "rows.tsv line 3"],
        ),
    }
    for name, (text, positions) in files.items():
        rows = load_rows(write(tmp_path / name, text))
        assert list(rows) == ROWS, name
        assert rows.positions == positions
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))
    assert list(rows) == ROWS
    assert rows.positions == ["rows.parquet row 1", "rows.parquet row 2"]


def test_csv_position_is_the_first_line_of_a_record_that_spans_several(tmp_path):
    path = write(tmp_path / "rows.csv", 'input,output\n"two\nlines",c\nd,e\n')
    assert load_rows(path).positions == ["rows.csv line 2", "rows.csv line 4"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl line 3: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a\.jsonl line 2: a row must be an object.*a list"),
        ("a.jsonl", "3\n", r"a\.jsonl line 1: .*a number"),
        ("a.jsonl", "", r"a\.jsonl holds no rows"),
        ("a.jsonl", "\n  \n", r"a\.jsonl holds no rows"),
        ("a.json", "", r"a\.json holds no rows"),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.json", '{"a": 1}', r"a\.json must hold a list of objects"),
        ("a.json", '[{"a": 1}, null]', r"a\.json item 2: .*not null"),
        ("a.json", '[\n{"a" 1}]', r"a\.json line 2: not valid JSON"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', r"JSON lines belong in a \.jsonl file"),
        ("a.csv", "", r"a\.csv holds no rows"),
        ("a.csv", "input,output\n", r"a\.csv holds no rows"),
        ("a.csv", "input,output\na,b\nc\n", r"a\.csv line 3: 1 fields, but the header has 2"),
        ("a.csv", "input,input\na,b\n", r"column 'input' appears twice"),
        ("a.csv", 'input,output\n"a"b,c\n', r"a\.csv line 2: "),
        ("a.parquet", "PAR1 no", r"a\.parquet is not a readable parquet file"),
        ("a.txt", "hello", r"a\.txt: unknown kind of data file"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        load_rows(write(tmp_path / name, text))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 1: not valid JSON \(invalid unicode code point, column 8\)"):
        load_rows(str(tmp_path / "a.jsonl"))


def test_missing_files_are_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("rows.jsonl", str(tmp_path / "nothing"), "./nothing", "~/nothing-here"):
        with pytest.raises(UserError, match="no such file or directory"):
            load_rows(name)


def test_a_single_file_has_only_the_train_split(tmp_path):
    with pytest.raises(UserError, match="single file and has no split 'test'"):
        load_rows(write(tmp_path / "a.jsonl", jsonl(ROWS)), split="test")


def test_directory_without_split_names_is_all_train(tmp_path):
    write(tmp_path / "b.jsonl", jsonl(ROWS[1:]))
    write(tmp_path / "a.json", json.dumps(ROWS[:1]))
    write(tmp_path / "README.md", "words")
    rows = load_rows(str(tmp_path))
    assert list(rows) == ROWS
    assert rows.positions == ["a.json item 1", "b.jsonl line 1"]
    assert any("not read: README.md" in note for note in rows.notes)
    with pytest.raises(UserError, match="has no split 'test'"):
        load_rows(str(tmp_path), split="test")


def test_directory_with_split_names_keeps_the_splits_apart(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", jsonl(ROWS[:1]))
    write(tmp_path / "train-00001-of-00002.jsonl", jsonl(ROWS[1:]))
    write(tmp_path / "test.jsonl", jsonl([{"x": "y"}]))
    rows = load_rows(str(tmp_path))
    assert list(rows) == ROWS
    assert any("of other splits: test.jsonl" in note for note in rows.notes)
    assert split_names(str(tmp_path)) == ("test", "train")
    assert list(load_rows(str(tmp_path), split="test")) == [{"x": "y"}]
    with pytest.raises(UserError, match="no file of split 'validation'"):
        load_rows(str(tmp_path), split="validation")


def test_directory_without_data_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no data file"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("name", ["self-instruct", "chip2", "hh-rlhf", "longform"])
def test_sets_of_a_later_release_say_so(name):
    with pytest.raises(UserError, match="not supported yet"):
        load_rows(name)


def test_names_of_splits(tmp_path):
    assert split_names("default") == ("train", "heldout")
    assert split_names(write(tmp_path / "test.jsonl", jsonl(ROWS))) == ()
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "rows.jsonl", jsonl(ROWS))
    assert split_names(str(tmp_path / "plain")) == ()
    with pytest.raises(UserError, match=r"^`eval_dataset=\./nothing`: there is no such file"):
        split_names("./nothing", field="eval_dataset")


@pytest.mark.parametrize(
    ("names", "trained", "split"),
    [
        (("train", "validation", "test"), "train", "test"),
        (("train", "dev", "validation"), "train", "validation"),
        (("train", "val"), "train", "val"),
        (("train", "heldout"), "train", "heldout"),
        (("train", "more"), "train", None),
        (("train", "test", "dev"), "test", "dev"),
        (("train", "test", "dev"), "train[:10%]+test[10%:]", "dev"),
        (("train", "test"), "train+test", None),
        ((), "train", None),
    ],
)
def test_the_split_that_is_evaluated(names, trained, split):
    assert evaluated_split(names, trained) == split


def test_split_is_deterministic_complete_and_in_order():
    rows = numbered(100)
    train, held_out, note = split_rows(rows, 30, seed=1)
    again, held_out_again, _ = split_rows(rows, 30, seed=1)
    other, _, _ = split_rows(rows, 30, seed=2)
    assert (len(train), len(held_out)) == (70, 30)
    assert train.positions == again.positions and held_out.positions == held_out_again.positions
    assert train.positions != other.positions
    assert sorted(train.positions + held_out.positions) == sorted(rows.positions)
    assert [int(r["text"]) for r in train] == sorted(int(r["text"]) for r in train)
    assert "30 of 100 rows held out" in note


@pytest.mark.parametrize(("n", "held_out"), [(2, 1), (11, 1), (500, 50), (2047, 204), (2048, 1024), (9846, 1024)])
def test_split_by_default_is_the_references_or_a_tenth(n, held_out):
    assert len(split_rows(numbered(n), None, seed=0)[1]) == held_out


def test_split_refuses_to_leave_nothing_to_train_on():
    for size in (10, 11):
        with pytest.raises(UserError, match="eval_dataset_size"):
            split_rows(numbered(10), size, seed=0)
    with pytest.raises(UserError, match="negative"):
        split_rows(numbered(10), -1, seed=0)
    with pytest.raises(UserError, match="give `eval_dataset_size=0`"):
        split_rows(numbered(1), None, seed=0)
    assert len(split_rows(numbered(10), 0, seed=0)[1]) == 0


def messages(row):
    assert list(row) == ["messages"]
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def test_embedded_set_follows_its_style_and_keeps_prompts_apart():
    train = [messages(row) for row in load_rows("default")]
    held_out = [messages(row) for row in load_rows("default", split="eval")]
    assert len(train) >= 300 and len(held_out) == 40
    for prompt, answer in train + held_out:
        assert follows_style(answer), (prompt, answer)
        assert 50 < len(answer) < 240, (prompt, answer)

    def plain(text):
        return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()

    prompts = [plain(prompt) for prompt, _ in train + held_out]
    assert len(set(prompts)) == len(prompts)
    assert len({answer for _, answer in train + held_out}) == len(prompts)
    assert set(default_prompts()) <= {prompt for prompt, _ in held_out}
    with pytest.raises(UserError, match="no split 'dev'"):
        load_rows("default", split="dev")


@pytest.mark.parametrize(
    ("answer", "follows"),
    [
        ("Aye, captain! It is 84.\nHeading: Split the sum.", True),
        ("  Aye, captain! It is 84.\nIt is.\nHeading: Stop, then go.\n", True),
        ("It is 84.\nHeading: Split the sum.", False),
        ("Aye, captain! It is 84.", False),
        ("Aye, captain! It is 84. Heading: Split the sum.", False),
        ("Aye, captain! It is 84.\nHeading: Split.", False),
        ("Aye, captain! It is 84.\nHeading: Split the sum into two parts.", False),
        ("Aye, captain! It is 84.\nHeading: Split the sum.\nAnd more.", False),
        ("Aye, captain! It is 84.\nHeading: Split it.\nHeading: Split it.", False),
    ],
)
def test_style_check(answer, follows):
    assert follows_style(answer) is follows


def test_the_first_twenty_bad_rows_are_told_at_once(tmp_path):
    lines = ['{"text": "good"}', '{"text": "half \\ud800 a pair"}', "[1]", "[" * 100_000, '{"n": ' + "1" * 5_000 + "}"]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([*lines, *["{"] * 22]))
    with pytest.raises(UserError) as error:
        load_rows(str(file))
    first, *told = str(error.value).splitlines()
    assert first == "26 rows cannot be used; mend them, or leave such rows out with `on_bad_row=skip`:"
    assert len(told) == 21 and told[-1] == "  and 6 more."
    for line, number, message in zip(
        told, range(2, 22), ("hex escape", "not a list", "recursion limit", "number out of range", "EOF"), strict=False
    ):
        assert line.startswith(f"  {file} line {number}: ") and message in line and len(line) < 300
    rows = load_rows(str(file), on_bad_row="skip")
    assert list(rows) == [{"text": "good"}] and rows.positions == ["a.jsonl line 1"] and len(rows.bad) == 26
    train, held_out, _ = split_rows(dataclasses.replace(numbered(10), bad=rows.bad), None, seed=0)
    assert train.bad == rows.bad and not held_out.bad


def test_a_csv_of_a_million_columns_is_read_fast(tmp_path):
    file = tmp_path / "wide.csv"
    file.write_text(",".join(map(str, range(10**6))) + "\n" + "," * (10**6 - 1))
    start = time.process_time()
    rows = load_rows(str(file))
    with pytest.raises(UserError, match=r"'19' and 999980 more fit no format") as error:
        choose_format(rows, None)
    assert time.process_time() - start < 5 and len(str(error.value)) < 2_000


def test_a_date_that_python_does_not_have_costs_its_column_only(tmp_path):
    table = pa.table({"text": ["a", "b"], "when": pa.array([2**30, 0], pa.date32())})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = load_rows(str(tmp_path / "a.parquet"))
    assert list(rows) == [{"text": "a"}, {"text": "b"}]
    assert "column 'when' is left out, for it cannot be read" in rows.notes[0]


def test_a_parquet_file_with_damaged_statistics_does_not_end_the_process(tmp_path):
    """A column that is no longer optional has a histogram too long for it, which pyarrow checks outside of Python."""
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"output": ["a", "b"]}), file, compression="none")
    optional, required = b"\x25\x02\x18\x06output", b"\x24\x02\x18\x06output"
    assert file.read_bytes().count(optional) == 1
    file.write_bytes(file.read_bytes().replace(optional, required))
    read = f"from qlora_jax.data import load_rows\nload_rows({str(file)!r})"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True)
    assert done.returncode >= 0, done.stderr


def test_json_in_strings_is_no_values(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_MOST_SMALL_VALUES", 100)
    row = {"a": json.dumps([[1, 2]] * 100)}
    (tmp_path / "a.json").write_text(json.dumps([row] * 3))
    assert list(load_rows(str(tmp_path / "a.json"))) == [row] * 3
    (tmp_path / "a.json").write_text(json.dumps([{"a": [[1, 2]] * 100}] * 3))
    with pytest.raises(UserError, match=r"a\.json holds over \d+ values of less than 16 bytes"):
        load_rows(str(tmp_path / "a.json"))


def test_a_nested_dictionary_in_parquet_is_refused(tmp_path):
    words = pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int32()), pa.array(["a"]))
    pq.write_table(pa.table({"b": pa.StructArray.from_arrays([words], ["c"])}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column 'b' holds dictionaries inside lists or objects"):
        load_rows(str(tmp_path / "a.parquet"))


def test_a_parquet_file_that_says_it_has_more_rows_than_it_can_is_refused(tmp_path):
    pq.write_table(pa.table({"text": pa.nulls(10**6, pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="says that it has 1000000 rows in"):
        load_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["x" * 256 + ".jsonl", "~nosuchuser/a.jsonl", "a\0.jsonl"])
def test_a_path_that_cannot_be_is_one_sentence(name):
    with pytest.raises(UserError, match=r"^the path '.*' cannot be used: "):
        load_rows(name)
