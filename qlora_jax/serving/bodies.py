"""Requests of OpenAI's API: every field has its effect or is refused by name, but for those that change no answer."""

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from qlora_jax.errors import UserError
from qlora_jax.generation import Sampling
from qlora_jax.json_text import check_type, parse_json


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: for people.
        param: field that is wrong.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def wrong(param: str, message: str, code: str | None = None) -> NoReturn:
    """Refuse a request for one of its fields."""
    raise Refused(400, f"`{param}`: {message}", param=param, code=code)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)


def _as_prompts(value: Any) -> Any:
    """Return a list of prompts, whichever of four ways they are written in."""
    prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
    if isinstance(prompts, list) and prompts and all(isinstance(each, str) or _is_tokens(each) for each in prompts):
        return prompts
    raise ValueError("should be a text, a list of token ids, or a list of such prompts")


def _as_text(value: Any) -> Any:
    """Join parts of text; all else is left for what comes next to refuse."""
    if isinstance(value, list) and all(isinstance(part, dict) and {*part} == {"type", "text"} for part in value):
        if all(part["type"] == "text" and isinstance(part["text"], str) for part in value):
            return "".join(part["text"] for part in value)
    return value


def _without_nulls(value: Any) -> Any:
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Turn(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Body(_Strict):
    """Fields that both kinds of completions have; those with a name of `Sampling`'s are checked there."""

    default_tokens: ClassVar[int | None] = None
    """Of an answer, where the request does not say; None for as many as there is room for."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = Field(default=1, ge=1)
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_listed), Field(max_length=64)] = []
    stream: bool = False
    stream_options: _StreamOptions | None = None
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of an answer, where the request says."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """Count of the likeliest tokens that are returned with each; None for no probabilities at all."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """True if the prompt is part of the answer."""
        return False

    @property
    def only_echoes(self) -> bool:
        """True if the prompt is the answer."""
        return False


class ChatBody(Body):
    """Fields of a chat completion."""

    messages: list[Annotated[_Turn, BeforeValidator(_without_nulls)]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of an answer, by either name."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            wrong("max_tokens", f"{self.max_tokens}, but `max_completion_tokens` is {self.max_completion_tokens}.")
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """Count of the likeliest tokens, with `logprobs`."""
        if self.top_logprobs is not None and not self.logprobs:
            wrong("top_logprobs", "needs `logprobs` to be true.")
        return (self.top_logprobs or 0) if self.logprobs else None


class TextBody(Body):
    """Fields of a text completion."""

    default_tokens = 16

    prompt: Annotated[list[str | list[int]], BeforeValidator(_as_prompts)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False

    @property
    def likeliest(self) -> int | None:
        """Count of the likeliest tokens."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """True with `echo`."""
        return self.echo

    @property
    def only_echoes(self) -> bool:
        """True if nothing but the prompt is wanted, as by those who score texts."""
        return self.echo and self.max_tokens == 0


_WITHOUT_EFFECT = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention "
    "parallel_tool_calls".split()
)
"""Fields of OpenAI's that say nothing about the answer."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
}
"""Fields of OpenAI's that there is nothing behind -> values with which they change nothing."""

_ADAPTERS: Mapping[type[Body], TypeAdapter] = {kind: TypeAdapter(kind) for kind in (ChatBody, TextBody)}


def parsed_body[B: Body](raw: bytes, kind: type[B]) -> B:
    """Check a body.

    Raises:
        Refused: it is no JSON, a field is wrong, or asks for what there is not.
    """
    try:
        body = parse_json(raw)
    except ValueError as error:
        raise Refused(400, f"The body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise Refused(400, "The body must be a JSON object.")
    given = {key: value for key, value in body.items() if value is not None and key not in _WITHOUT_EFFECT}
    given = {key: value for key, value in given.items() if value not in _NEUTRAL.get(key, ())}
    for key in given.keys() - kind.model_fields.keys():
        wrong(key, "this server does not support it; leave it out.", "unsupported_parameter")
    try:
        parsed: B = check_type(given, _ADAPTERS[kind], "")
    except UserError as error:
        field = str(error).partition(" ")[0].partition(".")[0]
        raise Refused(400, str(error), param=field) from None
    if parsed.stream_options is not None and not parsed.stream:
        wrong("stream_options", "needs `stream` to be true.")
    return parsed


_OWN_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
"""Field of `Sampling` -> of the API, where they differ."""


def sampling_of(body: Body, capacity: int) -> list[Sampling]:
    """Return the settings of each of a prompt's `n` answers."""
    most = 1 if body.only_echoes else body.wanted_tokens
    if most is None:
        most = max(body.default_tokens or capacity, body.min_tokens)
    first = secrets.randbits(32) if body.seed is None else body.seed
    try:
        return [
            Sampling(
                max_new_tokens=most,
                min_new_tokens=body.min_tokens,
                do_sample=body.temperature != 0,
                temperature=float(body.temperature or 1),
                top_k=body.top_k,
                top_p=float(body.top_p),
                min_p=float(body.min_p),
                typical_p=float(body.typical_p),
                repetition_penalty=float(body.repetition_penalty),
                no_repeat_ngram_size=body.no_repeat_ngram_size,
                seed=(first + i) % 2**32,
            )
            for i in range(body.n)
        ]
    except UserError as error:
        message = re.sub("|".join(_OWN_NAMES), lambda match: _OWN_NAMES[match[0]], str(error))
        field = re.search(r"`(\w+)", message)
        raise Refused(400, message, param=field and field[1]) from None
