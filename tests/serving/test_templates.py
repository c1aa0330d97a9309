"""One conversation has the same tokens in training, chat, batches, the server and every kind of export."""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import go_template
from fixtures.tiny_configs import BYTE_LLAMA
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from qlora_jax import models
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.data import FORMATS, IGNORED, Rows, eos_ids, tokenize_rows
from qlora_jax.data.formats import ALPACA_PROMPT_WITH_INPUT
from qlora_jax.errors import UserError
from qlora_jax.exporting.modelfile import modelfile
from qlora_jax.exporting.templates import adds_bos, template_metadata, write_template
from qlora_jax.files import write_json
from qlora_jax.generation import Engine, EngineOptions, Sampling, Token
from qlora_jax.nn.linear import QLoRAConfig
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.serving.batch import read_tasks
from qlora_jax.serving.conversation import Conversation
from qlora_jax.serving.model import Served, ServedModel
from qlora_jax.serving.server import ServerConfig, make_app

SYSTEM = "Be brief."
# Special tokens, what the languages of templates are written with, and a last line that is empty.
QUESTIONS = ("Hi, <|im_end|>{x} </s>!", 'And\n"{{ .Prompt }}" {% x %}?\n\nü')
ANSWERS = ("Hö <s there.", "No:\n1. {no}")


class Case(NamedTuple):
    """A format's row of a conversation.

    Attributes:
        row: of questions, their answers, and the system prompt.
        turns: of the conversation.
        system: it has a system prompt.
        spaced: an answer has a space before it that is not in the conversation.
    """

    row: Callable[[list[str], list[str]], dict[str, Any]]
    turns: int = 1
    system: bool = False
    spaced: bool = False


def pair(first: str, second: str) -> Case:
    return Case(lambda questions, answers: {first: questions[0], second: answers[0]})


def interleaved(one: str, other: str, first: str, second: str) -> Callable[[list[str], list[str]], list[Any]]:
    """Turns of users and assistants, as objects with two keys."""
    return lambda questions, answers: [
        {one: name, other: said}
        for question, answer in zip(questions, answers, strict=True)
        for name, said in ((first, question), (second, answer))
    ]


MESSAGES = interleaved("role", "content", "user", "assistant")
SHAREGPT = interleaved("from", "value", "human", "gpt")
CASES = {
    "alpaca": pair("instruction", "output"),
    "alpaca-clean": pair("instruction", "output"),
    "input-output": pair("input", "output"),
    "prompt-completion": pair("prompt", "completion"),
    "question-answer": pair("question", "answer"),
    "oasst1": Case(
        lambda questions, answers: {
            "text": "".join(
                f"### Human: {question}### Assistant: {answer}"
                for question, answer in zip(questions, answers, strict=True)
            )
        },
        turns=2,
        spaced=True,
    ),
    "messages": Case(
        lambda questions, answers: {"messages": [{"role": "system", "content": SYSTEM}, *MESSAGES(questions, answers)]},
        turns=2,
        system=True,
    ),
    "sharegpt": Case(
        lambda questions, answers: {"system": SYSTEM, "conversations": SHAREGPT(questions, answers)},
        turns=2,
        system=True,
    ),
}
every_format = pytest.mark.parametrize("name", FORMATS)

# --- tokenizers

