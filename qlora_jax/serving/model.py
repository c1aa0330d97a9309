"""A base in memory with adapters by name, and conversations as tokens: what chat, batches and the server share."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax import data, models
from qlora_jax.checkpoints.base_weights import BaseStorage
from qlora_jax.checkpoints.hub import resolve_config, resolve_model
from qlora_jax.checkpoints.loading import load_base
from qlora_jax.checkpoints.peft import load_adapter, warn_of_no_change
from qlora_jax.checkpoints.streaming import Progress
from qlora_jax.checkpoints.tokenizer import load_tokenizer
from qlora_jax.errors import UserError
from qlora_jax.generation import (
    Beam,
    BeamSearch,
    Engine,
    EngineOptions,
    Request,
    beam_search,
    stack_adapters,
    stack_config,
)
from qlora_jax.generation.text import Vocabulary
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.training.setup import default_dtype, warn_of_another_base
from qlora_jax.training.trained import Trained, base_name, find_trained, storage_in_training


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """A base and adapters to serve.

    Attributes:
        adapters: name -> directory of a run, of one of its checkpoints, or of an adapter in PEFT's format.
        model: base; None for the one that the adapters were trained on.
        storage: of the base; None for how the adapters were trained, or as it is stored where there is none.
        dtype: of computation; None for bfloat16 on accelerators and float32 on CPUs.
        base: name of the base without an adapter.
    """

    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    model: str | None = None
    storage: BaseStorage | None = None
    dtype: str | None = None
    base: str = "base"


class Served(NamedTuple):
    """One of the names of a `ServedModel`.

    Attributes:
        adapter: place of its adapter in the engine's stack.
        dataset_format: of conversations.
    """

    adapter: int
    dataset_format: str

    @property
    def format(self) -> data.RowFormat:
        """The format itself."""
        return data.FORMATS[self.dataset_format]


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A base with adapters, in memory.

    Attributes:
        config: of the base.
        description: one line for people.
        graphdef, lora, frozen: of the model; `lora` as `Engine` takes it.
        tokenizer: of the base.
        names: what can be asked for, the default first.
    """

    config: models.DecoderConfig
    description: str
    graphdef: nnx.GraphDef
    lora: Any
    frozen: nnx.State
    tokenizer: Any
    names: Mapping[str, Served]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        # Of the template too, whatever the adapters' formats: the base's name has it.
        return data.eos_ids(self.tokenizer, self.config.eos_token_ids, data.CHAT)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """Texts of single tokens."""
        return Vocabulary(self.tokenizer)

    def engine(self, options: EngineOptions) -> Engine:
        """Return an engine; see `Engine`."""
        return Engine(self.graphdef, self.lora, self.frozen, options, eos_ids=self.eos_ids)

    def search(self, request: Request, search: BeamSearch, options: EngineOptions) -> list[Beam]:
        """Return the continuations that a search finds, the best first; see `beam_search`."""
        return beam_search(
            self.graphdef,
            self.lora,
            self.frozen,
            request.tokens,
            search,
            eos_ids=self.eos_ids,
            sampling=request.sampling,
            adapter=request.adapter,
            capacity=options.capacity,
            cache_dtype=options.cache_dtype,
        )

    def encode_conversation(
        self, messages: Sequence[data.Message], name: str, position: str = "conversation"
    ) -> list[int]:
        """Return a conversation's tokens, as the adapter of that name was trained, up to the next answer.

        Raises:
            UserError: the template, or the adapter's format, has no place for these messages.
        """
        tokens = data.encode_conversation(
            messages, tokenizer=self.tokenizer, dataset_format=self.names[name].dataset_format, position=position
        )
        return self._checked(tokens, position)

    def encode_text(self, text: str, position: str = "prompt") -> list[int]:
        """Return the tokens of a text to be continued, with the model's first token where it has one."""
        return self._checked(data.encode_text(text, tokenizer=self.tokenizer, position=position), position)

    def _checked(self, tokens: np.ndarray, position: str) -> list[int]:
        data.check_tokens(tokens, self.tokenizer, self.config.vocab_size, position)
        ids: list[int] = tokens.tolist()
        return ids


def load_served(config: ServingConfig, progress: Progress | None = None) -> ServedModel:
    """Load a base and adapters.

    Args:
        config: of what.
        progress: see `Progress`.

    Raises:
        UserError: a base or an adapter that cannot be read, adapters of different bases, or trained on one that was
            stored otherwise, an adapter that does not fit the base, a name that is taken twice.
    """
    trained = {name: find_trained(path) for name, path in config.adapters.items()}
    if config.base in trained:
        raise UserError(f"`base={config.base}` is the name of an adapter too; give one of them another.")
    name = config.model or _one("base", {key: base_name(each) for key, each in trained.items()})
    if name is None:
        raise UserError("neither an adapter nor a model is given; give one of them.")
    path = resolve_model(name)
    model_config = resolve_config(path)
    storage = config.storage or _one(
        "storage of the base", {key: storage_in_training(each) for key, each in trained.items()}
    )
    storage = storage or BaseStorage()
    adapters = {key: _read(each, model_config, name) for key, each in trained.items()}
    dtype = jnp.dtype(config.dtype or default_dtype())
    quantization = storage.of(model_config)
    declared = stack_config([adapter for adapter, _ in adapters.values()]) if adapters else None
    qlora = QLoRAConfig(quantization, dtype, declared)
    graphdef, lora, frozen = models.split_model(models.abstract_model(model_config, qlora))
    base = load_base(path, quantization=quantization, dtype=dtype, progress=progress)
    stacked = stack_adapters(lora, [None, *adapters.values()], dtype) if adapters else lora
    names = {key: Served(i, each.dataset_format) for i, (key, each) in enumerate(trained.items(), 1)}
    names[config.base] = Served(0, data.CHAT)
    tokenizer = load_tokenizer(path)
    return ServedModel(
        model_config, base.description, graphdef, stacked, models.fill_base(frozen, base.tensors), tokenizer, names
    )


def _one[T](what: str, values: Mapping[str, T]) -> T | None:
    """Return what all adapters have in common.

    Raises:
        UserError: they differ; names two of them.
    """
    items = list(values.items())
    for key, value in items[1:]:
        if value != items[0][1]:
            raise UserError(
                f"adapters {items[0][0]} and {key} were trained with another {what}: {items[0][1]} and {value}; serve "
                "them apart, or say which `model` and `quant_type` to serve both on."
            )
    return items[0][1] if items else None


def _read(
    trained: Trained, config: models.DecoderConfig, base: str
) -> tuple[LoRAConfig, Mapping[tuple[str, ...], np.ndarray]]:
    tensors, saved = load_adapter(trained.adapter, config)
    warn_of_another_base(str(trained.adapter), saved.base_model_name, base)
    warn_of_no_change(trained.adapter, tensors)
    return LoRAConfig(saved.rank, float(saved.alpha), 0.0, tuple(saved.target_modules)), tensors


def adapter_names(paths: Sequence[str]) -> dict[str, str]:
    """Name adapters: NAME=DIRECTORY as it says, a directory alone by its last part.

    Raises:
        UserError: two of one name.
    """
    named: dict[str, str] = {}
    for each in paths:
        name, equals, path = each.partition("=")
        if not equals or "/" in name:
            name, path = Path(each).name or "adapter", each
        if name in named:
            raise UserError(f"two adapters have the name {name}; give one as NAME=DIRECTORY.")
        named[name] = path
    return named
