"""An HTTP server with OpenAI's API: chat and text completions of a base and its adapters, whole or as streams.

An adapter is a `model` of the API. Requests are checked (`bodies`), turned into tokens and handed to a `Worker`; what
comes back is put into words by `ChatWords` or `TextWords`, which differ in nothing else.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hmac
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from qlora_jax.errors import UserError, outside, refuse_all
from qlora_jax.extras import install_command
from qlora_jax.generation import EngineOptions, Token
from qlora_jax.generation import Request as Prompt
from qlora_jax.generation.text import TextStream
from qlora_jax.serving.bodies import Body, ChatBody, Refused, TextBody, parsed_body, sampling_of, wrong
from qlora_jax.serving.model import ServedModel
from qlora_jax.serving.words import ChatWords, TextWords
from qlora_jax.serving.worker import Call, EngineFailed, QueueFull, Worker

_NEEDED = "A server needs starlette, uvicorn and prometheus-client"

try:
    import prometheus_client
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise UserError(f"{_NEEDED}: {install_command('serve')}.") from error

logger = logging.getLogger(__name__)

_SECONDS_TO_ASK = 60
"""For a client to send its request."""

_SECONDS_TO_FINISH = 5
"""For answers that are under way when the server is told to stop."""

_SECONDS_TO_TELL = 5
"""For clients to take what is left of their answers then."""

_CLIENT_GONE = 499
"""Status, as of nginx, of an answer that nobody waits for; only metrics show it."""

_OPEN = "/health"
"""Path that needs no key."""


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Settings of a server.

    Attributes:
        engine: room for answers that are written at a time.
        warm_up: compile what requests need before the first of them is answered.
        queue: most answers that wait for a slot; what comes beyond is refused.
        api_key: that clients must know; None for none.
        host: address to listen at.
        port: to listen at; 0 for any that is free.
        max_body_bytes: largest request.

    Raises:
        UserError: values outside their ranges; names every field.
    """

    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    warm_up: bool = True
    queue: int = 64
    api_key: str | None = dataclasses.field(default=None, repr=False)
    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        """Refuse what no server has."""
        wanted = {
            "queue": ("at least 0", self.queue >= 0),
            "port": ("from 0 to 65535", 0 <= self.port < 2**16),
            "max_body_bytes": ("at least 1", self.max_body_bytes >= 1),
        }
        wrong = outside(self, wanted)
        if self.api_key is not None and not self.api_key.strip():
            wrong.append("`api_key` is empty: give a key, or none at all.")
        refuse_all(wrong)


def _refusal(error: Exception) -> Refused:
    """Return the refusal that an error amounts to."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(400, str(error))
    if isinstance(error, QueueFull):
        message = "The server has as many requests as it can take; try again later."
        return Refused(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
    if isinstance(error, HTTPException):
        return Refused(error.status_code, f"{error.detail}.", headers=error.headers)
    if isinstance(error, EngineFailed):
        return Refused(500, f"No answer: {error}.")
    return Refused(500, "The server made a mistake; its log says which.")


class _Delta(NamedTuple):
    """A step of one answer.

    Attributes:
        answer: its place among those of the request.
        text: that is new.
        tokens: whose probabilities are told.
        written: tokens that were added to the answer.
        finish: why the answer ends here, None if it goes on.
    """

    answer: int
    text: str
    tokens: tuple[Token, ...]
    written: int
    finish: Literal["stop", "length"] | None


class _Metrics:
    """Numbers of one server, for Prometheus."""

    def __init__(self, worker: Worker):
        self.registry = registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "qlora_jax_requests", "Requests that were answered.", ["endpoint", "status"], registry=registry
        )
        self.seconds = prometheus_client.Histogram(
            "qlora_jax_request_seconds", "From a request to the end of its response.", ["endpoint"], registry=registry
        )
        self.first_token = prometheus_client.Histogram(
            "qlora_jax_first_token_seconds", "From a request to the first token of its answer.", registry=registry
        )
        self.tokens_in = prometheus_client.Counter("qlora_jax_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens_out = prometheus_client.Counter("qlora_jax_answer_tokens", "Tokens of answers.", registry=registry)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "qlora_jax_queue_length": ("Answers that wait for a slot.", lambda: worker.waiting),
            "qlora_jax_busy_slots": ("Answers that are being written.", lambda: worker.busy),
        }
        for name, (explanation, value) in gauges.items():
            prometheus_client.Gauge(name, explanation, registry=registry).set_function(value)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A request of a client that was checked.

    Attributes:
        body: as checked.
        model: name of the model that answers.
        prompts: tokens of each.
        stops: strings that end an answer.
        words: of the API.
        arrived: time by the monotonic clock.
    """

    body: Body
    model: str
    prompts: Sequence[Sequence[int]]
    stops: Sequence[str]
    words: ChatWords | TextWords
    arrived: float


