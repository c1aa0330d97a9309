"""Continuous batching: requests join and leave a running batch at every token.

The engine has a fixed number of slots, each a row of one cache. A request waits until a slot is free; its prompt is
read in pieces, at most `MOST_PIECE` tokens between two tokens of the others; then every step adds a token to all slots
whose prompt has been read. What a slot had before stays in its cache until it is needed: a prompt that begins alike, as
the next turn of a chat does, is read from where they part.

Programs are compiled once for each size of a piece, and once for a step with each set of filters.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from qlora_jax.errors import UserError
from qlora_jax.generation.programs import Chosen, Piece, State, advance, empty_state, model_of, prefill
from qlora_jax.generation.sampling import Features, Sampling, features_of, power_of_two, rows_of

LEAST_PIECE, MOST_PIECE = 16, 512
"""Tokens of the pieces that prompts are read in; between them the powers of two."""

_MOST_PADDING = 0.15
"""Share of padding in the pieces of a prompt, beyond the smallest piece."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        tokens: of the prompt, at least one.
        sampling: settings.
        adapter: place of its adapter in the engine's `AdapterStack`; 0 where there is none.
        likeliest: how many of the likeliest tokens to return with each, at most 20.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    adapter: int = 0
    likeliest: int = 0


class Token(NamedTuple):
    """A token of an answer.

    Attributes:
        request: number that `submit` returned.
        token: its id.
        logprob: natural logarithm of its probability before anything was filtered.
        likeliest: (id, logprob) of the likeliest tokens.
        end: why the answer ends with it: "stop" for an end-of-sequence token, which is not part of the answer; "length"
            if there may be no more; None if it goes on.
    """

    request: int
    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    end: Literal["stop", "length"] | None


@dataclasses.dataclass(eq=False)  # slots are told apart by what they are, not by what they hold
class _Slot:
    """A row of the cache: the tokens that it has, and the request that it works for."""

    kept: list[int] = dataclasses.field(default_factory=list)
    adapter: int = 0
    number: int | None = None
    request: Request | None = None
    unread: list[int] = dataclasses.field(default_factory=list)
    left: int = 0

    @property
    def decodes(self) -> bool:
        return self.request is not None and not self.unread


class Engine:
    """Answers requests, as many at a time as there are slots; see the module.

    Not for several threads at once.

    Args:
        graphdef: of the model.
        lora: its adapters, or an `AdapterStack`.
        frozen: base weights.
        eos_ids: tokens that end an answer.
        slots: requests that are answered at a time.
        capacity: most tokens of a prompt and its answer together.
        patient: read all prompts that are there before anything is answered: faster, where nobody waits for a token.

    Attributes:
        capacity: as given.
        reused: tokens of prompts that were not read, since a slot had them.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        lora: Any,
        frozen: nnx.State,
        *,
        eos_ids: Iterable[int],
        slots: int,
        capacity: int,
        patient: bool = False,
    ):
        self._weights, self._graphdef = (lora, frozen), graphdef
        self._eos_ids = tuple(sorted(set(eos_ids)))
        self.capacity, self.reused = capacity, 0
        self._patient = patient
        self._state: State = empty_state(graphdef, lora, frozen, slots, capacity)
        self._slots = [_Slot() for _ in range(slots)]
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._numbers = itertools.count()
        # What any request has asked for so far: the others pay little for it, and programs differ less.
        self._features, self._likeliest = Features(), 0
        config = model_of(graphdef, lora, frozen).config
        self._window = min((facts.window for facts in config.attentions if facts.window), default=capacity)
        self._whole = any(table.kind == "dynamic" for _, table in config.rotary)

    @property
    def busy(self) -> int:
        """Requests that have a slot."""
        return sum(slot.request is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> int:
        """Take a request; return its number.

        Raises:
            ValueError: an empty prompt.
            UserError: a prompt that leaves no room for an answer.
        """
        if not request.tokens:
            raise ValueError("a prompt needs a token.")
        if len(request.tokens) >= self.capacity:
            raise UserError(
                f"the prompt has {len(request.tokens)} tokens, and prompt and answer together may have "
                f"{self.capacity}; shorten it, or make room for more."
            )
        number = next(self._numbers)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """Forget a request, wherever it is; its slot is free at once."""
        self._waiting = collections.deque(each for each in self._waiting if each[0] != number)
        for slot in self._slots:
            if slot.number == number:
                self._free(slot)

    def step(self) -> list[Token]:
        """Read of prompts, if there are any to read, and add a token to every answer; return the tokens."""
        self._admit()
        budget = MOST_PIECE
        for slot in self._slots:
            while slot.unread and (budget > 0 or self._patient):
                budget -= self._read(slot)
        return self._advance() if any(slot.decodes for slot in self._slots) else []

    def _admit(self) -> None:
        free = [slot for slot in self._slots if slot.request is None]
        while free and self._waiting:
            number, request = self._waiting.popleft()
            slot = max(free, key=lambda slot: (self._common(slot, request), -len(slot.kept)))
            free.remove(slot)
            common = self._common(slot, request)
            self.reused += common
            slot.kept, slot.unread = slot.kept[:common], list(request.tokens[common:])
            slot.adapter, slot.number, slot.request = request.adapter, number, request
            slot.left = min(request.sampling.max_new_tokens, self.capacity - len(request.tokens))

    def _common(self, slot: _Slot, request: Request) -> int:
        """Count the first tokens of a prompt that a slot has; the last of a prompt is read for what follows it."""
        if slot.adapter != request.adapter:
            return 0
        pairs = zip(slot.kept, request.tokens[:-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        # A window's slots may have been overwritten by what comes after.
        return common if common == len(slot.kept) or len(slot.kept) <= self._window else 0

    def _read(self, slot: _Slot) -> int:
        """Read the next piece of a slot's prompt; return its size."""
        assert slot.request is not None
        size = len(slot.unread) if self._whole else pieces(len(slot.unread))[0]
        piece, slot.unread = slot.unread[:size], slot.unread[size:]
        tokens = np.zeros(power_of_two(size) if self._whole else size, np.int32)
        tokens[: len(piece)] = piece
        place = Piece(*map(np.int32, (self._slots.index(slot), len(slot.kept), len(piece), slot.adapter)))
        lora, frozen = self._weights
        self._state = prefill(lora, frozen, self._state, tokens, place, graphdef=self._graphdef)
        slot.kept += piece
        return len(tokens)

    def _advance(self) -> list[Token]:
        requests = [slot.request for slot in self._slots if slot.request is not None]
        self._features = _union(self._features, features_of([request.sampling for request in requests]))
        self._likeliest = max(self._likeliest, *(power_of_two(request.likeliest) for request in requests))
        busy = np.array([slot.decodes for slot in self._slots])
        settings = rows_of([slot.request.sampling if slot.request else Sampling() for slot in self._slots])
        adapters = np.array([slot.adapter for slot in self._slots], np.int32)
        lora, frozen = self._weights
        self._state, chosen = advance(
            lora,
            frozen,
            self._state,
            busy,
            (settings, adapters),
            graphdef=self._graphdef,
            features=self._features,
            eos_ids=self._eos_ids,
            likeliest=self._likeliest,
        )
        chosen = Chosen(*jax.device_get(tuple(chosen)))
        return [self._token(i, chosen) for i in np.flatnonzero(busy).tolist()]

    def _token(self, i: int, chosen: Chosen) -> Token:
        """Take note of the token of a slot; free it after the last."""
        slot = self._slots[i]
        assert slot.number is not None and slot.request is not None
        token, number = int(chosen.tokens[i]), slot.number
        slot.kept.append(token)
        slot.left -= 1
        end: Literal["stop", "length"] | None = "length" if not slot.left else None
        if token in self._eos_ids:
            end = "stop"
        n = slot.request.likeliest
        likeliest = zip(chosen.likeliest[i, :n].tolist(), chosen.likeliest_logprobs[i, :n].tolist(), strict=True)
        if end is not None:
            self._free(slot)
        return Token(number, token, float(chosen.logprobs[i]), tuple(likeliest), end)

    def _free(self, slot: _Slot) -> None:
        slot.number = slot.request = None
        slot.unread = []


