"""The cost of a merge, measured before anything is written: held-out loss and what rounding keeps, for every format.

The base is streamed twice at most, once as training read it and once as its checkpoint has it; every format rounds each
merged tensor with the functions that its export writes by, and the models of all formats go through their layers side
by side (`qlora_jax.exporting.layerwise`).

Memory: the tensors of one layer and their changes, float32, or the embedding or head; of a converted directory the
layers that one part of it holds. One tensor of a format beside them, and what `qlora_jax.exporting.layerwise` says.
"""

import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from qlora_jax import data
from qlora_jax.checkpoints import hf_export
from qlora_jax.checkpoints.base_weights import BaseStorage, BaseWeights, open_base
from qlora_jax.checkpoints.gguf_writer import GGUF_FORMATS, codecs, gguf_metadata
from qlora_jax.checkpoints.hub import resolve_model
from qlora_jax.checkpoints.manifest import is_converted
from qlora_jax.checkpoints.merging import Adapter, Codec, MergedTensor, merged_tensors, open_adapter, stored
from qlora_jax.checkpoints.peft import warn_of_no_change
from qlora_jax.checkpoints.streaming import Progress
from qlora_jax.checkpoints.tokenizer import ensure_pad, load_tokenizer
from qlora_jax.choices import BaseKind, ExportTarget, OnBadRow
from qlora_jax.errors import UserError
from qlora_jax.exporting.layerwise import HeldOutLoss, LayerwiseModel, Programs, Weights
from qlora_jax.exporting.recipe import (
    ExportConfig,
    hugging_face_format,
    warn_of_erased,
)
from qlora_jax.models import TensorSpec
from qlora_jax.nn.linear import LoRAConfig
from qlora_jax.training import setup
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.datasets import load_evaluation
from qlora_jax.training.trained import Trained, base_name, find_trained, storage_in_training

logger = logging.getLogger(__name__)

Codecs = Callable[[TensorSpec], Codec[Any]]
"""Storage of each base tensor in one format."""