SPECIALS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
            "<|end_header_id|>")  # fmt: skip
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def make_tokenizer(template: str, *, bos: bool, added: bool, prefix: bool = False) -> PreTrainedTokenizerFast:
    """A token a byte, or two of a letter after a space; EOS is not what the templates end a turn with.

    bos: it has a BOS; added: which it puts before every text; prefix: it puts a space there, as sentencepiece does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", letter) for letter in "HNA"]
    vocabulary = [*SPECIALS, *alphabet, *map("".join, merges)]
    backend = Tokenizer(tokenizer_models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    if added:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", **({"bos_token": "<s>"} if bos else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = template
    return tokenizer


KINDS = {
    "no BOS": {"template": CHATML, "bos": False, "added": False},
    "BOS that no program adds": {"template": LLAMA_3, "bos": True, "added": False},
    "BOS": {"template": LLAMA_3, "bos": True, "added": True},
    "BOS that the template lacks": {"template": CHATML, "bos": True, "added": True},
    "a space before texts": {"template": CHATML, "bos": True, "added": True, "prefix": True},
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer(**KINDS[request.param])


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(**KINDS["BOS"])


def encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def following(tokenizer: Any, before: str, text: str) -> list[int]:
    """Tokens of a text that does not begin one."""
    return encoded(tokenizer, before + text)[len(encoded(tokenizer, before)) :]


# --- a model that computes nothing


class Recorder(Engine):
    """Engine that notes requests, and answers them with texts that it was given, or with EOS."""

    def __init__(self, tokenizer: Any, ends: tuple[int, ...]):
        self.capacity, self.reused = 4096, 0
        self.answers: list[list[int]] = []
        self.asked: list[tuple[int, ...]] = []
        self._tokenizer, self._ends = tokenizer, ends
        self._running: dict[int, list[int]] = {}

    @property
    def busy(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return 0

    def submit(self, request):
        number = len(self.asked)
        self.asked.append(request.tokens)
        self._running[number] = self.answers.pop(0) if self.answers else [self._tokenizer.eos_token_id]
        return number

    def cancel(self, number):
        self._running.pop(number, None)

    def step(self):
        made = []
        for number, tokens in list(self._running.items()):
            token = tokens.pop(0)
            end = "stop" if token in self._ends else None
            made.append(Token(number, token, 0.0, (), end))
            if end:
                del self._running[number]
        return made


class Model(ServedModel):
    """Every format under its name, with an engine that notes what it is asked."""

    def engine(self, options: EngineOptions) -> Recorder:
        made = Recorder(self.tokenizer, self.eos_ids)
        engines.append(made)
        return made


engines: list[Recorder] = []


@pytest.fixture(scope="module")
def parts() -> Any:
    config = models.model_config({**BYTE_LLAMA, "vocab_size": 300, "eos_token_id": 2})
    qlora = QLoRAConfig(QuantizationConfig(quant_type="none"), jnp.float32, None)
    return config, models.split_model(models.abstract_model(config, qlora))


def served_with(parts: Any, tokenizer: Any) -> Model:
    config, (graphdef, lora, frozen) = parts
    return Model(config, "no model", graphdef, lora, frozen, tokenizer, {name: Served(0, name) for name in FORMATS})


def messages_of(name: str) -> list[dict[str, str]]:
    """The conversation up to its last question."""
    case = CASES[name]
    system = [{"role": "system", "content": SYSTEM}] if case.system else []
    return [*system, *MESSAGES(list(QUESTIONS[: case.turns]), list(ANSWERS[: case.turns]))[:-1]]


def trained(name: str, tokenizer: Any, row: dict[str, Any] | None = None) -> tuple[list[int], list[int]]:
    """Tokens of the row up to its last answer, which is trained to its end, and those of that answer with its end."""
    case = CASES[name]
    row = row or case.row(list(QUESTIONS[: case.turns]), list(ANSWERS[: case.turns]))
    (example,), _ = tokenize_rows(Rows([row], ["here"], "rows"), tokenizer=tokenizer, dataset_format=name)
    ids, learnt = example.input_ids.tolist(), example.labels != IGNORED
    end = int(np.flatnonzero(learnt)[-1])
    answer = ANSWERS[case.turns - 1]
    if name == "oasst1":  # one text, all of it trained
        said = following(tokenizer, ":", f" {answer}")
    elif FORMATS[name].chat:  # one text
        said = following(tokenizer, "\n", answer)
    else:
        said = encoded(tokenizer, answer)
    start = end - len(said)
    assert ids[start:end] == said
    assert learnt[start : end + 1].all() and (name == "oasst1" or not learnt[start - 1])
    return ids[:start], ids[start : end + 1]


def asked_in_chat(model: Model, name: str) -> list[tuple[int, ...]]:
    """Requests of a conversation in which the model answers as in the row, and ends as it learnt to."""
    case, tokenizer = CASES[name], model.tokenizer
    engine = model.engine(EngineOptions())
    talk = Conversation(model, engine, name, Sampling(), system=SYSTEM if case.system else None)
    _, answer = trained(name, tokenizer)
    end = following(tokenizer, ":", "### Human: more") if case.spaced else [answer[-1]]
    said = [following(tokenizer, ":", f"{' ' * case.spaced}{each}") for each in ANSWERS]
    engine.answers = [[*each, *end] for each in said]
    for question in QUESTIONS[: case.turns]:
        list(talk.answer(question))
        assert not engine.busy
    return engine.asked


def post(app: Any, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Ask a server without a network; return status and body of the response."""
    sent: list[Any] = []

    async def talk() -> None:
        given = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

        async def receive() -> Any:
            for message in given:
                return message
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(talk())
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))


def asked_of_server(model: Model, body: dict[str, Any]) -> list[int]:
    status, answer = post(make_app(model, ServerConfig(warm_up=False)), body)
    assert status == 200, answer
    return list(engines[-1].asked[-1])


