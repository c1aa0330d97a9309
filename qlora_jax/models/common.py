"""What every model family shares: the split into trainable and frozen state, tensor tables, adapter initialisation."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from qlora_jax import kernels
from qlora_jax.errors import UserError
from qlora_jax.nn.linear import LoRAParam
from qlora_jax.quantization import QuantizedTensor

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
    def quantized(self) -> bool:
        """Whether a quantised model stores it in 4 or 8 bits: the linears, but neither embedding nor head."""
        return self.kind == "linear"


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, lora, frozen): `lora` holds every LoRAParam and nothing else, `frozen` all the rest."""
    graphdef, *states = nnx.split(model, LoRAParam, ...)
    lora, frozen = states
    return graphdef, lora, frozen


def flatten(state: nnx.State) -> dict[Path, Any]:
    """{path: value} of a state; a value is an array, a ShapeDtypeStruct or a QuantizedTensor."""
    return {tuple(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def split_stacks(layers: nnx.State) -> tuple[nnx.State, nnx.State]:
    """(quantised weights, all the rest) of a state with leading layer axes.

    A scan over layers slices the rest but only indexes the weights (`layer_of`): they are too large to be copied.
    """

    def quantized(path: Any, variable: nnx.Variable) -> bool:
        return isinstance(variable.get_value(), QuantizedTensor)

    stacks, rest = nnx.split_state(layers, quantized, ...)
    return stacks, rest


def layer_of(stacks: nnx.State, layer: Array) -> nnx.State:
    """The quantised weights of one layer, still inside their stacks."""
    flat = nnx.to_flat_state(stacks)
    return nnx.from_flat_state(
        [(path, variable.replace(kernels.StackedWeight(variable.get_value(), layer))) for path, variable in flat]
    )


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


def init_lora(lora: nnx.State, key: Array) -> nnx.State:
    """Fresh adapters, as PEFT initialises them: A Kaiming-uniform with a = sqrt(5), B zero.

    That bound is sqrt(6 / ((1 + 5) fan_in)) = 1 / sqrt(in), so W is unchanged at the start. Each tensor's key is folded
    from its position in the sorted paths: the same seed gives the same adapters whatever else the model holds.
    """
    values = {}
    for i, (path, abstract) in enumerate(sorted(flatten(lora).items())):
        if path[-1] == "lora_a":
            bound = 1 / math.sqrt(abstract.shape[-1])
            values[path] = jax.random.uniform(
                jax.random.fold_in(key, i), abstract.shape, abstract.dtype, minval=-bound, maxval=bound
            )
        else:
            values[path] = jnp.zeros(abstract.shape, abstract.dtype)
    return unflatten_like(lora, values, what="adapter")


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
            f"--lora_modules {selection!r}: {unknown[0] if unknown else 'an empty list'!r} is not a linear "
            f"of this model; choose from {choices}."
        )
    return tuple(name for name in names if name in chosen)
