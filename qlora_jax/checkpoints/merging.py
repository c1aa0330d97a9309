"""Merging of an adapter into its base: a stream of weights under Hugging Face names, one tensor at a time.

A merged linear is W + alpha / R * B A, summed in float32 and rounded once, to what the file keeps. A trained change is
far smaller than the weights it is added to, so that a coarse rounding may undo it: `stored` measures that.

Memory: one tensor of the base, and of an adapted linear at most five float32 arrays of its size (the base, the change,
their sum, and what the file keeps of the first and the last). Whatever the format, an export is tested to take less
than six float32 arrays of the largest tensor and 80 MiB above the export of a tiny model.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from qlora_jax.checkpoints.base_weights import BaseWeights
from qlora_jax.checkpoints.peft import AdapterConfig, load_adapter
from qlora_jax.checkpoints.streaming import Progress
from qlora_jax.errors import UserError
from qlora_jax.models import DecoderConfig, TensorSpec


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Attributes:
        path: its directory.
        tensors: {(*module, "lora_a"): float32 [L, R, in], (*module, "lora_b"): float32 [L, out, R]}.
        config: rank, alpha and where it came from.
    """

    path: Path
    tensors: Mapping[tuple[str, ...], np.ndarray]
    config: AdapterConfig

    @property
    def scaling(self) -> float:
        """Factor of the low-rank product."""
        return self.config.alpha / self.config.rank

    @property
    def modules(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the adapted linears, layers together."""
        return tuple(sorted({path[:-1] for path in self.tensors}))

    def pair(self, module: tuple[str, ...], layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return A [R, in] and B [out, R] of one layer."""
        return self.tensors[(*module, "lora_a")][layer], self.tensors[(*module, "lora_b")][layer]

    def change(self, spec: TensorSpec) -> np.ndarray | None:
        """Return the change of a base tensor, float32 [out, in]; None where the adapter has no matrices.

        Raises:
            UserError: it overflows.
        """
        if spec.layer is None or spec.path[-1] != "weight" or (*spec.path[:-1], "lora_a") not in self.tensors:
            return None
        a, b = self.pair(spec.path[:-1], spec.layer)
        with np.errstate(over="ignore", invalid="ignore"):
            change = (b * np.float32(self.scaling)) @ a
        if not np.isfinite(change).all():
            raise UserError(
                f"{self.path}: the change of {spec.name} overflows float32; its matrices are no trained adapter's: "
                f"save the adapter again, or give another."
            )
        return change


def open_adapter(directory: str | Path, model: DecoderConfig, specs: tuple[TensorSpec, ...]) -> Adapter:
    """Load an adapter and compare it with the base tensors it changes.

    Raises:
        UserError: as `load_adapter`, and an adapter of another number of layers or other shapes; names the linear.
    """
    tensors, config = load_adapter(directory, model)
    adapter = Adapter(Path(directory), tensors, config)
    for module in adapter.modules:
        layers = [spec for spec in specs if spec.path == (*module, "weight")]
        a, b = tensors[(*module, "lora_a")], tensors[(*module, "lora_b")]
        if len(layers) != len(a) or any(spec.shape != (b.shape[1], a.shape[2]) for spec in layers):
            has = f"{len(a)} layers of [{b.shape[1]}, {a.shape[2]}]"
            needs = f"{len(layers)} of {list(layers[0].shape)}" if layers else "none"
            raise UserError(
                f"{directory} adapts {has} of {'.'.join(module)}, but the base has {needs}; give the base it was "
                f"trained on as `model`."
            )
    return adapter


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """One weight of a merged model.

    Attributes:
        spec: its names, shape and kind.
        base: the base's weight; float32 of an adapted linear, else as the base has it.
        change: what the adapter adds, float32; None where it adds nothing.
    """

    spec: TensorSpec
    base: np.ndarray
    change: np.ndarray | None

    @property
    def value(self) -> np.ndarray:
        """The merged weight, float32 of an adapted linear."""
        return self.base if self.change is None else self.base + self.change


def merged_tensors(
    base: BaseWeights, adapter: Adapter, progress: Progress | None = None, start: int = 0
) -> Iterator[MergedTensor]:
    """Yield every base tensor from `base.specs[start]` on with what the adapter adds to it, in that order."""
    for done, (spec, weight) in enumerate(base.weights(start), start + 1):
        change = adapter.change(spec)
        yield MergedTensor(spec, weight if change is None else weight.astype(np.float32, copy=False), change)
        if progress is not None:
            progress(done, len(base.specs))


def surviving_share(change: np.ndarray, kept: np.ndarray, kept_base: np.ndarray) -> float | None:
    """Return the share of a change D that rounding Q lets through: <D, Q(W + D) - Q(W)> / <D, D>.

    It is the least-squares coefficient of the change that the rounded file makes on the one that was trained. 1: all of
    it, on average, whatever noise the rounding adds across it; 0: nothing in its direction is left, the file is the
    base. A little below 0 or above 1 is chance, where few weights cross a boundary of the rounding. Well above 1, the
    rounding overshoots: many weights of the base lie near such a boundary, as those of one 4-bit grid may on another.

    Args:
        change: D, of any shape.
        kept: Q(W + D).
        kept_base: Q(W).

    Returns:
        The share; None if D is zero.
    """
    size = float(np.vdot(change, change))
    return float(np.vdot(change, kept - kept_base)) / size if size else None


@dataclasses.dataclass(frozen=True)
class Codec[Stored]:
    """Storage of one tensor in a format.

    Attributes:
        store: what the format makes of a float array.
        load: float32 values of that.
    """

    store: Callable[[np.ndarray], Stored]
    load: Callable[[Stored], np.ndarray]


def stored[Stored](tensor: MergedTensor, codec: Codec[Stored], shares: dict[str, float]) -> Stored:
    """Store a merged weight, and note the share of its change that survives under its module's name.

    Args:
        tensor: the weight.
        codec: of the format.
        shares: module -> share, to be added to; a change of zero adds nothing.
    """
    result = codec.store(tensor.value)
    if tensor.change is not None:
        share = surviving_share(tensor.change, codec.load(result), codec.load(codec.store(tensor.base)))
        if share is not None:
            shares[tensor.spec.name.removesuffix(".weight")] = share
    return result