class _Answering:
    """Answers to one request of a client, from tokens to what is sent.

    Args:
        asked: request.
        call: that the tokens come from.
        api: of the server.
    """

    def __init__(self, asked: _Asked, call: Call, api: "_Api"):
        self._asked, self._words, self._call, self._api = asked, asked.words, call, api
        self._tokens = 0  # of all answers, but for those that only end one
        self._same = {"id": f"{asked.words.prefix}{uuid.uuid4().hex}", "created": int(time.time())}

    async def whole(self) -> dict[str, Any]:
        """Return all answers, once they are there."""
        count = len(self._call.requests)
        texts, finishes = [""] * count, [""] * count
        tokens: list[list[Token]] = [[] for _ in range(count)]
        async for delta in self._deltas():
            texts[delta.answer] += delta.text
            tokens[delta.answer] += delta.tokens
            finishes[delta.answer] = delta.finish or ""
        choices = [
            self._choice(i, self._words.content(i, texts[i], streamed=False), tokens[i], finishes[i])
            for i in range(count)
        ]
        return self._object(self._words.whole, choices) | {"usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events."""
        options = self._asked.body.stream_options
        with_usage = options is not None and options.include_usage
        try:
            async for choice in self._parts():
                yield _event(self._object(self._words.part, [choice]) | ({"usage": None} if with_usage else {}))
        except (EngineFailed, UserError) as error:
            yield _event(_refusal(error).body)
            return
        if with_usage:
            yield _event(self._object(self._words.part, []) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def release(self) -> None:
        """Forget what has not been answered: nobody waits for it."""
        self._api.worker.cancel(self._call)

    async def _parts(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the choices of a stream, each with a step of one answer."""
        for i in range(len(self._call.requests)):
            if (opening := self._words.opening(i)) is not None:
                yield self._choice(i, opening, (), None)
        async for i, text, tokens, _, finish in self._deltas():
            if text or (tokens and self._asked.body.likeliest is not None):
                yield self._choice(i, self._words.content(i, text, streamed=True), tokens, None)
            if finish is not None:
                yield self._choice(i, self._words.content(i, "", streamed=True), (), finish)

    async def _deltas(self) -> AsyncIterator[_Delta]:
        """Yield what tokens add to the answers until all have ended.

        Raises:
            EngineFailed: some have not.
            UserError: the engine refused one.
        """
        tokenizer, continues = self._api.served.tokenizer, isinstance(self._asked.body, TextBody)
        streams = {
            i: TextStream(tokenizer, self._asked.stops, request.tokens if continues else ())
            for i, request in enumerate(self._call.requests)
        }
        scored: dict[int, tuple[Token, ...]] = {}  # tokens of prompts, which go with the first of an answer
        metrics, first = self._api.metrics, True
        while streams:
            i, token = await self._call.events.get()
            if isinstance(token, Exception):
                raise token
            if i not in streams:  # it came while the end was being told to the engine
                continue
            if token.prompt:
                scored[i] = (*scored.get(i, ()), token)
                continue
            if first:
                metrics.first_token.observe(time.monotonic() - self._asked.arrived)
                first = False
            delta = self._delta(i, streams[i], token, scored.pop(i, ()))
            metrics.tokens_out.inc(delta.written)
            self._tokens += delta.written
            if delta.finish is not None:
                del streams[i]
                if token.end is None:
                    self._api.worker.cancel(self._call, i)
            yield delta

    def _delta(self, index: int, stream: TextStream, token: Token, prompt: Sequence[Token]) -> _Delta:
        """Add a token to an answer, and the tokens of its prompt if those are told before it."""
        if self._asked.body.only_echoes:
            return _Delta(index, "", tuple(prompt), 0, "length")
        written = token.end != "stop"
        text = stream.add(token.token) if written else ""
        if token.end is not None:
            text += stream.end()
        # Who scores a prompt counts on one token after it.
        told = (*prompt, token) if written or prompt else ()
        return _Delta(index, text, told, int(written), "stop" if stream.stopped else token.end)

    def _choice(
        self, index: int, content: Mapping[str, Any], tokens: Sequence[Token], finish: str | None
    ) -> dict[str, Any]:
        told = self._asked.body.likeliest is not None and (tokens or finish is None or "message" in content)
        logprobs = self._words.logprobs(index, tokens) if told else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def _object(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self._same, "object": kind, "model": self._asked.model, "choices": choices}

    def _usage(self) -> dict[str, int]:
        prompts = sum(map(len, self._asked.prompts))
        return {"prompt_tokens": prompts, "completion_tokens": self._tokens, "total_tokens": prompts + self._tokens}


def _event(value: Mapping[str, Any]) -> str:
    # In ASCII: some clients take U+2028 and the like for the end of a line.
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


class _Stream(StreamingResponse):
    """Server-sent events; whatever ends them, the engine is told."""

    def __init__(self, answering: _Answering):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(answering.events(), headers=headers, media_type="text/event-stream")
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.release()


class _Api:
    """Endpoints of a server.

    Args:
        served: model.
        config: of the server.
    """

    def __init__(self, served: ServedModel, config: ServerConfig):
        self.served, self._config = served, config
        self.worker = Worker(served.engine(config.engine), config.engine.slots, config.queue, warm_up=config.warm_up)
        self.metrics = _Metrics(self.worker)
        self._vocabulary = served.vocabulary
        self._started = int(time.time())
        # A long text takes a tokenizer long: the event loop goes on meanwhile.
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, "encoder")

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        """Run the worker while the server runs."""
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.close)
            self._encoder.shutdown(wait=False, cancel_futures=True)

    async def health(self, _request: Request) -> Response:
        """Tell if requests are answered."""
        status = self.worker.status
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def numbers(self, _request: Request) -> Response:
        """Return the metrics."""
        text = prometheus_client.generate_latest(self.metrics.registry)
        return Response(text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    async def models(self, _request: Request) -> Response:
        """List the base and its adapters."""
        return JSONResponse({"object": "list", "data": [self._described(name) for name in self.served.names]})

    async def one_model(self, request: Request) -> Response:
        """Describe the base or an adapter."""
        return JSONResponse(self._described(self._known(request.path_params["name"])))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "qlora-jax"}

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        arrived, body = time.monotonic(), parsed_body(await self._body(request), ChatBody)
        model = self._model(body)
        prompt = await self._encoded(self._conversation, body, model)
        stops = (*self.served.names[model].format.stops, *body.stop)
        asked = _Asked(body, model, [prompt], stops, ChatWords(self._vocabulary), arrived)
        return await self._answered(request, asked, "messages")

    async def text(self, request: Request) -> Response:
        """Continue texts."""
        arrived, body = time.monotonic(), parsed_body(await self._body(request), TextBody)
        model = self._model(body)
        pairs = await self._encoded(self._texts, body)
        words = TextWords(self._vocabulary, [text for text, _ in pairs] if body.echoes else [], body.n)
        asked = _Asked(body, model, [tokens for _, tokens in pairs], body.stop, words, arrived)
        return await self._answered(request, asked, "prompt")

    async def _body(self, request: Request) -> bytes:
        raw, most = bytearray(), self._config.max_body_bytes
        length = request.headers.get("content-length", "0")
        if not (length.isdecimal() and int(length) > most):
            try:
                async with asyncio.timeout(_SECONDS_TO_ASK):
                    async for chunk in request.stream():
                        raw += chunk
                        if len(raw) > most:
                            break
                    else:
                        return bytes(raw)
            except TimeoutError:
                raise Refused(408, "The body did not come.", headers={"Connection": "close"}) from None
        raise Refused(413, f"The body has more than {most} bytes.", headers={"Connection": "close"})

    def _model(self, body: Body) -> str:
        return self._known(next(iter(self.served.names)) if body.model is None else body.model)

    def _known(self, name: str) -> str:
        if name not in self.served.names:
            names = ", ".join(self.served.names)
            message = f"The model {name!r} does not exist; there are {names}."
            raise Refused(404, message, param="model", code="model_not_found")
        return name

    async def _encoded[**P, T](self, encode: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        work = functools.partial(encode, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._encoder, work)

    def _conversation(self, body: ChatBody, model: str) -> list[int]:
        messages = [turn.model_dump(exclude_none=True) for turn in body.messages]
        if not messages or messages[-1]["role"] == "assistant":
            wrong("messages", "the last one must be there, and not the assistant's, to be answered.")
        return self.served.encode_conversation(messages, model, "messages")

    def _texts(self, body: TextBody) -> list[tuple[str, list[int]]]:
        """Return text and tokens of every prompt; texts of tokens only where they are returned."""
        pairs = []
        for i, prompt in enumerate(body.prompt):
            position = "prompt" if len(body.prompt) == 1 else f"prompt {i}"
            if isinstance(prompt, str):
                pairs.append((prompt, self.served.encode_text(prompt, position)))
                continue
            if max(prompt) >= self.served.config.vocab_size:
                wrong("prompt", f"token {max(prompt)} is beyond the {self.served.config.vocab_size} of the model.")
            text = self.served.tokenizer.decode(prompt, skip_special_tokens=True) if body.echoes else ""
            pairs.append((text, prompt))
        return pairs

    async def _answered(self, request: Request, asked: _Asked, field: str) -> Response:
        """Hand prompts to the engine and return what comes of them."""
        answering = _Answering(asked, self.worker.submit(self._requests(asked, field)), self)
        self.metrics.tokens_in.inc(sum(map(len, asked.prompts)))
        if asked.body.stream:
            return _Stream(answering)
        try:
            answers = await _unless_gone(request, answering.whole())
        finally:
            answering.release()
        return Response(status_code=_CLIENT_GONE) if answers is None else JSONResponse(answers)

    def _requests(self, asked: _Asked, field: str) -> list[Prompt]:
        body, capacity, most = asked.body, self.worker.capacity, self.worker.most
        if len(asked.prompts) * body.n > most:
            wrong("n", f"{len(asked.prompts) * body.n} answers are asked for, of at most {most} at once.")
        for tokens in asked.prompts:
            if not tokens:
                wrong(field, "is empty.")
            if len(tokens) >= capacity:
                message = f"has {len(tokens)} tokens, and prompt and answer together may have {capacity}; shorten it."
                wrong(field, message, "context_length_exceeded")
        settings = sampling_of(body, capacity)
        place, likeliest = self.served.names[asked.model].adapter, body.likeliest or 0
        scored = body.echoes and body.likeliest is not None
        return [Prompt(tuple(tokens), each, place, likeliest, scored) for tokens in asked.prompts for each in settings]


async def _unless_gone[T](request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Do work; give up and return None if the client vanishes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


class _Guarded:
    """Middleware that asks for the key, and counts.

    Args:
        app: that it guards.
        api_key: None for none.
        metrics: to count in.
        paths: to count apart.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: _Metrics, paths: Sequence[str]):
        self._app, self._metrics, self._paths = app, metrics, paths
        self._key = None if api_key is None else api_key.strip().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived, status = time.monotonic(), 500
        endpoint = scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._entrance(scope)(scope, receive, counting)
        finally:
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.seconds.labels(endpoint).observe(time.monotonic() - arrived)

    def _entrance(self, scope: Scope) -> ASGIApp:
        """Return the application, or the refusal of a client without the key."""
        if self._key is None or scope["path"] == _OPEN:
            return self._app
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return self._app
        headers = {"WWW-Authenticate": "Bearer"}
        refused = Refused(401, "The API key is missing or wrong.", code="invalid_api_key", headers=headers)
        return JSONResponse(refused.body, refused.status, refused.headers)


async def _refused_response(_request: Request, error: Exception) -> Response:
    refused = _refusal(error)
    return JSONResponse(refused.body, refused.status, refused.headers)


async def _nothing(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


def make_app(served: ServedModel, config: ServerConfig) -> Starlette:
    """Return the application, whose `state.worker` answers.

    Args:
        served: model; takes memory for all the tokens that the engine has room for at once.
        config: of the server; host and port are the caller's business.
    """
    api = _Api(served, config)
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.text, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.one_model),
        Route("/metrics", api.numbers),
        Route(_OPEN, api.health),
    ]
    told = (Refused, UserError, QueueFull, EngineFailed, HTTPException, Exception)
    app = Starlette(
        routes=routes,
        exception_handlers={**dict.fromkeys(told, _refused_response), ClientDisconnect: _nothing},
        lifespan=api.lifespan,
    )
    app.add_middleware(_Guarded, config.api_key, api.metrics, [route.path for route in routes])
    app.state.worker = api.worker
    return app


def listen(config: ServerConfig) -> socket.socket:
    """Return a socket that listens at the address of a configuration.

    Raises:
        UserError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except socket.gaierror as error:
        raise UserError(f"`host={config.host}`: is no address of this machine: {error.strerror}.") from None
    except OSError as error:
        raise UserError(
            f"`port={config.port}`: cannot listen at {config.host}: {error.strerror}; choose another `host` or `port`."
        ) from None


def serve(served: ServedModel, config: ServerConfig, listening: socket.socket) -> None:
    """Serve until the process is told to stop; answers under way get some seconds to finish.

    Args:
        served: model.
        config: of the server.
        listening: as `listen` returns it; is closed.

    Raises:
        UserError: the extra `serve` is not installed.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise UserError(f"{_NEEDED}: {install_command('serve')}.") from error

    app = make_app(served, config)
    worker: Worker = app.state.worker

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(_SECONDS_TO_FINISH, worker.stop)
            await super().shutdown(sockets)

    with listening:
        logger.info("serving %s at http://%s:%d/v1", served.description, config.host, listening.getsockname()[1])
        # Answers that are cut short get some seconds more to say so.
        settings = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=_SECONDS_TO_FINISH + _SECONDS_TO_TELL)
        Server(settings).run(sockets=[listening])
