"""The server through OpenAI's own client, over HTTP: its answers are the engine's, whoever else is being answered."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import gc
import http.client
import importlib.util
import json
import socket
import sys
import threading
import time

import jax
import numpy as np
import openai
import pytest
import uvicorn
from fixtures import tiny_model
from fixtures.finetune_helpers import make_tokenizer
from fixtures.tiny_configs import BYTE_LLAMA
from flax import nnx

from qlora_jax import models
from qlora_jax.data import FORMATS
from qlora_jax.errors import UserError
from qlora_jax.generation import Engine, EngineOptions, Request, Sampling, stack_adapters, stack_config
from qlora_jax.generation.text import TextStream
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.serving import server as module
from qlora_jax.serving.model import Served, ServedModel
from qlora_jax.serving.server import ServerConfig, listen, serve
from qlora_jax.serving.worker import Call, EngineFailed, Worker

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quick_compilation")]

KEY = "secret"
SLOTS, CAPACITY = 4, 128
CONFIG = ServerConfig(
    EngineOptions(SLOTS, CAPACITY), queue=40, api_key=KEY, port=0, max_body_bytes=10_000, warm_up=False
)
MOST = SLOTS + CONFIG.queue
NAMES = ("first", "second", "base")
HELLO = [{"role": "user", "content": "hello"}]
# With all filters at once, so that one program does for all tests.
ALL_FILTERS = {
    "min_p": 0.01,
    "typical_p": 0.9,
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 4,
    "top_k": 50,
    "min_tokens": 2,
}
PATIENCE = 60.0


# --- a model, and servers of it


def adapter(rank, seed, modules):
    """Return an adapter of random matrices, large enough to change answers."""
    config = models.model_config(BYTE_LLAMA)
    lora = tiny_model.build(BYTE_LLAMA, rank=rank, modules=modules)[1]
    random = np.random.default_rng(seed)
    matrices = {
        tuple(map(str, path)): random.normal(size=variable.get_value().shape).astype(np.float32) / 4
        for path, variable in nnx.to_flat_state(lora)
    }
    return LoRAConfig(rank, 2.0 * rank, 0.0, models.lora_modules(config, modules)), matrices


@pytest.fixture(scope="module")
def served(quick_compilation):
    config = models.model_config(BYTE_LLAMA)
    frozen = tiny_model.build(BYTE_LLAMA)[2]
    adapters = [adapter(4, 1, "all"), adapter(2, 2, "attention")]
    declared = stack_config([each for each, _ in adapters])
    qlora = QLoRAConfig(tiny_model.PLAIN, jax.numpy.float32, declared)
    graphdef, lora, _ = models.split_model(models.abstract_model(config, qlora))
    stack = stack_adapters(lora, [None, *adapters], jax.numpy.float32)
    names = {"first": Served(1, "messages"), "second": Served(2, "oasst1"), "base": Served(0, "messages")}
    return ServedModel(config, "a tiny model", graphdef, stack, frozen, make_tokenizer(), names)


@contextlib.contextmanager
def running(served, config=CONFIG):
    """Serve in a thread; yield the uvicorn server."""
    servers = []

    class Recorded(uvicorn.Server):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            servers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Server", Recorded)
        thread = threading.Thread(target=serve, args=(served, config, listen(config)))
        thread.start()
        wait_until(lambda: (servers and servers[0].started) or not thread.is_alive())
    try:
        yield servers[0]
    finally:
        servers[0].should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def port_of(server):
    return server.servers[0].sockets[0].getsockname()[1]


def worker_of(server):
    return server.config.app.state.worker


@contextlib.contextmanager
def client_of(server):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port_of(server)}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE
    ) as client:
        yield client


@pytest.fixture(scope="module")
def server(served):
    with running(served) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        client.completions.create(model="base", prompt="warm", top_p=0.9, logprobs=5, extra_body=ALL_FILTERS)
        yield client


@pytest.fixture
def worker(server, client):
    """The server's worker, which has nothing to do before and after a test."""
    worker = worker_of(server)
    assert (worker.busy, worker.waiting) == (0, 0)
    yield worker
    wait_until(lambda: (worker.busy, worker.waiting) == (0, 0))
    assert not worker._places


