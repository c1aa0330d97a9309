"""Answers in the words of OpenAI's API: chat and text completions, whole or as parts of a stream."""

from collections.abc import Sequence
from typing import Any

from qlora_jax.generation import Token
from qlora_jax.generation.text import Vocabulary


def _finite(logprob: float | None) -> float | None:
    """Return a logarithm that JSON can hold: OpenAI's for a probability of zero is -9999."""
    return None if logprob is None else max(logprob, -9999.0)


class ChatWords:
    """Chat completions in OpenAI's words."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, vocabulary: Vocabulary):
        self._vocabulary = vocabulary

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what an answer of a stream begins with, if anything."""
        return {"delta": {"role": "assistant", "content": ""}}

    def content(self, index: int, text: str, *, streamed: bool) -> dict[str, Any]:
        """Return the field for a text."""
        if streamed:
            return {"delta": {"content": text} if text else {}}
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the probabilities of tokens."""
        content = [
            {
                **self._entry(token.token, token.logprob),
                "top_logprobs": [self._entry(*each) for each in token.likeliest],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._vocabulary.text(token)
        # A part of a character is no text, and tokenizers do not tell its bytes.
        return {"token": text, "logprob": _finite(logprob), "bytes": None if "�" in text else list(text.encode())}


class TextWords:
    """Text completions in OpenAI's words."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def __init__(self, vocabulary: Vocabulary, echoed: Sequence[str], n: int):
        self._vocabulary, self._echoed, self._n = vocabulary, echoed, n
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what an answer of a stream begins with, if anything."""
        return {"text": self._echo(index)} if self._echoed else None

    def content(self, index: int, text: str, *, streamed: bool) -> dict[str, Any]:
        """Return the field for a text."""
        return {"text": text if streamed else self._echo(index) + text}

    def _echo(self, index: int) -> str:
        return self._echoed[index // self._n] if self._echoed else ""

    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the probabilities of tokens; of a stream, they continue those before.

        Offsets are exact but where a character has several tokens, each of which counts as one.
        """
        texts = [self._vocabulary.text(token.token) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + (0 if token.end == "stop" else self._vocabulary.width(token.token))
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens],
            "text_offset": offsets,
        }

    def _likeliest(self, token: Token) -> dict[str, float | None] | None:
        """Return the likeliest tokens and the one that came; None where nothing comes before it."""
        if token.logprob is None:
            return None
        pairs = (*token.likeliest, (token.token, token.logprob))
        return {text: _finite(logprob) for text, logprob in self._vocabulary.probabilities(pairs).items()}