def batch(model: Model, name: str, row: dict[str, Any], directory: Path) -> list[int]:
    (directory / "in.jsonl").write_text(json.dumps(row))
    (task,) = read_tasks(str(directory / "in.jsonl"), model, name, Sampling())
    return list(task.request.tokens)


@every_format
def test_training_chat_batches_and_the_server_agree(name: str, tokenizer, parts, tmp_path: Path):
    expected, answer = trained(name, tokenizer)
    model, messages = served_with(parts, tokenizer), messages_of(name)
    assert answer[-1] in eos_ids(tokenizer, (), name)  # what is trained to be the end is one
    assert list(asked_in_chat(model, name)[-1]) == expected
    assert asked_of_server(model, {"model": name, "messages": messages}) == expected
    assert batch(model, name, {"messages": messages}, tmp_path) == expected
    if not CASES[name].system and CASES[name].turns == 1:
        assert batch(model, name, {"prompt": QUESTIONS[0]}, tmp_path) == expected
    # Parts of text, and the name that newer APIs have for a system prompt.
    parted = [
        {
            "role": {"system": "developer"}.get(each["role"], each["role"]),
            "content": [{"type": "text", "text": each["content"]}],
        }
        for each in messages
    ]
    assert asked_of_server(model, {"model": name, "messages": parted}) == expected
    assert batch(model, name, {"messages": parted}, tmp_path) == expected
    if name == "messages":
        assert trained(name, tokenizer, {"messages": [*parted, {"role": "assistant", "content": ANSWERS[1]}]}) == (
            expected,
            answer,
        )


@every_format
def test_exports_agree_with_training(name: str, tokenizer, tmp_path: Path):
    expected, answer = trained(name, tokenizer)
    messages = messages_of(name)
    # Of a merged model in Hugging Face's format.
    tokenizer.save_pretrained(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": tokenizer.eos_token_id})
    write_template(tmp_path, name)
    again = load_tokenizer(tmp_path)
    text = again.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encoded(again, text) == expected
    ends = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert answer[-1] in (ends if isinstance(ends, list) else [ends])
    # Of a GGUF file: llama.cpp puts BOS before texts and takes the template's away, if the file says so.
    metadata = template_metadata(tokenizer, name)
    bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos(tokenizer))
    template = metadata.get("tokenizer.chat_template", tokenizer.chat_template)
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, chat_template=template
    ).removeprefix(tokenizer.bos_token if bos else "")
    start = [tokenizer.bos_token_id] if bos else []
    assert [*start, *encoded(tokenizer, text)] == expected
    # Of Ollama.
    written = modelfile("./model.gguf", tokenizer, dataset_format=name)
    found = re.search(r'^TEMPLATE """(.*?)"""$', written, re.DOTALL | re.MULTILINE)
    assert found is not None
    text = go_template.render(found[1], messages)
    assert [*start, *encoded(tokenizer, text)] == expected
    stops = re.findall(r'^PARAMETER stop "(.*)"$', written, re.MULTILINE)
    assert tokenizer.convert_ids_to_tokens(answer[-1]) in stops
    assert set(FORMATS[name].stops) <= set(stops)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.system])
def test_a_conversation_without_a_system_prompt_has_the_templates_own(name: str, tokenizer, parts, tmp_path: Path):
    row = {"messages": MESSAGES([QUESTIONS[1]], [ANSWERS[1]])}
    if name == "sharegpt":
        row = {"conversations": SHAREGPT([QUESTIONS[1]], [ANSWERS[1]])}
    expected, _ = trained(name, tokenizer, row)
    model = served_with(parts, tokenizer)
    assert batch(model, name, {"prompt": QUESTIONS[1]}, tmp_path) == expected
    written = modelfile("./model.gguf", tokenizer, dataset_format=name)
    system = re.search(r'^SYSTEM """(.*?)"""$', written, re.MULTILINE)
    messages = [{"role": "system", "content": system[1]}] if system else []
    template = re.search(r'^TEMPLATE """(.*?)"""$', written, re.DOTALL | re.MULTILINE)
    text = go_template.render(template[1], [*messages, {"role": "user", "content": QUESTIONS[1]}])
    metadata = template_metadata(tokenizer, name)
    bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos(tokenizer))
    assert [*([tokenizer.bos_token_id] if bos else []), *encoded(tokenizer, text)] == expected


