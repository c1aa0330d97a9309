"""Examples to batches of a bounded set of shapes: packed, grouped by length or plain; deterministic and resumable."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from qlora_jax.data.tokenization import IGNORED, Example
from qlora_jax.errors import UserError

Mode = Literal["packing", "group_by_length", "plain"]


@dataclass(frozen=True)
class Field:
    """One array of a batch.

    Attributes:
        name: key in `Batch`.
        dtype: NumPy's name of it.
        axes: "B S" for a value a token, "B" for a value a row.
        padding: value where a batch has no token or no row; that of "input_ids" is the tokenizer's padding token.
    """

    name: str
    dtype: str = "int32"
    axes: Literal["B S", "B"] = "B S"
    padding: int | float = 0

    def shape(self, *shape: int) -> tuple[int, ...]:
        """Return the part of [..., B, S] that this array has."""
        return shape if self.axes == "B S" else shape[:-1]


TOKEN_FIELDS = (Field("input_ids"), Field("labels", padding=IGNORED), Field("positions"), Field("segment_ids"))
"""Arrays of documents: segment_ids count a row's documents from 1 and are 0 on padding; positions restart at 0 with
every document; labels are as in `Example`."""


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class Batch(Mapping[str, Any]):
    """Arrays of one batch by the names of their fields; a pytree.

    Attributes:
        arrays: field name -> array [B, S] or [B].
        n_tokens: tokens that are not padding.
        example_ids: the rows that the batch was made of, in order.

    Only the arrays are part of the pytree (a static value would compile the step anew for every batch): a batch rebuilt
    by JAX has neither count nor ids.
    """

    arrays: Mapping[str, Any]
    n_tokens: int = 0
    example_ids: tuple[str, ...] = ()

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getitem__(self, name: str) -> Any:
        """Return an array by the name of its field."""
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the fields."""
        return iter(self.arrays)

    def __len__(self) -> int:
        """Count the fields."""
        return len(self.arrays)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[str, ...]]:
        """Split into named arrays and their names, for JAX."""
        return tuple((jax.tree_util.DictKey(name), array) for name, array in self.items()), tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], arrays: Sequence[Any]) -> "Batch":
        """Rebuild from names and arrays, for JAX."""
        return cls(dict(zip(names, arrays, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [B, S] of the token arrays."""
        return max((tuple(array.shape) for array in self.values()), key=len)


def abstract_batch(fields: Sequence[Field], *shape: int) -> Batch:
    """Return a batch of shapes and dtypes; `shape` is that of the token arrays, [..., B, S]."""
    return Batch({f.name: jax.ShapeDtypeStruct(f.shape(*shape), f.dtype) for f in fields})


def bucket_lengths(max_length: int, *, multiple: int = 64, max_buckets: int = 8) -> tuple[int, ...]:
    """Return at most `max_buckets` increasing lengths, multiples of `multiple`, spaced geometrically up to max_length.

    bucket_i = multiple * (top / multiple)^(i / (n - 1)), rounded up, where top is max_length rounded up. Long
    ones are multiples of up to 512, by less than an eighth longer: a step cuts them into tiles
    (`qlora_jax.nn.long_sequence.tile_size`), which a length of few divisors does not allow.
    """
    top = -(-max_length // multiple)
    n = min(max_buckets, top)
    inner = (int(np.ceil(round(top ** (i / (n - 1)), 6))) for i in range(n - 1))
    return tuple(sorted({_with_divisors(min(m, top) * multiple, multiple) for m in (*inner, top)}))


def _with_divisors(length: int, multiple: int) -> int:
    """Round a length up to a multiple of `multiple`, or of up to eight times as much where that is a 16th or less."""
    largest = 8 * multiple
    while multiple < largest and 16 * multiple < length:
        multiple *= 2
    return -(-length // multiple) * multiple


def first_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Pack items in order, each into the first bin with room for it; returns the bin of each, int64 [n].

    lengths: int [n], none above `capacity`. O(n log n): a tree over the bins keeps the largest space left in each
    subtree, and the descent prefers the left child.
    """
    leaves = 1 << max(1, len(lengths) - 1).bit_length()
    space = [capacity] * (2 * leaves)
    bins = np.empty(len(lengths), np.int64)
    for item, length in enumerate(lengths.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if space[node] < length:
                node += 1
        bins[item] = node - leaves
        space[node] -= length
        while node > 1:
            node //= 2
            larger = max(space[2 * node], space[2 * node + 1])
            if space[node] == larger:
                break
            space[node] = larger
    return bins


class Batches:
    """An endless iterator over batches of `batch_size` rows, resumable at every batch.

    Modes:
      "packing": documents share rows of `sequence_length` tokens; they are taken in shuffled order and put into the
        first row with room (first fit), never split. `segment_ids` and `positions` separate them.
      "group_by_length": an example a row; the shuffled order is cut into stretches of up to 50 batches, each sorted by
        length, so that the rows of a batch have similar lengths; then whole batches are shuffled. The very first batch
        has the longest rows, so that running out of memory shows at once.
      "plain": an example a row, shuffled.
    The latter two pad each batch to the smallest of `bucket_lengths` that holds its longest row.

    Every order is a function of (seed, epoch) alone: PCG64(SeedSequence([seed, epoch])). Nothing is dropped: the last
    batch of an epoch is filled with the first rows of the next, so every example occurs once an epoch and every batch
    is full. (More rows a batch than the data has simply spans more epochs.)

    State: {"epoch": int, "index": int}, the next row to be read (a packed row when packing). `restore` continues with
    exactly the batches that would have followed; equal `fingerprint`s mean equal data and settings.

    Raises:
        UserError: no examples, a batch size below 1, packing without a sequence length or with a field that has one
            value a row, or an example longer than `sequence_length` (cut it in `tokenize_rows`, which counts the cuts).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        mode: Mode,
        pad_id: int,
        seed: int = 0,
        sequence_length: int | None = None,
        fields: Sequence[Field] = TOKEN_FIELDS,
        bucket_multiple: int = 64,
        max_buckets: int = 8,
    ) -> None:
        self._examples = examples
        self._fields = _checked_fields(fields, mode)
        self._lengths = _checked_lengths(examples, batch_size, mode, sequence_length)
        self._batch_size = batch_size
        self._mode = mode
        self._pad_id = pad_id
        self._seed = seed
        self._sequence_length = sequence_length
        self._buckets = _buckets(self._lengths, mode, sequence_length, bucket_multiple, max_buckets)
        self._epoch = 0
        self._index = 0
        self._orders: dict[int, list[np.ndarray]] = {}

    def __iter__(self) -> "Batches":
        """Return itself: iterating continues where it stands."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch and move on; never raises StopIteration."""
        rows: list[np.ndarray] = []
        while len(rows) < self._batch_size:
            order = self._order(self._epoch)
            taken = order[self._index : self._index + self._batch_size - len(rows)]
            rows += taken
            self._index += len(taken)
            if self._index == len(order):
                self._epoch, self._index = self._epoch + 1, 0
        shape = self._batch_size, self._buckets
        return _make_batch(self._examples, rows, shape, self._fields, self._pad_id)

    def state(self) -> dict[str, int]:
        """Return the position of the iterator as JSON values."""
        return {"epoch": self._epoch, "index": self._index}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from a state; raises UserError if it does not exist with these data and settings."""
        epoch, index = state["epoch"], state["index"]
        if epoch < 0 or not 0 <= index < len(self._order(epoch)):
            raise UserError(
                f"the saved data position (epoch {epoch}, row {index}) does not exist in this data set of "
                f"{len(self._order(max(epoch, 0)))} rows an epoch; resume with the data and settings of its start."
            )
        self._epoch, self._index = epoch, index

    @property
    def epoch(self) -> float:
        """Epochs read so far, with the fraction of the current one."""
        return self._epoch + self._index / len(self._order(self._epoch))

    @property
    def rows_per_epoch(self) -> int:
        """Rows an epoch: the examples, or, packing, the rows of the first epoch (later ones may differ by a few)."""
        return len(self._order(0)) if self._mode == "packing" else len(self._examples)

    @property
    def batches_per_epoch(self) -> float:
        """Batches an epoch; not a whole number when the last one reaches into the next epoch."""
        return self.rows_per_epoch / self._batch_size

    def shapes(self) -> frozenset[tuple[int, int]]:
        """Return every (B, S) that can occur; the number of compilations is at most its size."""
        used = {_bucket(self._buckets, int(n)) for n in np.unique(self._lengths)}
        return frozenset((self._batch_size, s) for s in used)

    @property
    def fingerprint(self) -> str:
        """A hash of the examples and of all settings that determine the batches; equal means resumable."""
        settings = (self._batch_size, self._mode, self._pad_id, self._seed, self._sequence_length, self._buckets)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(self._lengths.tobytes())
        for example in self._examples:
            digest.update(example.input_ids.tobytes())
            digest.update(example.labels.tobytes())
            for name, value in example.more.items():
                digest.update(name.encode() + np.asarray(value).tobytes())
        return digest.hexdigest()[:16]

    def _order(self, epoch: int) -> list[np.ndarray]:
        """Return the rows of an epoch, each the indices of its examples; the two latest epochs are remembered."""
        if epoch not in self._orders:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
            shuffled = rng.permutation(len(self._examples))
            if self._mode == "packing":
                assert self._sequence_length is not None
                packed = _pack(shuffled, self._lengths, self._sequence_length)
                # First fit fills early rows best; without this the loosely filled ones would end every epoch.
                order = [packed[i] for i in rng.permutation(len(packed))]
            elif self._mode == "group_by_length":
                order = list(self._grouped(shuffled, epoch, rng)[:, None])
            else:
                order = list(shuffled[:, None])
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
            self._orders[epoch] = order
        return self._orders[epoch]

    def _grouped(self, shuffled: np.ndarray, epoch: int, rng: np.random.Generator) -> np.ndarray:
        size, n = self._batch_size, len(shuffled)
        # These rows complete the batch that the epoch before left unfinished; batches start whole after them.
        head = min(-(epoch * n) % size, n)
        stretch = size * max(1, min(50, n // (4 * size)))
        body = shuffled[head:]
        body = np.concatenate(
            [body[:0]]
            + [
                part[np.argsort(-self._lengths[part], kind="stable")]
                for part in (body[start : start + stretch] for start in range(0, len(body), stretch))
            ]
        )
        whole = len(body) // size
        batches = body[: whole * size].reshape(whole, size)[rng.permutation(whole)]
        if epoch == 0 and whole:
            longest = int(np.argmax(self._lengths[batches].max(axis=1)))
            batches[[0, longest]] = batches[[longest, 0]]
        return np.concatenate([shuffled[:head], batches.reshape(-1), body[whole * size :]])


def evaluation_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    mode: Mode,
    pad_id: int,
    sequence_length: int | None = None,
    fields: Sequence[Field] = TOKEN_FIELDS,
    bucket_multiple: int = 64,
    max_buckets: int = 8,
) -> list[Batch]:
    """Return batches of every example once, in order ("group_by_length": longest first).

    The last batch is filled up with rows that are all padding, so that every batch has `batch_size` rows. Modes,
    shapes and errors are those of `Batches`.
    """
    fields = _checked_fields(fields, mode)
    lengths = _checked_lengths(examples, batch_size, mode, sequence_length)
    buckets = _buckets(lengths, mode, sequence_length, bucket_multiple, max_buckets)
    order = np.arange(len(examples))
    if mode == "packing":
        assert sequence_length is not None
        rows = _pack(order, lengths, sequence_length)
    elif mode == "group_by_length":
        rows = list(np.argsort(-lengths, kind="stable")[:, None])
    else:
        rows = list(order[:, None])
    return [
        _make_batch(examples, rows[start : start + batch_size], (batch_size, buckets), fields, pad_id)
        for start in range(0, len(rows), batch_size)
    ]


def _checked_lengths(
    examples: Sequence[Example], batch_size: int, mode: str, sequence_length: int | None
) -> np.ndarray:
    if not examples:
        raise UserError("there are no examples to make batches of.")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, not {batch_size}.")
    if mode not in ("packing", "group_by_length", "plain"):
        raise UserError(f"batching mode '{mode}' is unknown; use packing, group_by_length or plain.")
    lengths = np.array([len(example) for example in examples], np.int64)
    if mode == "packing" and sequence_length is None:
        raise UserError("packing needs a sequence length.")
    if sequence_length is not None and lengths.max() > sequence_length:
        longest = examples[int(lengths.argmax())]
        raise UserError(
            f"{longest.example_id or 'an example'} has {len(longest)} tokens, more than the sequence length "
            f"{sequence_length}; cut it when tokenizing (max_length) or raise the sequence length."
        )
    return lengths


def _buckets(
    lengths: np.ndarray, mode: str, sequence_length: int | None, multiple: int, max_buckets: int
) -> tuple[int, ...]:
    if mode == "packing":
        assert sequence_length is not None
        return (sequence_length,)
    return bucket_lengths(int(lengths.max()), multiple=multiple, max_buckets=max_buckets)


def _bucket(buckets: tuple[int, ...], length: int) -> int:
    return next(bucket for bucket in buckets if bucket >= length)


def _pack(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Return the rows that first fit makes of `order`, each an int64 array of example indices in that order."""
    bins = first_fit(lengths[order], capacity)
    by_bin = order[np.argsort(bins, kind="stable")]
    return np.split(by_bin, np.cumsum(np.bincount(bins))[:-1])


def _checked_fields(fields: Sequence[Field], mode: str) -> tuple[Field, ...]:
    for field in fields:
        if mode == "packing" and field.axes == "B":
            raise UserError(f"`packing`: '{field.name}' has one value a row, but packed rows hold several.")
    return tuple(fields)


def _make_batch(
    examples: Sequence[Example],
    rows: Sequence[np.ndarray],
    shape: tuple[int, tuple[int, ...]],
    fields: Sequence[Field],
    pad_id: int,
) -> Batch:
    """Lay rows of examples out in arrays; `shape` is (B, the lengths S to choose from)."""
    batch_size, buckets = shape
    length = _bucket(buckets, max(sum(len(examples[i]) for i in row) for row in rows))
    arrays = {
        field.name: np.full(
            field.shape(batch_size, length), pad_id if field.name == "input_ids" else field.padding, field.dtype
        )
        for field in fields
    }
    n_tokens = 0
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row, start=1):
            example = examples[i]
            end = start + len(example)
            for field in fields:
                value = _value(example, field.name, segment)
                arrays[field.name][(r, slice(start, end)) if field.axes == "B S" else r] = value
            start = end
        n_tokens += start
    return Batch(arrays, n_tokens, tuple(examples[i].example_id for row in rows for i in row))


def _value(example: Example, field: str, segment: int) -> Any:
    """Return what an example, the `segment`-th of its row, has in a field."""
    if field == "input_ids":
        return example.input_ids
    if field == "labels":
        return example.labels
    if field == "positions":
        return np.arange(len(example))
    return segment if field == "segment_ids" else example.more[field]