def pieces(tokens: int) -> list[int]:
    """Cut a prompt into pieces of `LEAST_PIECE` to `MOST_PIECE` tokens, powers of two, few of them with little padding.

    Returns:
        Sizes, the largest first; the last may be padded.
    """
    size = MOST_PIECE
    while size > LEAST_PIECE and -tokens % size > _MOST_PADDING * tokens:
        size //= 2
    padded = tokens + -tokens % size
    bits = [1 << bit for bit in reversed(range(MOST_PIECE.bit_length() - 1)) if padded % MOST_PIECE & 1 << bit]
    return [MOST_PIECE] * (padded // MOST_PIECE) + bits


def _union(one: Features, other: Features) -> Features:
    return Features._make(max(pair) for pair in zip(one, other, strict=True))


def generate(
    graphdef: nnx.GraphDef,
    lora: Any,
    frozen: nnx.State,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: Sequence[int],
    sampling: Sampling | Sequence[Sampling] | None = None,
    slots: int = 16,
) -> list[list[int]]:
    """Continue every prompt until an end-of-sequence token or its `Sampling.max_new_tokens`.

    Args:
        graphdef: of the model, with `lora` and `frozen` from `qlora_jax.models.split_model`.
        lora: adapters.
        frozen: base weights.
        prompts: token ids, one non-empty sequence a prompt.
        eos_ids: tokens that end an answer; they are not returned.
        sampling: of all prompts, where the seed of each is one higher than that of the prompt before it, or of each;
            greedy with up to 256 tokens by default.
        slots: prompts that are answered at a time.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: no prompt, an empty one, or settings for another number of prompts.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("generate needs at least one prompt, and no empty ones.")
    if sampling is None or isinstance(sampling, Sampling):
        of_all = sampling or Sampling()
        seeds = [(of_all.seed + i) % 2**32 for i in range(len(prompts))]
        sampling = [dataclasses.replace(of_all, seed=seed) for seed in seeds]
    if len(sampling) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many settings, not {len(sampling)}.")
    longest = max(len(prompt) + each.max_new_tokens for prompt, each in zip(prompts, sampling, strict=True))
    engine = Engine(
        graphdef,
        lora,
        frozen,
        eos_ids=eos_ids,
        slots=min(len(prompts), slots),
        capacity=sum(pieces(longest)),  # few sizes, so that few programs are compiled
        patient=True,
    )
    answers: dict[int, list[int]] = {}
    for prompt, each in zip(prompts, sampling, strict=True):
        answers[engine.submit(Request(tuple(map(int, prompt)), each))] = []
    while engine.busy or engine.waiting:
        for token in engine.step():
            if token.end != "stop":
                answers[token.request].append(token.token)
    return list(answers.values())
