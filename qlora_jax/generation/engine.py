"""Continuous batching: requests join and leave a running batch at every token.

The engine has a fixed number of slots, each a row of one cache. A request waits until a slot is free; its prompt is
read in pieces, of all prompts about `MOST_PIECE` tokens between two tokens of the others; then every step adds a token
to all slots whose prompt has been read. What a slot had before stays in its cache until it is needed: a prompt that
begins alike, as the next turn of a chat does, is read from where they part.

With `lookup`, a step adds several tokens to answers that go on as the text before did (`PromptLookup`).

Programs are compiled once for each size of a piece, and once for a step with each set of filters, and with guesses.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from qlora_jax.choices import CacheDtype
from qlora_jax.errors import UserError, outside, refuse_all
from qlora_jax.generation.lookup import LookupGain, PromptLookup
from qlora_jax.generation.programs import (
    Chosen,
    Guesses,
    Piece,
    Scores,
    State,
    Structure,
    advance,
    empty_state,
    forget,
    prefill,
)
from qlora_jax.generation.sampling import Features, Rows, Sampling, features_of, power_of_two, rows_of

LEAST_PIECE, MOST_PIECE = 16, 512
"""Tokens of the pieces that prompts are read in; between them the powers of two."""

MOST_LIKELIEST = 20
"""Likeliest tokens that can be asked for with each."""

_LONGEST_UNTRIED = 16
"""Steps after which guesses are tried again where they cost more than they brought."""

_MOST_PADDING = 0.15
"""Share of padding in the pieces of a prompt, beyond the smallest piece."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        tokens: of the prompt, at least one.
        sampling: settings.
        adapter: place of its adapter in the engine's `AdapterStack`; 0 where there is none.
        likeliest: how many of the likeliest tokens to return with each, at most `MOST_LIKELIEST`.
        scored: return the tokens of the prompt as well, which is read whole for it.
    """

    tokens: tuple[int, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    adapter: int = 0
    likeliest: int = 0
    scored: bool = False


class Token(NamedTuple):
    """A token of an answer, or of a prompt that is scored.

    Attributes:
        request: number that `submit` returned.
        token: its id.
        logprob: natural logarithm of its probability before anything was filtered; None for the first of a prompt.
        likeliest: (id, logprob) of the likeliest tokens.
        end: why the answer ends with it: "stop" for an end-of-sequence token, which is not part of the answer; "length"
            if there may be no more; None if it goes on.
        prompt: True for tokens of a prompt, which come before those of the answer.
    """

    request: int
    token: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...]
    end: Literal["stop", "length"] | None = None
    prompt: bool = False


@dataclasses.dataclass(eq=False)  # slots are told apart by what they are, not by what they hold
class _Slot:
    """A row of the cache: the tokens that it has, and the request that it works for.

    Attributes:
        kept: tokens in the cache.
        adapter: that they were read with.
        number: of the request.
        request: that it works for.
        unread: tokens of its prompt.
        left: tokens that its answer may have yet.
        freed: place in the order in which slots became free.
        spoilt: numbers came that are not finite.
        lookup: what is guessed by.
    """

    kept: list[int] = dataclasses.field(default_factory=list)
    adapter: int = 0
    number: int | None = None
    request: Request | None = None
    unread: list[int] = dataclasses.field(default_factory=list)
    left: int = 0
    freed: int = 0
    spoilt: bool = False
    lookup: PromptLookup | None = None

    @property
    def decodes(self) -> bool:
        return self.request is not None and not self.unread


@dataclasses.dataclass(frozen=True)
class _Demand:
    """Demands of requests on the program of a step."""

    features: Features = dataclasses.field(default_factory=Features)
    likeliest: bool = False

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "_Demand":
        likeliest = any(request.likeliest for request in requests)
        return cls(features_of([request.sampling for request in requests]), likeliest)

    def joined(self, other: "_Demand") -> "_Demand":
        features = Features._make(max(pair) for pair in zip(self.features, other.features, strict=True))
        return _Demand(features, self.likeliest or other.likeliest)

    @property
    def cost(self) -> int:
        """A measure of the time that it takes: what sorts the vocabulary counts most."""
        filters = self.features
        sorts = filters.top_p + filters.typical_p + (filters.top_k > 1024)
        return 20 * sorts + filters.top_k.bit_length() + filters.ngram + 5 * self.likeliest + sum(map(bool, filters))


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine.

    Attributes:
        slots: requests that are answered at a time.
        capacity: most tokens of a prompt and its answer together.
        cache_dtype: that keys and values are kept in.
        lookup: most tokens that are guessed at a step; 0 for none.

    Raises:
        UserError: values outside their ranges.
    """

    slots: int = 8
    capacity: int = 4096
    cache_dtype: CacheDtype = "auto"
    lookup: int = 0

    def __post_init__(self) -> None:
        """Refuse what no engine has."""
        wanted = {
            "slots": ("at least 1", self.slots >= 1),
            "capacity": ("at least 2", self.capacity >= 2),
            "lookup": ("at least 0", self.lookup >= 0),
        }
        refuse_all(outside(self, wanted))


