"""Chat and batches of prompts, from files on disk: each answer is that of the model whose name was asked for."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from fixtures.finetune_helpers import make_model, make_tokenizer, write_jsonl
from fixtures.tiny_configs import BYTE_LLAMA
from fixtures.trained_adapters import write_adapter
from flax import nnx

from qlora_jax import data, models
from qlora_jax.commands import chat as chat_command
from qlora_jax.commands import generate as generate_command
from qlora_jax.errors import UserError
from qlora_jax.generation import Engine, EngineOptions, Request, Sampling
from qlora_jax.generation.text import TextStream
from qlora_jax.serving.batch import read_tasks, write_rows
from qlora_jax.serving.conversation import Conversation
from qlora_jax.serving.model import ServingConfig, adapter_names, load_served

pytestmark = pytest.mark.usefixtures("quick_compilation")
SHORT = Sampling(max_new_tokens=6)
ROOT = Path(__file__).parents[2]
CONTEXT = "--context", "256", "--max_new_tokens", "6"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters on it."""
    directory = tmp_path_factory.mktemp("work")
    make_model(directory / "base")
    config = models.model_config(BYTE_LLAMA)
    for seed, name in enumerate(("one", "two"), 1):
        write_adapter(directory / name, config, size=0.2, seed=seed, base=str(directory / "base"))
    return directory


@pytest.fixture(scope="module")
def served(work: Path):
    return load_served(ServingConfig(adapter_names([f"{work}/one", f"second={work}/two"])))


def solo(served, name, tokens, new=6):
    """Text of the answer of one name's model, whose only adapter that name's is."""
    place, matrices = served.names[name].adapter, served.lora.matrices
    scaling = {"lora_a": 1, "lora_b": float(served.lora.scalings[place])}
    own = [
        (path, value.replace(value.get_value()[:, place] * scaling[path[-1]]))
        for path, value in nnx.to_flat_state(matrices)
    ]
    options = EngineOptions(1, 256)  # of one shape, and so compiled once
    engine = Engine(served.graphdef, nnx.from_flat_state(own), served.frozen, options, eos_ids=served.eos_ids)
    engine.submit(Request(tuple(tokens), Sampling(max_new_tokens=new)))
    answer = []
    while engine.busy or engine.waiting:
        answer += [token.token for token in engine.step() if token.end != "stop"]
    return served.tokenizer.decode(answer, skip_special_tokens=True)


def talk(served, name="one", **options):
    return Conversation(served, served.engine(EngineOptions(1, 256)), name, SHORT, **options)


def test_names_are_those_of_the_adapters_and_the_base(served):
    assert list(served.names) == ["one", "second", "base"]
    with pytest.raises(UserError, match="two adapters have the name run"):
        adapter_names(["a/run", "b/run"])
    assert adapter_names(["x=a/b=c", "./d"]) == {"x": "a/b=c", "d": "./d"}


@pytest.mark.e2e
def test_every_name_answers_as_itself_and_turns_are_kept(served):
    conversation, expected = talk(served, system="be"), []
    for name, question in (("one", "hello"), ("second", "and?"), ("base", "so"), ("one", "bye")):
        conversation.name = name
        tokens = served.encode_conversation([*conversation.messages, {"role": "user", "content": question}], name)
        expected.append(solo(served, name, tokens))
        assert "".join(conversation.answer(question)) == expected[-1]
    assert [each["role"] for each in conversation.messages] == ["system", *["user", "assistant"] * 4]
    assert [each["content"] for each in conversation.messages[2::2]] == expected
    conversation.reset()
    assert conversation.messages == []
    assert len(set(expected)) == 4


def test_an_answer_that_is_interrupted_leaves_what_was_said(served):
    conversation = talk(served)
    whole = "".join(conversation.answer("hello"))
    conversation.reset()
    asked = iter([False] * 3 + [True])
    part = "".join(conversation.answer("hello", lambda: next(asked)))
    assert whole.startswith(part) and part != whole
    assert conversation.messages[-1] == {"role": "assistant", "content": part}
    assert not conversation.engine.busy


def test_what_does_not_fit_changes_nothing(served):
    conversation = Conversation(served, served.engine(EngineOptions(1, 64)), "one", SHORT)
    with pytest.raises(UserError, match="prompt and answer together may have 64"):
        list(conversation.answer("x" * 100))
    assert conversation.messages == []