@pytest.fixture(scope="module")
def solo(served):
    """Function that returns an answer's tokens from an engine that has nothing else to do."""
    engine = served.engine(CONFIG.engine)

    def answer(name, prompt, **settings):
        sampling = Sampling(**{"top_k": 0, "max_new_tokens": 16} | settings)
        engine.submit(Request(tuple(prompt), sampling, served.names[name].adapter, 5))
        tokens = []
        while engine.busy or engine.waiting:
            tokens += engine.step()
        return tokens

    answer("base", [1], do_sample=True, top_p=0.9, min_p=0.01, typical_p=0.9, repetition_penalty=1.1,
           no_repeat_ngram_size=4, min_new_tokens=2)  # fmt: skip
    return answer


def text_of(served, tokens):
    stream = TextStream(served.tokenizer)
    return "".join(stream.add(token.token) for token in tokens if token.end != "stop") + stream.end()


def http_request(server, method, path, body=None, headers=None):
    """Return status, headers and body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request(method, path, body, {"Authorization": f"Bearer {KEY}"} if headers is None else headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def metrics_of(server):
    """Return {name with labels: value}."""
    lines = http_request(server, "GET", "/metrics")[2].decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def collected(parts):
    """Put the parts of a stream together: what a whole answer says, and usage."""
    choices, usage = {}, None
    for part in parts:
        usage = part.usage or usage
        for choice in part.choices:
            text, logprobs, _ = choices.setdefault(choice.index, ("", [], None))
            new = choice.delta.content or "" if hasattr(choice, "delta") else choice.text
            choices[choice.index] = (text + new, logprobs + entries(choice), choice.finish_reason)
    return [choices[i] for i in sorted(choices)], usage


def entries(choice):
    """Return the probabilities of a choice as (token, logprob) pairs, with those of the likeliest."""
    given = choice.logprobs
    if given is None:
        return []
    if getattr(given, "content", None) is not None:
        return [(each.token, each.logprob, [(top.token, top.logprob) for top in each.top_logprobs])
                for each in given.content]  # fmt: skip
    return list(zip(given.tokens, given.token_logprobs, given.top_logprobs, given.text_offset, strict=True))


# --- answers


@pytest.mark.parametrize("name", NAMES)
def test_chat_answers_as_the_engine_does(name, served, client, solo, worker):
    prompt = served.encode_conversation(HELLO, name)
    expected = solo(name, prompt)
    answer = client.chat.completions.create(model=name, messages=HELLO, temperature=0, max_tokens=16)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == name
    assert abs(answer.created - time.time()) < PATIENCE
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == text_of(served, expected)
    assert choice.finish_reason == expected[-1].end and choice.logprobs is None
    written = sum(token.end != "stop" for token in expected)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), written)
    assert usage.total_tokens == len(prompt) + written
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    again = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": parts}], temperature=0, max_completion_tokens=16
    )
    assert again.choices == answer.choices


def test_names_answer_differently_and_the_first_is_the_default(server, client, worker):
    asked = {"prompt": "abc", "temperature": 0}
    texts = {name: client.completions.create(model=name, **asked).choices[0].text for name in NAMES}
    assert len(set(texts.values())) == 3
    status, _, body = http_request(server, "POST", "/v1/completions", json.dumps(asked))
    assert status == 200 and json.loads(body)["choices"][0]["text"] == texts["first"]
    listed = client.models.list().data
    assert [model.id for model in listed] == list(NAMES) and listed[0].object == "model"
    assert [client.models.retrieve(name) for name in NAMES] == listed
    with pytest.raises(openai.NotFoundError, match="'a/b' does not exist"):
        client.models.retrieve("a/b")


def test_prompts_come_in_four_ways(served, client, worker):
    def texts(prompt, **settings):
        answer = client.completions.create(model="base", prompt=prompt, temperature=0, **settings)
        assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    one, other = served.encode_text("one"), served.encode_text("another")
    alone = [*texts("one"), *texts("another")]
    assert texts(["one", "another"]) == texts([one, other]) == texts(one) + texts(other) == alone
    assert texts(["one", "another"], n=2) == [alone[0]] * 2 + [alone[1]] * 2
    assert texts(["one", "another"], n=2, echo=True)[1::2] == ["one" + alone[0], "another" + alone[1]]
    assert texts("one", echo=True) == texts(one, echo=True) == ["one" + alone[0]]


@pytest.mark.parametrize("logprobs", [None, 3])
def test_a_stream_of_a_chat_says_the_same(logprobs, client, worker):
    asked = {"model": "first", "messages": HELLO, "max_tokens": 20, "seed": 5, "n": 2, "stop": ["zz"]}
    if logprobs is not None:
        asked |= {"logprobs": True, "top_logprobs": logprobs}
    whole = client.chat.completions.create(**asked)
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {part.object for part in parts} == {"chat.completion.chunk"} and len({part.id for part in parts}) == 1
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices == []
    choices, usage = collected(parts)
    assert choices == [(each.message.content, entries(each), each.finish_reason) for each in whole.choices]
    assert usage == whole.usage
    assert all(part.usage is None for part in client.chat.completions.create(**asked, stream=True))


@pytest.mark.parametrize(
    "settings", [{"logprobs": 3}, {"logprobs": 0}, {"echo": True}, {"echo": True, "logprobs": 2}, {}]
)
def test_a_stream_of_a_completion_says_the_same(settings, client, worker):
    asked = {"model": "second", "prompt": ["ab", "cde"], "n": 2, "max_tokens": 20, "seed": 5} | settings
    whole = client.completions.create(**asked)
    choices, usage = collected(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert choices == [(each.text, entries(each), each.finish_reason) for each in whole.choices]
    assert usage == whole.usage


def test_a_stream_is_server_sent_events(server, worker):
    body = json.dumps({"prompt": "ab", "stream": True, "max_tokens": 2})
    status, headers, events = http_request(server, "POST", "/v1/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *parts, done, nothing = events.decode().split("\n\n")
    assert done == "data: [DONE]" and nothing == "" and len(parts) >= 1
    assert all(json.loads(part.removeprefix("data: "))["choices"][0]["index"] == 0 for part in parts)


def test_logprobs_are_the_engines(served, client, solo, worker):
    expected = solo("first", served.encode_conversation(HELLO, "first"))
    expected = [token for token in expected if token.end != "stop"]
    asked = {"model": "first", "messages": HELLO, "temperature": 0, "max_tokens": 16, "logprobs": True}
    content = client.chat.completions.create(**asked, top_logprobs=5).choices[0].logprobs.content
    assert len(content) == len(expected)
    for entry, token in zip(content, expected, strict=True):
        assert entry.logprob == pytest.approx(token.logprob, abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx([lp for _, lp in token.likeliest], abs=1e-4)
        assert entry.token == entry.top_logprobs[0].token  # greedy
        assert entry.bytes is None if "\ufffd" in entry.token else bytes(entry.bytes).decode() == entry.token
    assert all(
        entry.top_logprobs == [] for entry in client.chat.completions.create(**asked).choices[0].logprobs.content
    )

    expected = [token for token in solo("base", served.encode_text("abc"), max_new_tokens=8) if token.end != "stop"]
    given = client.completions.create(model="base", prompt="abc", temperature=0, max_tokens=8, logprobs=2).choices[0]
    assert given.logprobs.token_logprobs == pytest.approx([token.logprob for token in expected], abs=1e-4)
    assert all(1 <= len(top) <= 3 for top in given.logprobs.top_logprobs)
    lengths = [len(token) for token in given.logprobs.tokens]
    assert given.logprobs.text_offset == [sum(lengths[:i]) for i in range(len(lengths))]


def test_texts_are_scored_as_evaluations_ask(served, client, solo, worker, monkeypatch):
    """Echoed with probabilities, and nothing or one token after it."""
    asked = {"model": "first", "prompt": "a text to score", "temperature": 0, "echo": True, "logprobs": 2}
    none = client.completions.create(**asked, max_tokens=0)
    (choice,) = none.choices
    ids = served.encode_text("a text to score")
    assert choice.text == "a text to score" and choice.finish_reason == "length"
    assert len(choice.logprobs.tokens) == len(ids)
    assert (none.usage.prompt_tokens, none.usage.completion_tokens) == (len(ids), 0)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    # Each token's probability is the one that it would have as the answer to what comes before it.
    for n in (1, 4, len(ids) - 1):
        given = client.completions.create(model="first", prompt=ids[:n], temperature=0, max_tokens=1, logprobs=20)
        top = given.choices[0].logprobs.top_logprobs[0]
        likeliest = max(choice.logprobs.top_logprobs[n], key=choice.logprobs.top_logprobs[n].get)
        assert choice.logprobs.top_logprobs[n][likeliest] == pytest.approx(max(top.values()), abs=1e-4)
    one = client.completions.create(**asked, max_tokens=1).choices[0]
    assert one.logprobs.token_logprobs[1:-1] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)
    # Offsets are of the text, of which the first token is no part.
    places = zip(choice.logprobs.tokens[1:], choice.logprobs.text_offset[1:], strict=True)
    assert choice.logprobs.text_offset[0] == 0 and all(choice.text[at:].startswith(token) for token, at in places)
    free = client.completions.create(**asked | {"echo": False}, max_tokens=1).choices[0]
    # Who scores counts on one token after the prompt, be it the last of all.
    (end,) = [token.token for token in solo("first", ids, max_new_tokens=1)]
    with monkeypatch.context() as patch:
        patch.setattr(worker._engine, "_eos_ids", (end,))
        ended = client.completions.create(**asked, max_tokens=1).choices[0]
    assert (ended.text, ended.finish_reason) == (choice.text, "stop")
    assert ended.logprobs.token_logprobs[1:] == pytest.approx(one.logprobs.token_logprobs[1:], abs=1e-4)
    streamed, _ = collected(client.completions.create(**asked, max_tokens=0, stream=True))
    assert streamed == [(choice.text, entries(choice), "length")]
    assert one.text == choice.text + free.text
    with pytest.raises(openai.BadRequestError, match="`max_tokens=0`: must be from 1"):
        client.completions.create(**asked | {"echo": False}, max_tokens=0)


def test_stop_strings_end_an_answer(client, worker):
    asked = {"model": "base", "prompt": "abcd", "seed": 3, "max_tokens": 60, "extra_body": {"min_tokens": 60}}
    free = client.completions.create(**asked)
    text = free.choices[0].text
    stop = text[20:23]
    answer = client.completions.create(**asked, stop=["not there", stop])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < free.usage.completion_tokens
    choices, usage = collected(
        client.completions.create(**asked, stop=stop, stream=True, stream_options={"include_usage": True})
    )
    assert choices[0] == (answer.choices[0].text, [], "stop") and usage == answer.usage


def test_the_next_turn_of_a_format_ends_an_answer(served, client, worker, monkeypatch):
    asked = {"model": "first", "messages": HELLO, "temperature": 0, "max_tokens": 16}
    text = client.chat.completions.create(**asked).choices[0].message.content
    monkeypatch.setitem(FORMATS, "messages", dataclasses.replace(FORMATS["messages"], stops=(text[3:5],)))
    assert client.chat.completions.create(**asked).choices[0].message.content == text[: text.index(text[3:5])]


def test_seeds_decide_what_is_drawn(served, client, solo, worker):
    def texts(**settings):
        answer = client.completions.create(model="base", prompt="abc", max_tokens=12, **settings)
        return [choice.text for choice in answer.choices]

    three = texts(seed=2**32 - 1, n=3)
    assert three == texts(seed=2**32 - 1, n=3) and len(set(three)) == 3
    # Seeds go up from the one that was given.
    assert three == [*texts(seed=-1), *texts(seed=0), *texts(seed=1)]
    expected = solo("base", served.encode_text("abc"), max_new_tokens=12, do_sample=True, seed=1)
    assert three[2] == text_of(served, expected)
    assert texts() != texts()
    hot = texts(seed=1, temperature=2.0, top_p=0.5, extra_body=ALL_FILTERS)
    expected = solo("base", served.encode_text("abc"), max_new_tokens=12, do_sample=True, seed=1, temperature=2.0,
                    top_p=0.5, min_p=0.01, typical_p=0.9, repetition_penalty=1.1, no_repeat_ngram_size=4, top_k=50,
                    min_new_tokens=2)  # fmt: skip
    assert hot == [text_of(served, expected)]


def test_many_clients_at_once_get_what_each_gets_alone(served, client, solo, worker):
    questions = [(NAMES[i % 3], f"question {i}: " + "x" * (3 * i % 40)) for i in range(32)]
    expected = [text_of(served, solo(name, served.encode_text(text), max_new_tokens=10)) for name, text in questions]

    def ask(question):
        name, text = question
        asked = {"model": name, "prompt": text, "temperature": 0, "max_tokens": 10}
        if len(text) % 2:
            return collected(client.completions.create(**asked, stream=True))[0][0][0]
        return client.completions.create(**asked).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(ask, questions)) == expected
    assert len(set(expected)) == len(expected)


def test_an_answer_ends_where_there_is_no_more_room(client, worker):
    prompt = [5] * (CAPACITY - 3)
    settings = {"model": "base", "prompt": prompt, "extra_body": {"min_tokens": 3}}
    answer = client.completions.create(**settings, max_tokens=50)
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


# --- clients that vanish, and too many of them


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_slots(stream, server, worker, monkeypatch):
    steps, step = [], worker._engine.step
    monkeypatch.setattr(worker._engine, "step", lambda: steps.append(1) or step())
    # All slots and the whole queue, for long.
    asked = {"prompt": "abc", "n": MOST, "max_tokens": 120, "min_tokens": 120, "stream": stream}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: worker.busy == SLOTS)
        if stream:
            assert connection.recv(1000)
    wait_until(lambda: (worker.busy, worker.waiting) == (0, 0))
    assert len(steps) < 60 * MOST / SLOTS  # of 120


def test_a_full_queue_refuses(server, client, worker, monkeypatch):
    goes_on, step = threading.Event(), worker._engine.step
    monkeypatch.setattr(worker._engine, "step", lambda: (goes_on.wait(PATIENCE), step())[1])
    asked = {"model": "base", "prompt": "abc", "n": MOST, "max_tokens": 1}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.completions.create, **asked)
        wait_until(lambda: worker.waiting == MOST)
        with pytest.raises(openai.RateLimitError, match="as many requests as it can take") as e:
            client.chat.completions.create(model="base", messages=HELLO)
        assert e.value.code == "rate_limit_exceeded" and e.value.response.headers["retry-after"] == "1"
        assert metrics_of(server)["qlora_jax_queue_length"] == MOST
        goes_on.set()
        assert len(answer.result().choices) == MOST


# --- requests that are refused


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REFUSED = [
    (TEXT, "{", None, "not JSON"),
    (TEXT, b'{"prompt": "\xff"}', None, "not JSON"),
    (TEXT, "[1]", None, "must be a JSON object"),
    (TEXT, {}, "prompt", "is missing"),
    (TEXT, {"prompt": 5}, "prompt", "should be a text, a list of token ids, or a list of such prompts, not 5"),
    (TEXT, {"prompt": []}, "prompt", "should be"),
    (TEXT, {"prompt": [[]]}, "prompt", "should be"),
    (TEXT, {"prompt": [1, -1]}, "prompt", "should be"),
    (TEXT, {"prompt": [2**70]}, "prompt", "beyond the 264"),
    (TEXT, {"prompt": "a", "max_tokens": "5"}, "max_tokens", "should be a valid integer, not '5'"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens", "`max_tokens=0`: must be from 1"),
    (TEXT, {"prompt": "a", "max_tokens": 2, "min_tokens": 3}, "min_tokens", "must be from 0 to max_tokens"),
    (TEXT, {"prompt": "a", "temperature": -1}, "temperature", "must be from"),
    (TEXT, '{"prompt": "a", "temperature": NaN}', "temperature", "must be from"),
    (TEXT, {"prompt": "a", "top_p": 0}, "top_p", "must be from"),
    (TEXT, {"prompt": "a", "n": 0}, "n", "should be greater"),
    (TEXT, {"prompt": "a", "n": MOST + 1}, "n", f"{MOST + 1} answers are asked for, of at most {MOST}"),
    (TEXT, {"prompt": "a", "n": 10**12, "echo": True}, "n", "answers are asked for"),
    (TEXT, {"prompt": "a", "stop": ["x"] * 65}, "stop", "at most 64"),
    (TEXT, {"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "does not support it"),
    (TEXT, {"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "does not support it"),
    (TEXT, {"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "does not support it"),
    (TEXT, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "needs `stream`"),
    (TEXT, {"prompt": "a", "model": 5}, "model", "should be a valid string"),
    (CHAT, {"messages": []}, "messages", "the last one must be there"),
    (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": "hi"}]}, "messages", "not the assistant's"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", "messages.0.content should be a valid string"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages", "messages.0.content is missing"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages", "messages.0.role should be"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools", "does not support it"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format", "does not support it"),
    (CHAT, {"messages": HELLO, "temprature": 1}, "temprature", "does not support it"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
    (CHAT, {"messages": HELLO, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "`max_completion_tokens`"),
    (CHAT, {"messages": HELLO * 2, "model": "second"}, None, "user user given"),
]


@pytest.mark.parametrize(("path", "body", "param", "message"), REFUSED)
def test_a_wrong_request_is_told_what_is_wrong(path, body, param, message, server, worker):
    raw = body if isinstance(body, str | bytes) else json.dumps(body)
    status, headers, answer = http_request(server, "POST", path, raw)
    assert status == 400 and headers["content-type"] == "application/json"
    error = json.loads(answer)["error"]
    assert {*error} == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and message in error["message"] and error["message"].endswith(".")


def test_what_says_nothing_about_the_answer_is_accepted(client, worker):
    asked = {"model": "base", "messages": HELLO, "temperature": 0, "max_tokens": 4}
    plain = client.chat.completions.create(**asked)
    more = {"user": "me", "metadata": {"a": "b"}, "store": False, "tools": [], "tool_choice": "none", "logit_bias": {},
            "presence_penalty": 0.0, "frequency_penalty": 0, "response_format": {"type": "text"}, "seed": None,
            "parallel_tool_calls": False}  # fmt: skip
    assert client.chat.completions.create(**asked, **more).choices == plain.choices
    # An answer of the client's goes back as it came.
    conversation = [*HELLO, plain.choices[0].message, *HELLO, {"role": "developer", "content": "be brief"}]
    assert client.chat.completions.create(**asked | {"messages": conversation}).choices[0].message.content


def test_prompts_and_bodies_can_be_too_long(server, client, worker):
    with pytest.raises(
        openai.BadRequestError, match="has 128 tokens, and prompt and answer together may have 128"
    ) as e:
        client.completions.create(model="base", prompt=[5] * CAPACITY, stream=True)
    assert e.value.code == "context_length_exceeded" and e.value.param == "prompt"
    with pytest.raises(openai.APIStatusError, match="more than 10000 bytes") as e:
        client.completions.create(model="base", prompt="a" * CONFIG.max_body_bytes)
    assert e.value.status_code == 413
    chunks = (b"a" * 1000 for _ in range(11))  # of no declared length
    assert http_request(server, "POST", TEXT, chunks)[0] == 413


def test_an_unknown_model_is_not_found(server, client, worker):
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist; there are first, second, base") as e:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert e.value.code == "model_not_found" and e.value.param == "model"
    status, _, body = http_request(server, "GET", "/v2/nothing")
    assert status == 404 and json.loads(body)["error"]["message"] == "Not Found."
    assert http_request(server, "GET", TEXT)[0] == 405


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xe9"])
def test_a_key_is_asked_for(given, server):
    for method, path in (("GET", "/v1/models"), ("POST", TEXT), ("GET", "/metrics"), ("GET", "/nothing")):
        status, headers, body = http_request(server, method, path, headers={"Authorization": given})
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert http_request(server, "GET", "/health", headers={})[0] == 200


# --- what operators see


def test_health_and_metrics(server, client, worker):
    status, _, body = http_request(server, "GET", "/health")
    assert status == 200 and json.loads(body) == {"status": "ok"}
    before = metrics_of(server)
    client.completions.create(model="base", prompt=[5, 6, 7], max_tokens=6, extra_body={"min_tokens": 6})
    http_request(server, "POST", TEXT, "{")
    after = metrics_of(server)

    def growth(name):
        return after[name] - before.get(name, 0)

    assert growth('qlora_jax_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert growth("qlora_jax_prompt_tokens_total") == 3 and growth("qlora_jax_answer_tokens_total") == 6
    assert growth("qlora_jax_first_token_seconds_count") == 1
    assert growth('qlora_jax_request_seconds_count{endpoint="/v1/completions"}') == 2
    assert after["qlora_jax_queue_length"] == after["qlora_jax_busy_slots"] == 0


def test_a_server_that_warms_up_says_so(served, monkeypatch):
    """Requests wait; what is asked for then has its programs."""
    warm, may_go = Engine.warm_up, threading.Event()

    def warm_up(engine, stopped):
        may_go.wait(PATIENCE)
        warm(engine, stopped)

    monkeypatch.setattr(Engine, "warm_up", warm_up)
    with running(served, dataclasses.replace(CONFIG, warm_up=True)) as server, client_of(server) as client:
        assert http_request(server, "GET", "/health")[::2] == (503, b'{"status":"starting"}')
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            early = pool.submit(client.completions.create, model="base", prompt="a", max_tokens=2, temperature=0)
            wait_until(lambda: worker_of(server).waiting)
            may_go.set()
            assert early.result().usage.completion_tokens <= 2
        assert http_request(server, "GET", "/health")[::2] == (200, b'{"status":"ok"}')


def test_nothing_is_left_of_many_requests(server, client, worker):
    def ask(i):
        if i % 4 == 0:  # one that is not read to its end
            with client.completions.create(model="base", prompt=f"{i}", stream=True, max_tokens=100) as stream:
                next(iter(stream))
        elif i % 4 == 1:
            client.chat.completions.create(model="first", messages=HELLO, max_tokens=2)
        elif i % 4 == 2:
            list(client.completions.create(model="second", prompt=f"{i}", stream=True, max_tokens=2))
        else:
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="second", prompt=[])

    def ask_all(count):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(count)))
        wait_until(lambda: (worker.busy, worker.waiting, len(worker._places)) == (0, 0, 0))

    ask_all(16)
    threads = threading.active_count()
    ask_all(1000)
    assert threading.active_count() <= threads
    wait_until(lambda: len(server.server_state.tasks) == 0)
    gc.collect()
    assert sum(isinstance(each, Call) for each in gc.get_objects()) <= 2


def test_an_error_of_the_engine_fails_requests_and_shows(served, client, monkeypatch, caplog):
    with running(served) as server, client_of(server) as client:
        worker = worker_of(server)
        step, steps = worker._engine.step, iter(range(3))

        def failing():
            next(steps)
            return step()

        monkeypatch.setattr(worker._engine, "step", failing)
        with pytest.raises(openai.APIError, match="the engine failed: StopIteration"):
            list(client.completions.create(model="base", prompt="a", stream=True, extra_body={"min_tokens": 8}))
        assert "nothing is answered any more" in caplog.text
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="the engine failed"):
                client.chat.completions.create(model="base", messages=HELLO)
        assert http_request(server, "GET", "/health")[::2] == (503, b'{"status":"failed"}')
        worker._thread.join(PATIENCE)
        assert not worker._thread.is_alive()


def test_answers_under_way_are_finished_at_the_end_or_cut(served, client, monkeypatch, caplog):
    monkeypatch.setattr(module, "_SECONDS_TO_FINISH", PATIENCE)
    asked = {"model": "base", "prompt": "a", "stream": True, "max_tokens": 50, "extra_body": {"min_tokens": 50}}
    with running(served) as server, client_of(server) as client:
        stream = client.completions.create(**asked)
        first = next(stream)
        server.should_exit = True
        (choice,), _ = collected([first, *stream])
        assert choice[2] == "length"
    monkeypatch.setattr(module, "_SECONDS_TO_FINISH", 1)
    with running(served) as server, client_of(server) as client:
        worker = worker_of(server)
        step = worker._engine.step
        monkeypatch.setattr(worker._engine, "step", lambda: (time.sleep(0.2), step())[1])
        stream = client.completions.create(**asked)
        next(stream)
        server.should_exit = True
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            collected(stream)
    assert not worker._thread.is_alive() and worker.status == "failed"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# --- without HTTP


def test_settings_of_a_server_are_checked():
    with pytest.raises(UserError, match=r"`queue=-1`: must be at least 0.\n.*`port=70000`.*\n.*`api_key` is empty"):
        ServerConfig(queue=-1, port=70000, api_key=" ")
    with pytest.raises(UserError, match=r"`slots=0`: must be at least 1.\n.*`capacity=1`: must be at least 2"):
        EngineOptions(0, 1)
    assert KEY not in repr(CONFIG)


def test_a_port_that_is_taken_is_told(served, server):
    with pytest.raises(
        UserError, match=f"`port={port_of(server)}`: cannot listen at 127.0.0.1: Address already in use"
    ):
        listen(dataclasses.replace(CONFIG, port=port_of(server)))


@pytest.mark.parametrize("missing", ["starlette.applications", "prometheus_client"])
def test_a_missing_extra_is_told(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    spec = importlib.util.spec_from_file_location("server_without_extra", module.__file__)
    with pytest.raises(
        UserError, match=r"A server needs starlette, uvicorn and prometheus-client: pip install .*serve"
    ):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_call_after_the_end_is_refused(served):
    async def run():
        worker = Worker(served.engine(CONFIG.engine), SLOTS, CONFIG.queue)
        worker.start()
        call = worker.submit([Request((1, 2)), Request((1,) * CAPACITY)])
        # What the engine refuses is told to the request alone.
        refused = await call.events.get()
        assert refused.request == 1 and isinstance(refused.token, UserError)
        await asyncio.to_thread(worker.close)
        assert worker.status == "failed"
        with pytest.raises(EngineFailed, match="shutting down"):
            worker.submit([Request((1, 2))])

    asyncio.run(run())