class Engine:
    """Answers requests, as many at a time as there are slots; see the module.

    Not for several threads at once.

    Args:
        graphdef: of the model.
        lora: its adapters, or an `AdapterStack`.
        frozen: base weights.
        options: its room.
        eos_ids: tokens that end an answer.
        patient: read all prompts that are there before anything is answered: faster, where nobody waits for a token.

    Attributes:
        capacity: as given.
        reused: tokens of prompts that were not read, since a slot had them.
        gain: what guesses were worth so far.

    Raises:
        UserError: guesses for a model whose rotary table follows the length: they would change it.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        lora: Any,
        frozen: nnx.State,
        options: EngineOptions,
        *,
        eos_ids: Iterable[int],
        patient: bool = False,
    ):
        structure, lookup = Structure(graphdef), options.lookup
        config = structure.model(lora, frozen).config
        self._whole = config.rotary_follows_length
        if lookup and self._whole:
            raise UserError(
                f"`prompt_lookup_num_tokens={lookup}`: the rotary table of this model follows the length, and guesses "
                "would change it; leave it out."
            )
        self._weights, self._structure = (lora, frozen), structure
        self._eos_ids = tuple(sorted(set(eos_ids)))
        self.capacity, self.reused = options.capacity, 0
        self._patient, self._lookup, self.gain = patient, lookup, LookupGain()
        self._untried = 0  # steps since the last with guesses
        slots, capacity = options.slots, options.capacity
        self._state: State = empty_state(
            structure, lora, frozen, slots, capacity, cache_dtype=options.cache_dtype, margin=lookup
        )
        self._slots = [_Slot() for _ in range(slots)]
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._numbers, self._freed = itertools.count(), itertools.count(1)
        self._demanded = _Demand()  # by any request so far
        self._compiled: list[_Demand] = []  # what there are programs for
        self._rows: tuple[Rows, Any] | None = None  # settings of the slots; None where a request came or went
        self._program = _Demand()  # for these
        self._window = min((facts.window for facts in config.attentions if facts.window), default=capacity)

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
            raise UserError(no_room(len(request.tokens), self.capacity))
        number = next(self._numbers)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """Forget a request, wherever it is; its slot is free at once."""
        self._waiting = collections.deque(each for each in self._waiting if each[0] != number)
        for slot in self._slots:
            if slot.number == number:
                self._free(slot)

    def run(self) -> Iterator[Token]:
        """Yield the tokens of all answers until there is nothing to do."""
        while self.busy or self.waiting:
            yield from self.step()

    def warm_up(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Compile the programs that requests will need, so that none waits for one; for an engine without requests.

        Those are pieces of all sizes, steps of greedy choice, of common settings, and of all settings together, which
        serves whatever is asked. Compiled when they come are larger values of `top_k` and `no_repeat_ngram_size` than
        here, and pieces of prompts that are scored.

        Args:
            stopped: asked before each; True ends it.
        """
        drawn = functools.partial(Sampling, do_sample=True)
        common = [(Sampling(), 0), (Sampling(), MOST_LIKELIEST), (drawn(top_k=0), 0), (drawn(top_k=50, top_p=0.9), 0)]
        everything = drawn(
            top_k=1024, top_p=0.9, min_p=0.1, typical_p=0.9, repetition_penalty=1.1, no_repeat_ngram_size=4,
            min_new_tokens=1, max_new_tokens=1,
        )  # fmt: skip
        lengths = range(1, min(self.capacity - 1, MOST_PIECE) + 1)
        first = {pieces(length)[0]: length for length in lengths}
        warming = [Request((0,) * length, Sampling(max_new_tokens=1)) for length in first.values() if not self._whole]
        for sampling, likeliest in (*common, (everything, MOST_LIKELIEST)):
            # Guesses are made where a text repeats itself and more than one token may come.
            warming += [
                Request((0, 0, 0, 0), dataclasses.replace(sampling, max_new_tokens=new), likeliest=likeliest)
                for new in (1, 2)[: 1 + bool(self._lookup)]
            ]
        for request in warming:
            if len(request.tokens) < self.capacity and not stopped():
                self._demanded = _Demand()  # so that who asks for little gets a program that does little
                self.submit(request)
                collections.deque(self.run(), maxlen=0)
            for slot in self._slots:
                slot.kept = []
        self._demanded, self.reused, self.gain = _Demand(), 0, LookupGain()

    def step(self) -> list[Token]:
        """Read pieces of prompts, if there are any, and add tokens to every answer; return them in their order."""
        self._admit()
        tokens: list[Token] = []
        reading = [slot for slot in self._slots if slot.unread]
        for slot in reading:
            # A share of the tokens for each, so that a short prompt does not wait for a long one.
            share = max(MOST_PIECE // len(reading), 1)
            while slot.unread and (share > 0 or self._patient):
                most = MOST_PIECE if self._patient else max(share, LEAST_PIECE)
                size, scored = self._read(slot, most)
                share -= size
                tokens += scored
        return tokens + (self._advance() if any(slot.decodes for slot in self._slots) else [])

    def _admit(self) -> None:
        free = [slot for slot in self._slots if slot.request is None]
        while free and self._waiting:
            number, request = self._waiting.popleft()
            common = {slot: self._common(slot, request) for slot in free}
            # That which most need not be read of, if as much is not lost; else that which has been idle for longest.
            worth = {slot: tokens if 2 * tokens > len(slot.kept) else 0 for slot, tokens in common.items()}
            slot = max(free, key=lambda slot: (worth[slot], -slot.freed))
            free.remove(slot)
            self.reused += common[slot]
            slot.kept, slot.unread = slot.kept[: common[slot]], list(request.tokens[common[slot] :])
            slot.adapter, slot.number, slot.request = request.adapter, number, request
            slot.left = min(request.sampling.max_new_tokens, self.capacity - len(request.tokens))
            slot.lookup = PromptLookup(request.tokens) if self._lookup else None
            self._rows = None

    def _common(self, slot: _Slot, request: Request) -> int:
        """Count the first tokens of a prompt that a slot has; the last of a prompt is read for what follows it."""
        # A rotary table that follows the length has turned what is kept for another length.
        if slot.adapter != request.adapter or request.scored or self._whole:
            return 0
        pairs = zip(slot.kept, request.tokens[:-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        # A window's slots may have been overwritten by what comes after.
        return common if common == len(slot.kept) or len(slot.kept) <= self._window else 0

    def _read(self, slot: _Slot, most: int) -> tuple[int, list[Token]]:
        """Read the next piece of a slot's prompt, of so many tokens at most; return its size, and scored tokens."""
        assert slot.request is not None and slot.number is not None
        piece, tokens = next_piece(slot.unread, self._whole, most)
        place = Piece(*map(np.int32, (self._slots.index(slot), len(slot.kept), len(piece), slot.adapter)))
        lora, frozen = self._weights
        self._state, scores = prefill(
            lora,
            frozen,
            self._state,
            tokens,
            place,
            structure=self._structure,
            likeliest=MOST_LIKELIEST if slot.request.scored else None,
        )
        slot.unread = slot.unread[len(piece) :]
        scored = [] if scores is None else _tokens(slot, piece, jax.device_get(scores))
        if scored and not slot.kept:
            scored[0] = scored[0]._replace(logprob=None, likeliest=())
        slot.kept += piece
        return len(tokens), [each._replace(prompt=True) for each in scored]

    def _advance(self) -> list[Token]:
        busy = np.array([slot.decodes for slot in self._slots])
        guesses = self._guesses()
        if self._rows is None:
            self._rows = self._settings()
        lora, frozen = self._weights
        started = time.perf_counter()
        self._state, chosen = advance(
            lora,
            frozen,
            self._state,
            busy,
            self._rows,
            guesses,
            structure=self._structure,
            features=self._program.features,
            eos_ids=self._eos_ids,
            likeliest=MOST_LIKELIEST if self._program.likeliest else 0,
        )
        chosen = jax.device_get(chosen)
        seconds = time.perf_counter() - started
        if guesses is None:
            self.gain.note_plain(seconds)
        else:
            self.gain.note_lookup(seconds, chosen.counts.sum() / busy.sum())
            self._learn(guesses, chosen.counts)
        return [token for i in np.flatnonzero(busy).tolist() for token in self._take(i, chosen)]

    def _settings(self) -> tuple[Rows, Any]:
        """Return the settings and adapters of all slots, and choose the smallest program that does what they ask for.

        Where there is none, the new one does what was asked for before, too, so that there are few.
        """
        needed = _Demand.of([slot.request for slot in self._slots if slot.request is not None])
        self._demanded = self._demanded.joined(needed)
        fit = [each for each in self._compiled if each.joined(needed) == each]
        if not fit:
            self._compiled.append(self._demanded)
        self._program = min(fit, key=lambda each: each.cost, default=self._demanded)
        settings = rows_of([slot.request.sampling if slot.request else Sampling() for slot in self._slots])
        # Once for all steps until the next of them.
        placed: tuple[Rows, Any] = jax.device_put(
            (settings, np.array([slot.adapter for slot in self._slots], np.int32))
        )
        return placed

    def _guesses(self) -> Guesses | None:
        """Return guesses at the next tokens of every slot; None if there are none that would save a step."""
        self._untried += 1
        if not self._lookup or not (self.gain.worthwhile or self._untried >= _LONGEST_UNTRIED):
            return None
        tokens = np.zeros((len(self._slots), 1 + self._lookup), np.int32)
        counts = np.zeros(len(self._slots), np.int32)
        for i, slot in enumerate(self._slots):
            if slot.lookup is not None and slot.decodes:
                # The first is a guess at the token that is known by now, on the device.
                guess = slot.lookup.guess(min(1 + self._lookup, slot.left))
                tokens[i, : len(guess)], counts[i] = guess, len(guess)
        if counts.max() <= 1:
            return None
        self._untried = 0
        return Guesses(tokens, counts)

    def _learn(self, guesses: Guesses, counts: np.ndarray) -> None:
        for slot, guessed, accepted in zip(self._slots, guesses.counts - 1, counts - 1, strict=True):
            if slot.lookup is not None and guessed > 0:
                self.gain.guessed += int(guessed)
                self.gain.accepted += int(accepted)
                slot.lookup.learn(int(accepted))

    def _take(self, i: int, chosen: Chosen) -> list[Token]:
        """Return the new tokens of a slot, none after the last of its answer, which frees it."""
        slot = self._slots[i]
        count = int(chosen.counts[i])
        ids = chosen.tokens[i, :count].tolist()
        tokens = _tokens(slot, ids, jax.tree.map(lambda a: a[i, :count], chosen.scores))
        slot.left -= count
        if slot.lookup is not None:
            slot.lookup.extend(ids)
        slot.kept += ids
        slot.spoilt |= bool(np.isnan(chosen.scores.logprobs[i, :count]).any())
        ends = [j for j, token in enumerate(ids) if token in self._eos_ids]
        if ends:
            # Tokens that were guessed after the end stay in the cache: a prompt may go on with them.
            tokens = [*tokens[: ends[0]], tokens[ends[0]]._replace(end="stop")]
        elif not slot.left:
            tokens[-1] = tokens[-1]._replace(end="length")
        if tokens[-1].end is not None:
            self._free(slot)
        return tokens

    def _free(self, slot: _Slot) -> None:
        if slot.spoilt:
            self._state = forget(self._state, np.int32(self._slots.index(slot)))
            slot.kept, slot.spoilt = [], False
        slot.number = slot.request = slot.lookup = None
        slot.unread, slot.freed = [], next(self._freed)
        self._rows = None


def _tokens(slot: _Slot, ids: Sequence[int], scores: Scores) -> list[Token]:
    """Return tokens of a slot's request, as far as there are ids, with their scores."""
    assert slot.number is not None and slot.request is not None
    n = slot.request.likeliest
    values = zip(ids, *(array.tolist() for array in scores), strict=False)
    return [
        Token(slot.number, token, logprob, tuple(zip(likeliest[:n], logprobs[:n], strict=True)))
        for token, logprob, likeliest, logprobs in values
    ]


def no_room(tokens: int, capacity: int) -> str:
    """Say that a prompt leaves no room for an answer."""
    return (
        f"the prompt has {tokens} tokens, and prompt and answer together may have {capacity}; shorten it, or give more "
        "`context`."
    )


def next_piece(unread: Sequence[int], whole: bool, most: int = MOST_PIECE) -> tuple[list[int], np.ndarray]:
    """Cut the next piece off a prompt.

    Args:
        unread: the rest of the prompt.
        whole: take all of it.
        most: tokens of it, unless all of it is taken.

    Returns:
        Its tokens, and the same int32, padded on the right to a size that there are few of.
    """
    size = power_of_two(len(unread)) if whole else pieces(len(unread), most)[0]
    padded = np.zeros(size, np.int32)
    padded[: len(unread[:size])] = unread[:size]
    return list(unread[:size]), padded


def pieces(tokens: int, most: int = MOST_PIECE) -> list[int]:
    """Cut a prompt into pieces, powers of two from `LEAST_PIECE` on, few of them with little padding.

    Args:
        tokens: of the prompt.
        most: tokens of a piece, at least `LEAST_PIECE`.

    Returns:
        Sizes, the largest first; the last may be padded.
    """
    largest = 1 << most.bit_length() - 1
    size = largest
    while size > LEAST_PIECE and -tokens % size > _MOST_PADDING * tokens:
        size //= 2
    padded = tokens + -tokens % size
    bits = [1 << bit for bit in reversed(range(largest.bit_length() - 1)) if padded % largest & 1 << bit]
    return [largest] * (padded // largest) + bits


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
        # Few sizes, so that few programs are compiled.
        EngineOptions(min(len(prompts), slots), sum(pieces(longest))),
        eos_ids=eos_ids,
        patient=True,
    )
    answers: dict[int, list[int]] = {}
    for prompt, each in zip(prompts, sampling, strict=True):
        answers[engine.submit(Request(tuple(map(int, prompt)), each))] = []
    for token in engine.run():
        if token.end != "stop":
            answers[token.request].append(token.token)
    return list(answers.values())