USUAL: tuple[ExportTarget, ...] = ("safetensors", "bitsandbytes", "gguf-q8_0", "gguf-q4_1", "gguf-q4_0")
"""Formats of a comparison that asks for none."""


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """A comparison of merges.

    Attributes:
        adapter: directory of a run, one of its checkpoints, or an adapter in PEFT's format.
        formats: formats to measure, all but "gguf-lora", which is the adapter beside its base; None for those of
            `USUAL` that can hold the model.
        base: the bases to merge into; "both" leaves one out that is not there.
        model: base to use in place of the one the run names.
        storage: of the base in training; None for what the run says.
        dtype: of weights that a Hugging Face format does not quantise.
        eval_dataset: held-out rows in place of the run's, see `TrainConfig`.
        eval_split: split of them.
        dataset_format: of `eval_dataset`; None for what the run has.
        on_bad_row: see `TrainConfig`; None for what the run has.
        max_eval_samples: most held-out rows; None for what the run has.
    """

    adapter: str
    formats: tuple[ExportTarget, ...] | None = None
    base: Literal["both", "dequantized", "original"] = "both"
    model: str | None = None
    storage: BaseStorage | None = None
    dtype: str = "bfloat16"
    eval_dataset: str | None = None
    eval_split: str | None = None
    dataset_format: str | None = None
    on_bad_row: OnBadRow | None = None
    max_eval_samples: int | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model of a comparison.

    Attributes:
        name: of its format; of a base without a format, what is computed.
        base: the weights it is made of.
        held_out: its loss.
        shares: module -> share of its change that survives, see `surviving_share`; {} if nothing is merged.
    """

    name: str
    base: BaseKind
    held_out: HeldOutLoss
    shares: Mapping[str, float]


BASE, BESIDE = "no adapter", "adapter beside it"
"""Names of the two models that nothing is merged into."""


class _Contender:
    """A model of a comparison: how it takes a tensor, and where it is in its layers."""

    def __init__(self, name: str, model: LayerwiseModel, codecs: Codecs | None, adapter: Adapter | None):
        self.name, self.model, self._codecs, self._adapter = name, model, codecs, adapter
        self.shares: dict[str, float] = {}

    def weights(self, tensors: Sequence[MergedTensor]) -> Weights:
        """Yield what it computes with in place of some tensors, its adapters among them."""
        for tensor in tensors:
            path = tensor.spec.path
            if self._codecs is not None:
                codec = self._codecs(tensor.spec)
                yield path, codec.load(stored(tensor, codec, self.shares))
                continue
            yield path, tensor.base
            if tensor.change is not None and self._adapter is not None:
                assert tensor.spec.layer is not None
                a, b = self._adapter.pair(path[:-1], tensor.spec.layer)
                yield (*path[:-1], "lora_a"), a
                yield (*path[:-1], "lora_b"), b


def measure(
    base: BaseWeights,
    kind: BaseKind,
    adapter: Adapter,
    formats: Mapping[str, Codecs],
    batches: Sequence[data.Batch],
    dtype: Any,
    progress: Progress | None = None,
) -> list[Measured]:
    """Measure a base alone, with its adapter beside it, and merged with it in several formats.

    Args:
        base: the weights.
        kind: what they are, to be repeated in the result.
        adapter: of that base.
        formats: name -> storage.
        batches: held-out rows, see `LayerwiseModel`.
        dtype: compute dtype.
        progress: see `Progress`.

    Returns:
        Results in that order.

    Raises:
        UserError: a weight that cannot be read, or does not fit a format's type; names it.
    """
    config = base.config
    lora = LoRAConfig(adapter.config.rank, adapter.config.alpha, 0.0, tuple(adapter.config.target_modules))
    programs = Programs(config, dtype)
    contenders = [
        _Contender(BASE, LayerwiseModel(programs, batches), None, None),
        _Contender(BESIDE, LayerwiseModel(programs, batches, lora), None, adapter),
        *(_Contender(name, LayerwiseModel(programs, batches), codecs, None) for name, codecs in formats.items()),
    ]
    tied: list[MergedTensor] = []
    losses = {}
    for stage, tensors in _by_stage(base, merged_tensors(base, adapter, progress)):
        if stage == _EMBEDDING and config.tie_word_embeddings:
            tied = tensors
        for each in contenders:
            if stage == _EMBEDDING:
                each.model.embed(each.weights(tensors))
            elif stage < config.num_hidden_layers:
                each.model.layer(stage, each.weights(tensors))
            else:
                losses[each.name] = each.model.loss(each.weights([*tensors, *tied]))
        del tensors  # or they would be in memory beside the next
    return [Measured(each.name, kind, losses[each.name], each.shares) for each in contenders]


_EMBEDDING = -1


def _by_stage(base: BaseWeights, tensors: Iterator[MergedTensor]) -> Iterator[tuple[int, list[MergedTensor]]]:
    """Yield the tensors of `_EMBEDDING`, of each layer by its index, and of what follows the last, in that order."""

    def stage_of(spec: TensorSpec) -> int:
        if spec.layer is not None:
            return spec.layer
        return _EMBEDDING if spec.kind == "embedding" else base.config.num_hidden_layers

    missing = collections.Counter(stage_of(spec) for spec in base.specs)
    waiting: dict[int, list[MergedTensor]] = {}
    following = sorted(missing, reverse=True)
    for tensor in tensors:
        own = stage_of(tensor.spec)
        waiting.setdefault(own, []).append(tensor)
        missing[own] -= 1
        while following and not missing[following[-1]]:
            stage = following.pop()
            yield stage, waiting.pop(stage)


def compare(config: ComparisonConfig, progress: Progress | None = None) -> tuple[list[Measured], list[str]]:
    """Measure what a trained adapter's merges cost; nothing is written.

    Args:
        config: of which, and with which rows.
        progress: see `Progress`; once for each base.

    Returns:
        (models in the order of a table, notes for people: what was read, and what became of the rows).

    Raises:
        UserError: as `export`, and held-out rows that are not there or cannot be read.
    """
    trained = find_trained(config.adapter)
    model = resolve_model(config.model or base_name(trained))
    train = _evaluating(config, trained, str(model))
    storage = config.storage or storage_in_training(trained)
    bases = {kind: open_base(model, kind, storage) for kind in _bases(config, model, storage)}
    first = next(iter(bases.values()))
    adapter = open_adapter(trained.adapter, first.config, first.specs)
    warn_of_no_change(adapter.path, adapter.tensors)
    # Rows last: there may be many to read.
    batches, notes = load_evaluation(train, ensure_pad(load_tokenizer(model)))
    if not batches:
        raise UserError("`eval_dataset`: the run held no rows out; give a data set to measure with.")
    results = []
    for kind, base in bases.items():
        notes.append(f"{kind}: {base.description}")
        names, left_out = _formats(config, base)
        notes += [note for note in left_out if note not in notes]
        formats: dict[str, Codecs] = {name: _codecs(name, config, storage, base) for name in names}
        results += measure(base, kind, adapter, formats, batches, setup.compute_dtype(train), progress)
    for each in results:
        warn_of_erased(each.name, each.base, each.shares)
    return results, notes


def _formats(config: ComparisonConfig, base: BaseWeights) -> tuple[list[ExportTarget], list[str]]:
    """Return the formats to measure, and notes about those that cannot hold the model; one asked for is refused."""
    asked = USUAL if config.formats is None else config.formats
    if not any(name.startswith("gguf") for name in asked):
        return list(asked), []
    try:
        gguf_metadata(base)
    except UserError as error:
        if config.formats is not None:
            raise
        return [name for name in asked if not name.startswith("gguf")], [f"not as GGUF: {error}"]
    return list(asked), []


def _evaluating(config: ComparisonConfig, trained: Trained, model: str) -> TrainConfig:
    """Return the configuration of the run, with the held-out rows that are asked for."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    flags = dict(trained.flags)
    if unknown := sorted(flags.keys() - defaults.keys()):
        raise UserError(
            f"the run.json of {config.adapter} has {', '.join(unknown)}, which this version of qlora-jax does not "
            f"know; copy {trained.adapter} elsewhere, and give that with `eval_dataset`."
        )
    if config.eval_dataset is None and not (flags and flags.get("do_eval", defaults["do_eval"])):
        raise UserError(
            f"{config.adapter} does not say which rows were held out; give some to measure with as `eval_dataset`."
        )
    flags["model_name_or_path"] = model
    for name in ("max_eval_samples", "on_bad_row"):
        if getattr(config, name) is not None:
            flags[name] = getattr(config, name)
    if config.eval_dataset is not None:
        flags |= {
            "do_eval": True,
            "eval_dataset": config.eval_dataset,
            "eval_split": config.eval_split,
            "eval_dataset_size": None,
        }
    if config.dataset_format is not None:
        flags["dataset_format"] = config.dataset_format
    return TrainConfig(**flags)


def _bases(config: ComparisonConfig, model: Any, storage: BaseStorage) -> list[BaseKind]:
    """List the bases to merge into."""
    if config.base != "both":
        return [config.base]
    if is_converted(model):
        logger.info("%s holds no original weights: give the checkpoint it was made from as `model` to measure with "
                    "them too", model)  # fmt: skip
        return ["dequantized"]
    base = open_base(model, "dequantized", storage)
    linears = {spec.linear for spec in base.specs if spec.quantized}
    # Weights that training took as the checkpoint has them are their own originals.
    kept = {name for name in linears if storage.of(base.config).of(name).quant_type == "none"}
    kept |= {name for name, _ in base.config.stored} if storage.adopt else set()
    return ["dequantized"] if linears <= kept else ["dequantized", "original"]


def _codecs(name: ExportTarget, config: ComparisonConfig, storage: BaseStorage, base: BaseWeights) -> Codecs:
    if name.startswith("gguf"):
        return codecs(base.config, GGUF_FORMATS[name.removeprefix("gguf-").upper()])
    wanted = hugging_face_format(ExportConfig(config.adapter, "", to=name, dtype=config.dtype), storage, base)
    return functools.partial(hf_export.codec, storage=wanted)
