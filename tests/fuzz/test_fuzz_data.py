"""Mutated data files, prompts, chat templates, tokenizers, and the file of kernel timings."""

import csv
import functools
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.finetune_helpers import make_rows, make_tokenizer
from fuzz.mutations import mutated_bytes, mutated_json, run_cases, writer

from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.data import load_rows, tokenize_rows
from qlora_jax.kernels import timings_cache
from qlora_jax.training.answers import read_prompts
from qlora_jax.training.config import TrainConfig

pytestmark = pytest.mark.fuzz

ROWS = [{"input": f"question {i}: ä, \U0001f600?", "output": f'an "answer"\nin lines, {i}'} for i in range(4)]
TOKENIZER = make_tokenizer()


def usable(rows, **options):
    """Tokenise rows, as a run does, where a format can be told from their columns."""
    if all({"input", "output"} <= row.keys() for row in rows):
        tokenize_rows(rows, tokenizer=TOKENIZER, source_max_len=16, target_max_len=16, **options)
    return rows


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_jsonl(cases, tmp_path, on_bad_row):
    file = tmp_path / "rows.jsonl"

    def mutate(rng):
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
        at = rng.randrange(len(lines))
        lines[at] = mutated_json(ROWS[at], rng)
        whole = b"\n".join(lines)
        return mutated_bytes(whole, rng) if rng.random() < 0.3 else whole

    def check(mutant, rows):
        lines = mutant.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        numbers = [int(position.rpartition(" ")[2]) for position in rows.positions]
        assert len(rows) + len(rows.bad) == sum(bool(line.strip()) for line in lines)
        for number, row in zip(numbers, rows, strict=True):
            assert json.dumps(row) == json.dumps(json.loads(lines[number - 1].removeprefix(b"\xef\xbb\xbf")))

    def read():
        return usable(load_rows(str(file), on_bad_row=on_bad_row), on_bad_row=on_bad_row)

    run_cases(cases // 2, mutate, writer(file, read), check, "rows.jsonl")


def test_json(cases, tmp_path):
    file = tmp_path / "rows.json"

    def check(mutant, rows):
        said = json.loads(mutant.removeprefix(b"\xef\xbb\xbf"))
        assert json.dumps(list(rows)) == json.dumps(said["data"] if isinstance(said, dict) else said)

    run_cases(
        cases,
        lambda rng: mutated_json(rng.choice((ROWS, {"data": ROWS})), rng),
        writer(file, lambda: usable(load_rows(str(file)))),
        check,
        "rows.json",
    )


def test_csv(cases, tmp_path, request):
    request.addfinalizer(functools.partial(csv.field_size_limit, csv.field_size_limit(2**31 - 1)))
    file = tmp_path / "rows.csv"
    text = io.StringIO()
    table = csv.DictWriter(text, ["input", "output"])
    table.writeheader()
    table.writerows(ROWS)
    raw = text.getvalue().encode()

    def check(mutant, rows):
        lines = io.StringIO(mutant.decode("utf-8-sig"), newline="")
        header, *cells = [row for row in csv.reader(lines, strict=True) if row]
        assert [list(row) for row in rows] == [header] * len(rows)
        assert [list(row.values()) for row in rows] == cells

    run_cases(
        cases,
        lambda rng: mutated_bytes(raw, rng),
        writer(file, lambda: usable(load_rows(str(file)))),
        check,
        "rows.csv",
    )


def test_parquet(cases, tmp_path):
    file = tmp_path / "rows.parquet"
    when = pa.array([0, 1, 2, 3], pa.date32())
    table = pa.Table.from_pylist(ROWS).append_column("when", when)
    pq.write_table(table, file, compression="none", write_page_checksum=True)
    raw = file.read_bytes()

    def check(mutant, rows):
        assert all(len(row) <= len(rows.rows[0]) for row in rows)
        assert all(position.startswith("rows.parquet row ") for position in rows.positions)

    run_cases(
        cases,
        lambda rng: mutated_bytes(raw, rng),
        writer(file, lambda: usable(load_rows(str(file)))),
        check,
        "rows.parquet",
    )


def test_prompts(cases, tmp_path):
    file = tmp_path / "prompts.txt"

    def check(mutant, prompts):
        text = mutant.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        assert list(prompts) == [line for line in text.split("\n") if line.strip()]

    run_cases(
        cases,
        lambda rng: mutated_bytes("hello\nwhat is ä?\u2028\n\nlast\n".encode(), rng),
        writer(file, lambda: read_prompts(TrainConfig(prompts=str(file)))),
        check,
        "prompts.txt",
    )


PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{% if m.role == 'user' %}",
    "{% endif %}", "{{ 1 / 0 }}", "{{ messages * 3 }}", "{{ messages[9].content }}", "{% set x = x ~ x %}",
    "{% set x = 'ab' * 99 %}", "{{ eos_token }}", "{{ x }}", "{% macro f(n) %}{{ f(n) }}{% endmacro %}", "{{ f(1) }}",
    "{{ raise_exception('no') }}", "{{ messages | tojson }}", "{{ m.content | replace('a', x) }}", "{% include 'a' %}",
    "{{ m.__class__ }}", "{{ range(10 ** 6) }}", "{{ '%0999999d' % 1 }}", "<|im_start|>", "<|im_end|>\n",
    "{{ add_generation_prompt }}", "{{ strftime_now('%Y') | int }}", "{% break %}", "{{ namespace(a=1).a }}",
    "{{ m.content.format(m) }}",
)  # fmt: skip