def test_formats_without_turns_have_one_question():
    tokenizer = make_tokenizer()
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]

    def text(messages, dataset_format):
        tokens = data.encode_conversation(
            messages, tokenizer=tokenizer, dataset_format=dataset_format, position="conversation"
        )
        return tokenizer.decode(tokens)

    begin = tokenizer.bos_token
    assert text(turns, "oasst1") == f"{begin}### Human: a### Assistant: b### Human: c### Assistant:"
    assert text(turns[:1], "alpaca").endswith("### Instruction:\na\n\n### Response: ")
    assert text(turns, "messages").endswith("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(UserError, match="user assistant user given, but the model was trained on data"):
        text(turns, "alpaca")
    with pytest.raises(UserError, match=r"system user given, .* turns of user and assistant"):
        text([{"role": "system", "content": "s"}, turns[0]], "oasst1")
    with pytest.raises(UserError, match="user assistant given"):
        text(turns[:2], "oasst1")


@pytest.mark.parametrize("stop", [(), ("END",), ("ü!", "zz"), ("no such",)])
def test_text_comes_as_it_is_decoded_whole(stop):
    """Bytes of characters and beginnings of stop strings are held back; nothing is taken back."""
    tokenizer = make_tokenizer()
    text = "Grüße, 世界! EN ENEND z zz ü!"
    stream = TextStream(tokenizer, stop)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    given = [stream.add(token) for token in tokens]
    given.append(stream.end())
    ends = [text.find(each) for each in stop if each in text]
    assert "".join(given) == stream.text == text[: min(ends, default=None)]
    assert stream.stopped == bool(ends)
    assert not any("�" in each for each in given)
    assert sum(map(bool, given)) > 5  # piece by piece


def test_an_incomplete_character_is_given_out_at_the_end():
    tokenizer = make_tokenizer()
    tokens = tokenizer("世", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    assert [stream.add(token) for token in tokens[:-1]] == ["", ""]
    assert stream.end() == "�"


def test_rows_are_answered_with_their_own_settings(work: Path, served, tmp_path: Path):
    rows = [
        {"prompt": "hello", "id": 7},
        {"messages": [{"role": "user", "content": "hello"}], "adapter": "second", "max_new_tokens": 3, "logprobs": 2},
        {"text": "abc", "adapter": "base"},
        {"prompt": "hello", "do_sample": True, "seed": 5, "temperature": 2.0},
    ]
    write_jsonl(tmp_path / "in.jsonl", rows)
    adapters = [f"{work}/one", f"second={work}/two"]
    files = "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")
    assert generate_command.main([*adapters, *files, "--slots", "2", *CONTEXT]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    question = served.encode_conversation([{"role": "user", "content": "hello"}], "one")
    assert [{key: row[key] for key in asked} for row, asked in zip(answers, rows, strict=True)] == rows
    assert answers[0]["answer"] == solo(served, "one", question)
    assert answers[1]["answer"] == solo(served, "second", question, 3)
    assert answers[2]["answer"] == solo(served, "base", served.encode_text("abc"))
    assert [row["tokens"] for row in answers[:3]] == [6, 3, 6]
    assert answers[1]["end"] == "length" and len(answers[1]["token_logprobs"]) == 3
    token, logprob, likeliest = answers[1]["token_logprobs"][0]
    assert likeliest[token] == logprob == max(likeliest.values()) and len(likeliest) == 2


@pytest.mark.e2e
def test_rows_are_searched_with_beams(work: Path, served, tmp_path: Path, capsys):
    """The best of the beams, by the model's own probabilities; no worse than greedy choice."""
    rows = [{"prompt": "hello", "id": 7}, {"text": "abc", "adapter": "base", "max_new_tokens": 3}]
    write_jsonl(tmp_path / "in.jsonl", rows)
    argv = f"{work}/one", "--input", str(tmp_path / "in.jsonl"), *CONTEXT, "--length_penalty", "0", "--num_beams", "3"
    assert generate_command.main(argv) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{key: row[key] for key in asked} for row, asked in zip(answers, rows, strict=True)] == rows
    tasks = read_tasks(str(tmp_path / "in.jsonl"), served, "one", SHORT)
    for task, row in zip(tasks, answers, strict=True):
        engine = served.engine(EngineOptions(1, 256))
        engine.submit(task.request)
        greedy = 0.0
        while engine.busy or engine.waiting:
            greedy += sum(token.logprob for token in engine.step())
        assert row["score"] >= greedy - 1e-4
        assert row["end"] in ("stop", "length") and row["tokens"] <= task.request.sampling.max_new_tokens
    assert generate_command.main([f"{work}/one", "--prompt", "hello", *argv[3:]]) == 0
    told = capsys.readouterr()
    assert told.out == answers[0]["answer"] + "\n" and f"score {answers[0]['score']:.4f}" in told.err
    for row, complaint in (({"do_sample": True}, "line 1: do_sample cannot go"), ({"logprobs": 1}, "line 1: logprobs")):
        write_jsonl(tmp_path / "in.jsonl", [{"prompt": "hello", **row}])
        with pytest.raises(UserError, match=complaint):
            generate_command.main(argv)


@pytest.mark.e2e
def test_prompt_lookup_and_eight_bits_tell_what_they_do(work: Path, tmp_path: Path, capsys):
    write_jsonl(tmp_path / "in.jsonl", [{"text": "abc abc abc abc abc"}, {"text": "la la la la"}])
    argv = f"{work}/one", "--input", str(tmp_path / "in.jsonl"), *CONTEXT, "--max_new_tokens", "24"
    assert generate_command.main(argv) == 0
    plain = capsys.readouterr()
    assert generate_command.main([*argv, "--prompt_lookup_num_tokens", "4"]) == 0
    sooner = capsys.readouterr()
    assert sooner.out == plain.out
    assert re.search(r"\[prompt lookup: \d+ of \d+ guessed tokens accepted", sooner.err)
    assert generate_command.main([*argv, "--kv_cache_dtype", "int8"]) == 0
    told = re.search(r"int8: perplexity ([\d.]+) on 1023 tokens of held-out text, ([\d.]+) in", capsys.readouterr().err)
    assert told is not None and float(told[1]) == pytest.approx(float(told[2]), rel=0.2) and told[1] != told[2]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[]", "line 2 must be an object with one of prompt, messages, text"),
        ('{"prompt": "a", "text": "b"}', "must be an object with one of"),
        ('{"prompt": 3}', "prompt must be text"),
        ('{"messages": [3]}', "line 2: message 1 must be an object with 'role' and 'content'"),
        ('{"prompt": "a", "adapter": "x"}', "line 2: there is no 'x' here; choose from one, second, base"),
        ('{"prompt": "a", "adapter": []}', r"line 2: there is no \[\] here"),
        ('{"prompt": "a", "top_k": 1.5}', "top_k must be of the type int"),
        ('{"prompt": "a", "temperature": 0}', "temperature=0.*: must be from"),
        ('{"prompt": "a", "stop": "x"}', "stop must be a list"),
        ('{"prompt": "a", "logprobs": 21}', "logprobs must be from 0 to 20"),
        ('{"prompt": "a", "answer": "b"}', "has 'answer', which the answer is written as"),
    ],
)
def test_bad_rows_are_named(served, tmp_path: Path, row: str, complaint: str):
    (tmp_path / "in.jsonl").write_text('{"prompt": "good"}\n' + row)
    with pytest.raises(UserError, match=complaint):
        read_tasks(str(tmp_path / "in.jsonl"), served, "one", SHORT)


