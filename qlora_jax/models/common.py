"""Parts that every model family shares: the split into trained and frozen state, tensor tables, initialisation."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from qlora_jax.errors import UserError
from qlora_jax.models.family import LAYER, Name
from qlora_jax.nn.variables import Trainable

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One base tensor as a checkpoint stores it.

    Attributes:
        path: where it lives in the model, e.g. ("layers", "self_attn", "q_proj", "weight").
        layer: its index on the stacked leading axis of that path, or None if the path is not stacked.
        name: its name in a Hugging Face checkpoint.
        shape: its shape there; linears are [out, in].
        kind: linear | embedding | head | norm | bias.
    """

    path: Path
    layer: int | None
    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def linear(self) -> str:
        """Name of the module it belongs to, such as "q_proj"."""
        return self.path[-2]

    @property
    def quantized(self) -> bool:
        """True if a quantised model stores it in 4 or 8 bits: the linears, but neither embedding nor head."""
        return self.kind == "linear"


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, trained, frozen): `trained` holds every `Trainable` and nothing else, `frozen` all the rest."""
    graphdef, *states = nnx.split(model, Trainable, ...)
    trained, frozen = states
    return graphdef, trained, frozen


def flatten(state: nnx.State) -> dict[Path, Any]:
    """{path: value} of a state; a value is an array, a ShapeDtypeStruct or a QuantizedTensor."""
    return {tuple(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def unflatten_like(state: nnx.State, values: Mapping[Path, Any], *, what: str) -> nnx.State:
    """`state` with its (abstract) values replaced by `values`, checked leaf by leaf.

    Args:
        state: gives structure, shapes and dtypes.
        values: {path: value} for exactly the paths of `state`.
        what: what the values are, for error messages, e.g. "adapter".

    Raises:
        UserError: a path is missing or unknown, or a shape or dtype differs; names the tensor.
    """
    expected = flatten(state)
    for path in expected.keys() - values.keys():
        raise UserError(f"{what}: tensor {'.'.join(path)} is missing.")
    for path in values.keys() - expected.keys():
        raise UserError(f"{what}: tensor {'.'.join(path)} does not belong to this model.")

    def checked(path: Path, want: Any, got: Any) -> Any:
        want_tree: Any = jax.tree.structure(want)  # JAX declares no comparison of tree structures
        got_tree: Any = jax.tree.structure(got)
        if want_tree != got_tree:
            raise UserError(f"{what}: tensor {'.'.join(path)} is stored as {got_tree}, expected {want_tree}.")
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise UserError(
                    f"{what}: tensor {'.'.join(path)} is {b.dtype}{list(b.shape)}, expected {a.dtype}{list(a.shape)}."
                )
        return got

    flat = []
    for keys, variable in nnx.to_flat_state(state):
        path = tuple(map(str, keys))
        flat.append((keys, variable.replace(checked(path, expected[path], values[path]))))
    return nnx.from_flat_state(flat)


def fill_base(frozen: nnx.State, tensors: Mapping[Path, Any]) -> nnx.State:
    """The frozen state of a model, filled with loaded base tensors {path: array or QuantizedTensor}."""
    return unflatten_like(frozen, tensors, what="base model")


def initialize(trained: nnx.State, key: Array) -> nnx.State:
    """Fresh values of what trains, each by the initialiser that its variable declares.

    Each tensor's key is folded from its path: the same seed gives the same values whatever else the model holds.
    """
    values = {}
    for keys, variable in nnx.to_flat_state(trained):
        path, abstract = tuple(map(str, keys)), variable.get_value()
        own = jax.random.fold_in(key, zlib.crc32(".".join(path).encode()))
        values[path] = variable.get_metadata("initializer")(own, abstract.shape, abstract.dtype)
    return unflatten_like(trained, values, what="adapter")


def tensor_specs(frozen: nnx.State, names: Sequence[Name]) -> list[TensorSpec]:
    """Names and shapes of the base tensors as a checkpoint stores them, one per layer.

    Args:
        frozen: the abstract, unquantised state.
        names: the family's table.

    Returns:
        The embedding, the layers one by one, the rest.
    """
    by_module = {name.ours: name for name in names}
    top, stacked = [], []
    for keys, variable in nnx.to_flat_state(frozen):
        path, value, kind = tuple(map(str, keys)), variable.get_value(), variable.get_metadata("kind")
        name = f"{by_module['.'.join(path[:-1])].hf}.{path[-1]}"
        if LAYER in name:
            stacked.append((path, value, kind, name))
        else:
            top.append(TensorSpec(path, None, name, value.shape, kind))
    layers = [
        TensorSpec(path, layer, name.replace(LAYER, str(layer)), value.shape[1:], kind)
        for layer in range(max(value.shape[0] for _, value, _, _ in stacked))
        for path, value, kind, name in stacked
        if layer < value.shape[0]
    ]
    first = [spec for spec in top if spec.kind == "embedding"]
    return first + layers + [spec for spec in top if spec.kind != "embedding"]


def select_lora_modules(linears: Mapping[str, tuple[str, ...]], selection: str) -> tuple[str, ...]:
    """Resolve a `lora_modules` flag against a family's {group: names} table."""
    names = tuple(name for group in linears.values() for name in group)
    if selection == "all":
        return names
    if selection in linears:
        return linears[selection]
    chosen = tuple(part.strip() for part in selection.split(",") if part.strip())
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        choices = ", ".join(["all", *linears, *names])
        raise UserError(
            f"`lora_modules={selection}`: {unknown[0] if unknown else 'an empty list'!r} is not a linear "
            f"of this model; choose from {choices}."
        )
    return tuple(name for name in names if name in chosen)