def test_chat_template(cases, tmp_path):
    tokenizer = make_tokenizer()
    usual = tokenizer.chat_template
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make_rows(2)))
    rows = load_rows(str(file))
    expected = [example.input_ids.tolist() for example in tokenize_rows(rows, tokenizer=tokenizer)[0]]

    def mutate(rng):
        if rng.random() < 0.5:
            return mutated_bytes(usual.encode(), rng)
        pieces = rng.choices(PIECES, k=rng.randrange(1, 8))
        return "".join([usual, *pieces] if rng.random() < 0.5 else pieces).encode()

    def read(mutant):
        tokenizer.chat_template = mutant.decode(errors="replace")
        return tokenize_rows(rows, tokenizer=tokenizer)

    def check(mutant, value):
        examples, _ = value
        if mutant == usual.encode():
            assert [example.input_ids.tolist() for example in examples] == expected

    run_cases(cases, mutate, read, check, "rows.jsonl", "chat template")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer(cases, tmp_path, name):
    make_tokenizer().save_pretrained(tmp_path)
    document = json.loads((tmp_path / name).read_bytes())

    def check(mutant, tokenizer):
        ids = tokenizer("hello").input_ids
        assert isinstance(tokenizer.eos_token_id, int) and all(isinstance(token, int) for token in ids)

    run_cases(
        cases // 8,  # transformers takes a few milliseconds to make one
        lambda rng: mutated_json(document, rng),
        writer(tmp_path / name, lambda: load_tokenizer(tmp_path)),
        check,
        str(tmp_path),
    )


def test_kernel_timings(cases, tmp_path, monkeypatch):
    file = tmp_path / "kernels.json"
    monkeypatch.setenv(timings_cache.VARIABLE, str(file))
    entry = {"m": 64, "n": 128, "k": 256, "transposed": False, "implementation": "fused", "seconds": 1e-3}
    storage = {"quant_type": "nvfp4", "block_size": 16, "double_quant": False}
    document = {
        "format": "qlora-jax kernel timings 1",
        "chips": {"A": [entry, {**entry, "implementation": "unfused"}], "B": [{**entry, "m": 1}, {**entry, **storage}]},
    }

    def read():
        timings_cache._read.cache_clear()
        return timings_cache.timings("A"), timings_cache.nearest("A", timings_cache.Product(64, 128, 256, False))

    def check(mutant, value):
        entries = json.loads(mutant)["chips"].get("A", [])
        assert [timing.seconds for timing in value[0]] == [entry["seconds"] for entry in entries]
        assert [timing.product.m for timing in value[0]] == [entry["m"] for entry in entries]

    run_cases(cases, lambda rng: mutated_json(document, rng), writer(file, read), check, "kernels.json")
