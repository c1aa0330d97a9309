"""Held-out loss of a model whose weights come one after another, and are never all in memory.

Several models can be evaluated side by side, each with a residual stream of its own: when a layer's weights are there,
all held-out batches pass through it. The computation is that of `qlora_jax.training.objectives.NextToken` with dense
weights.

Memory: of each model the residual streams of all held-out tokens, in the compute dtype, on the host; on the device one
batch, and the embedding, one layer or the head, in the compute dtype.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax import data, models
from qlora_jax.models import DecoderConfig
from qlora_jax.nn.attention import Attention
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.losses import next_token_loss

Path = tuple[str, ...]
Weights = Iterable[tuple[Path, np.ndarray]]
"""(path in the model, array) of some weights."""


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """Loss over all held-out tokens.

    Attributes:
        loss: mean cross-entropy of a trained token, in nats.
        tokens: trained tokens.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


class LayerwiseModel:
    """A model on its way through its layers: `embed`, then `layer` for each in order, then `loss`.

    Weights are given by their paths in the model, such as ("layers", "self_attn", "q_proj", "weight"), those of a layer
    without the axis of layers, and cast to what the model computes with one by one.

    Args:
        programs: of the model; others of the same structure may share them.
        batches: held-out rows: input_ids, positions and labels, int32 [B, S], and segment_ids of packed rows.
        lora: adapters that are computed beside the weights, as ("layers", ..., "lora_a") [R, in] and "lora_b" [out, R];
            None for weights alone.
    """

    def __init__(self, programs: "Programs", batches: Sequence[data.Batch], lora: LoRAConfig | None = None):
        self._programs, self._batches, self._lora = programs, batches, lora
        self._streams: list[np.ndarray] = []

    def embed(self, weights: Weights) -> None:
        """Begin: look up every token in the embedding, all that `weights` has."""
        stages = self._programs.of(0, self._lora)
        values = stages.cast(weights)
        self._streams = [np.asarray(stages.embed(values, batch)) for batch in self._batches]

    def layer(self, index: int, weights: Weights) -> None:
        """Go through the layer with that index."""
        stages = self._programs.of(index, self._lora)
        values = stages.cast((path, array[None]) for path, array in weights)
        self._streams = [
            np.asarray(stages.layer(values, stream, batch))
            for stream, batch in zip(self._streams, self._batches, strict=True)
        ]

    def loss(self, weights: Weights) -> HeldOutLoss:
        """End: the loss, by the final norm and the head (the embedding, where the two are tied).

        Raises:
            ValueError: no token is trained.
        """
        stages = self._programs.of(0, self._lora)
        values = stages.cast(weights)
        sums = [stages.loss(values, stream, batch) for stream, batch in zip(self._streams, self._batches, strict=True)]
        tokens = sum(int(count) for _, count in sums)
        if not tokens:
            raise ValueError("No held-out token is trained.")
        return HeldOutLoss(sum(float(loss) for loss, _ in sums) / tokens, tokens)


class Programs:
    """Programs of the models of one structure, compiled when they are first needed.

    Args:
        config: of the model.
        dtype: compute dtype.
    """

    def __init__(self, config: DecoderConfig, dtype: Any):
        self._config, self._dtype = config, jnp.dtype(dtype)
        self._stages: dict[tuple[Attention, LoRAConfig | None], _Stages] = {}

    def of(self, layer: int, lora: LoRAConfig | None) -> "_Stages":
        """Return the programs of a layer with that index and, whatever its index, of embedding and head."""
        attention = self._config.attentions[layer]
        key = attention, lora
        if key not in self._stages:
            one = dataclasses.replace(self._config, num_hidden_layers=1, attentions=(attention,))
            self._stages[key] = _Stages(one, self._dtype, lora)
        return self._stages[key]


class _Stages:
    """The programs of a model of one layer; each reads the weights of its own part, and the others are never there."""

    def __init__(self, config: DecoderConfig, dtype: Any, lora: LoRAConfig | None):
        model = models.abstract_model(config, QLoRAConfig(QuantizationConfig("none"), dtype, lora))
        self._graphdef, state = nnx.split(model)
        self._variables = {tuple(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
        # Of each instance, so that programs do not outlive it.
        self.embed, self.layer, self.loss = jax.jit(self._embed), jax.jit(self._layer), jax.jit(self._loss)

    def cast(self, weights: Weights) -> dict[Path, jax.Array]:
        """Put weights on the device, in the dtypes that the model declares; ValueError for one that it has not."""
        values = {}
        for path, array in weights:
            if path not in self._variables:
                raise ValueError(f"The model has no {'.'.join(path)}.")
            values[path] = jnp.asarray(array.astype(self._variables[path][1].get_value().dtype, copy=False))
        return values

    def _embed(self, values: Mapping[Path, jax.Array], batch: Mapping[str, jax.Array]) -> jax.Array:
        model = self._model(values)
        return model.embed_tokens(batch["input_ids"], model.dtype)

    def _layer(self, values: Mapping[Path, jax.Array], h: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        model = self._model(values)
        context = model.context(batch["positions"], batch.get("segment_ids"))
        # Nothing is kept without a backward pass; `full` lets long rows pass by tiles.
        return model.stack(model.layers, h, context, remat="full")

    def _loss(
        self, values: Mapping[Path, jax.Array], h: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        model = self._model(values)
        return next_token_loss(model.norm(h), model.head, batch["labels"])

    def _model(self, values: Mapping[Path, jax.Array]) -> Any:
        """Build the model, with shapes in place of the weights that `values` lacks."""
        filled = [
            (path, variable.replace(values.get(key, variable.get_value())))
            for key, (path, variable) in self._variables.items()
        ]
        return nnx.merge(self._graphdef, nnx.from_flat_state(filled))
