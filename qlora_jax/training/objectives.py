"""Objectives: the arrays of a batch, how rows become examples, and the loss of a batch as sums.

Sums of micro-batches and of devices add up to those of the whole batch; the step divides by the summed weight.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array

from qlora_jax import data
from qlora_jax.choices import Remat
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.losses import next_token_loss


class Sums(NamedTuple):
    """Sums over a batch, or over a part of one.

    Attributes:
        loss: float32 [], summed loss; what is differentiated.
        weight: [], what the sums are divided by, e.g. the number of trained tokens.
        metrics: further sums by name, each []; their quotients by the weight are logged.
    """

    loss: Array
    weight: Array
    metrics: Mapping[str, Array] = {}  # never changed


@runtime_checkable
class Objective(Protocol):
    """A training objective."""

    @property
    def fields(self) -> tuple[data.Field, ...]:
        """Arrays of a batch."""

    @property
    def unit(self) -> str:
        """The unit of the weight, in the plural, e.g. "tokens"."""

    @property
    def uses_reference(self) -> bool:
        """True if `sums` also reads the model without adapters."""

    def examples(
        self, rows: data.Rows, tokenizer: Any, config: TrainConfig
    ) -> tuple[list[data.Example], data.DataReport]:
        """Turn rows into examples, and report what became of every row.

        Raises:
            UserError: rows that cannot be read, or none that trains on anything.
        """

    def sums(
        self,
        model: Any,
        batch: Mapping[str, Array],
        *,
        dropout_key: Array | None,
        remat: Remat,
        reference: Any = None,
    ) -> Sums:
        """Compute loss, weight and metrics of a micro-batch on one device.

        Args:
            model: with the adapters that are trained.
            batch: the arrays of `fields`.
            dropout_key: of this micro-batch on this device; None without dropout.
            remat: activations kept for the backward pass, see `qlora_jax.nn.remat`.
            reference: the model without adapters on the same frozen weights, if `uses_reference`.
        """

    def derived(self, loss: float) -> dict[str, float]:
        """Return numbers that follow from a mean loss, by the name they are logged under."""


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Next-token cross-entropy of the trained tokens, in nats.

    Attributes:
        packed: rows hold several documents, kept apart by `segment_ids`.
    """

    packed: bool = False
    unit: ClassVar[str] = "tokens"
    uses_reference: ClassVar[bool] = False

    @property
    def fields(self) -> tuple[data.Field, ...]:
        """Arrays of a batch."""
        # An unpacked row is one document padded on the right: causality alone keeps it from the padding.
        return data.TOKEN_FIELDS if self.packed else data.TOKEN_FIELDS[:-1]

    def examples(
        self, rows: data.Rows, tokenizer: Any, config: TrainConfig
    ) -> tuple[list[data.Example], data.DataReport]:
        """Tokenise rows as `qlora_jax.data.tokenize_rows` does."""
        return data.tokenize_rows(
            rows,
            tokenizer=tokenizer,
            dataset_format=config.dataset_format,
            source_max_len=config.source_max_len,
            target_max_len=config.target_max_len,
            train_on_source=config.train_on_source,
            max_length=config.packed_length,
            on_bad_row=config.on_bad_row,
        )

    def sums(
        self,
        model: Any,
        batch: Mapping[str, Array],
        *,
        dropout_key: Array | None,
        remat: Remat,
        reference: Any = None,
    ) -> Sums:
        """Sum the loss over the trained tokens; the weight is their number."""
        segment_ids = batch["segment_ids"] if self.packed else None
        hidden, _ = model(
            batch["input_ids"], batch["positions"], segment_ids=segment_ids, dropout_key=dropout_key, remat=remat
        )
        with jax.named_scope("loss"):
            return Sums(*next_token_loss(hidden, model.head, batch["labels"]))

    def derived(self, loss: float) -> dict[str, float]:
        """Return the perplexity."""
        return {"perplexity": math.exp(min(loss, 700.0))}  # JSON has no infinity


NEXT_TOKEN = NextToken()
"""Next-token cross-entropy of unpacked rows."""


def objective_of(config: TrainConfig) -> Objective:
    """Return the objective that a configuration asks for."""
    return NextToken(packed=config.packing)