@pytest.mark.parametrize("name", [name for name, each in FORMATS.items() if "input" in each.optional])
def test_a_question_with_an_input_is_given_as_a_text(name: str, tokenizer, parts, tmp_path: Path):
    row = {"instruction": QUESTIONS[0], "input": QUESTIONS[1], "output": ANSWERS[0]}
    expected, _ = trained(name, tokenizer, row)
    text = ALPACA_PROMPT_WITH_INPUT.format(instruction=QUESTIONS[0], input=QUESTIONS[1])
    model = served_with(parts, tokenizer)
    assert batch(model, name, {"text": text}, tmp_path) == expected
    assert asked_of_server(model, {"model": name, "prompt": text}) == expected


@pytest.mark.parametrize("answer", ["Ho", " Ho", "\nHo", ""])
def test_an_answer_that_brings_the_space_before_it_does_not_get_another(answer: str, plain, parts, tmp_path: Path):
    text = f"### Human: Hi### Assistant:{' ' if answer == 'Ho' else ''}{answer}### Human: So?### Assistant: No."
    (example,), _ = tokenize_rows(Rows([{"text": text}], ["here"], "rows"), tokenizer=plain, dataset_format="oasst1")
    messages = MESSAGES(["Hi", "So?"], [answer, ""])[:-1]
    expected = example.input_ids.tolist()[: -len([*encoded(plain, " No."), plain.eos_token_id])]
    assert batch(served_with(parts, plain), "oasst1", {"messages": messages}, tmp_path) == expected
    template = modelfile("./model.gguf", plain, dataset_format="oasst1").split('"""')[1]
    assert [plain.bos_token_id, *encoded(plain, go_template.render(template, messages))] == expected
    rendered = plain.apply_chat_template(messages, tokenize=False, chat_template=FORMATS["oasst1"].template)
    assert encoded(plain, rendered) == expected


USER, ASSISTANT, OF_SYSTEM = ({"role": role, "content": "a"} for role in ("user", "assistant", "system"))


def refused(name: str) -> Iterator[list[dict[str, str]]]:
    """Conversations that a format has no place for."""
    yield [USER, ASSISTANT]
    if not CASES[name].system:
        yield [OF_SYSTEM, USER]
        yield [USER, USER]
    if CASES[name].turns == 1:
        yield [USER, ASSISTANT, USER]


@every_format
def test_what_a_format_has_no_place_for_is_refused_by_its_name(name: str, plain, parts, tmp_path: Path):
    model = served_with(parts, plain)
    app = make_app(model, ServerConfig(warm_up=False))
    for messages in refused(name):
        answered = messages[-1] is ASSISTANT
        wanted = "not the assistant's" if answered and FORMATS[name].chat else f"the format {name}, which has .* only"
        with pytest.raises(UserError, match=wanted):
            batch(model, name, {"messages": messages}, tmp_path)
        status, body = post(app, {"model": name, "messages": messages})
        assert status == 400
        assert re.search("not the assistant's" if answered else wanted, body["error"]["message"])
        app = make_app(model, ServerConfig(warm_up=False))  # a worker starts once
        if not FORMATS[name].chat:
            with pytest.raises(Exception, match=wanted):
                plain.apply_chat_template(messages, tokenize=False, chat_template=FORMATS[name].template)


@every_format
def test_a_chat_refuses_a_system_prompt_and_leaves_out_turns_that_have_no_place(name: str, plain, parts):
    model = served_with(parts, plain)
    refuses = pytest.raises(UserError, match=f"system user given, but .* the format {name}, which has")
    talk = Conversation(model, model.engine(EngineOptions()), name, Sampling(), system=SYSTEM)
    with contextlib.nullcontext() if CASES[name].system else refuses:
        list(talk.answer("a"))
    talk.reset()
    for question in ("b", "c"):
        list(talk.answer(question))
    assert talk.stands_alone == (CASES[name].turns == 1)
    alone = model.encode_conversation([{"role": "user", "content": "c"}], name)
    assert (engines[-1].asked[-1] == tuple(alone)) == talk.stands_alone


def test_a_turn_ends_an_answer_where_the_tokenizer_has_another_end():
    chatml = make_tokenizer(**KINDS["BOS that the template lacks"])
    of_turn, eos = chatml.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert eos_ids(chatml, (7,), "messages") == tuple(sorted((7, eos, of_turn)))
    assert eos_ids(chatml, (7,), "alpaca") == tuple(sorted((7, eos)))
    for template in (None, "{{ x.y.z }}", "{% for m in messages %}{{ m['content'] }}{% endfor %}"):
        chatml.chat_template = template
        assert eos_ids(chatml, (), "messages") == (eos,)