def test_files_that_cannot_be_are_told_before_the_model_is_loaded(tmp_path: Path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    asked = ["nowhere", "--input", str(tmp_path / "in.jsonl")]
    for output, complaint in (("/dev/full", "is no regular file"), (str(tmp_path), "is no regular file"),
                              (str(tmp_path / "in.jsonl"), "is the input")):  # fmt: skip
        with pytest.raises(UserError, match=f"--output {re.escape(output)}: {complaint}"):
            generate_command.main([*asked, "--output", output])
    assert Path("/dev/full").is_char_device()
    with pytest.raises(UserError, match=r"--input missing\.jsonl: there is no such file"):
        generate_command.main(["nowhere", "--input", "missing.jsonl"])
    with pytest.raises(UserError, match="--adapter x: there is none such; choose from nowhere, base"):
        generate_command.main([*asked, "--adapter", "x"])
    with pytest.raises(UserError, match="/dev/full cannot be written: it is no regular file"):
        write_rows(Path("/dev/full"), [])


def test_room_that_there_is_no_memory_for_is_told(served):
    with pytest.raises(UserError, match=r"keys and values of 2 x \d+ tokens take .* give less `context`, or fewer"):
        served.engine(EngineOptions(2, 10**12))


@pytest.mark.e2e
def test_the_terminal(work: Path, served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = tmp_path / "saved.jsonl"
    lines = [
        "hello",
        "\udcff bad",
        "/save a\0b",
        "",
        "/adapter base",
        "hello",
        f"/save {saved}",
        "/reset",
        "/what",
        "/adapter x",
        "/exit",
        "no",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    before = signal.getsignal(signal.SIGINT)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert chat_command.main([f"{work}/one", f"second={work}/two", *CONTEXT]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    text = said.getvalue()
    question = served.encode_conversation([{"role": "user", "content": "hello"}], "one")
    assert solo(served, "one", question) in text
    assert "the text has bytes that are no UTF-8" in text and "cannot be used" in text
    assert "'/what' is no command" in text and "there is no 'x' here; choose from one, second, base" in text
    row = json.loads(saved.read_text())
    assert row["model"] == "base" and [each["role"] for each in row["messages"]] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "give the directory of a run, or a base as --model"),
        (["x", "--temperature", "0.5"], "--temperature has no effect without --do_sample"),
        (["x", "--context", "1"], "--context 1: must be at least 2"),
        (["x", "--prompt_lookup_num_tokens", "65"], "--prompt_lookup_num_tokens 65: must be from 0 to 64"),
        (["nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_command_lines(argv: list[str], complaint: str):
    with pytest.raises(UserError, match=complaint):
        chat_command.main(argv)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--length_penalty", "2"], "--length_penalty has no effect without --num_beams"),
        (["--num_beams", "2", "--prompt_lookup_num_tokens", "2"], "--prompt_lookup_num_tokens has no effect with"),
        (["--num_beams", "2", "--do_sample", "True"], "--do_sample has no effect with --num_beams"),
        (["--num_beams", "0"], "--num_beams 0: must be from 1 to 256"),
    ],
)
def test_bad_searches(argv: list[str], complaint: str):
    with pytest.raises(UserError, match=complaint):
        generate_command.main(["x", "--prompt", "a", *argv])


def test_adapters_of_different_bases_are_refused(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_adapter(tmp_path / "other", models.model_config(BYTE_LLAMA), base="elsewhere/base")
    with pytest.raises(UserError, match="adapters one and other were trained with another base"):
        load_served(ServingConfig(adapter_names([f"{work}/one", f"{tmp_path}/other"])))
    again = load_served(ServingConfig(adapter_names([f"{tmp_path}/other"]), model=str(work / "base")))
    assert "was trained on elsewhere/base" not in caplog.text  # by their last part they are one model
    assert list(again.names) == ["other", "base"]
    write_adapter(tmp_path / "third", models.model_config(BYTE_LLAMA), base="elsewhere/another")
    load_served(ServingConfig(adapter_names([f"{tmp_path}/third"]), model=str(work / "base")))
    assert "was trained on elsewhere/another, not on" in caplog.text
    with pytest.raises(UserError, match="neither an adapter nor a model is given"):
        load_served(ServingConfig())


@pytest.mark.e2e
def test_the_server_of_the_command_line(work: Path):
    """A process of its own answers over HTTP, and ends when it is told to."""
    argv = [f"{work}/one", f"second={work}/two", "--port", "0", "--context", "128", "--slots", "2"]
    environment = {**os.environ, "QLORA_JAX_API_KEY": "secret", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        client = openai.OpenAI(base_url=line.split()[-1], api_key="secret", max_retries=0)
        assert [model.id for model in client.models.list().data] == ["one", "second", "base"]
        answer = client.completions.create(model="second", prompt="abc", max_tokens=3, temperature=0)
        assert answer.usage is not None and answer.usage.completion_tokens == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()
