"""Several adapters on one base: stacked, so that every row of a batch has its own in one program."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from qlora_jax.nn.linear import LoRAConfig
from qlora_jax.nn.variables import RowAdapters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """Adapters of one model; values may be abstract.

    Attributes:
        matrices: adapters as the model declares them, every value [L, A, rows, columns].
        scalings: float32 [A], factor of each adapter's product.
    """

    matrices: nnx.State
    scalings: Any

    def of_rows(self, rows: Int[Array, " B"]) -> nnx.State:
        """Return the model's adapters where row b of a batch has adapter `rows[b]`."""

        def chosen(variable: Any) -> Any:
            matrices = variable.get_value()
            layers = len(matrices)  # a scan over layers takes one of each
            spread = (jnp.broadcast_to(each, (layers, *each.shape)) for each in (rows, self.scalings[rows]))
            return variable.replace(RowAdapters(matrices, *spread))

        return nnx.from_flat_state([(path, chosen(value)) for path, value in nnx.to_flat_state(self.matrices)])


def stack_config(adapters: Sequence[LoRAConfig]) -> LoRAConfig:
    """Return the adapters that a model must declare to hold each of some: the largest rank, on every linear of any."""
    modules = dict.fromkeys(name for each in adapters for name in each.modules)
    rank = max(each.rank for each in adapters)
    return LoRAConfig(rank, float(rank), 0.0, tuple(modules))


def empty_stack(declared: nnx.State, count: int, dtype: Any) -> AdapterStack:
    """Return a stack of adapters that change nothing.

    Args:
        declared: as for `stack_adapters`.
        count: A, how many.
        dtype: of the matrices.
    """
    matrices = [
        (path, variable.replace(jnp.zeros(_stacked_shape(variable.get_value(), count), dtype)))
        for path, variable in nnx.to_flat_state(declared)
    ]
    return AdapterStack(nnx.from_flat_state(matrices), jnp.zeros(count, jnp.float32))


def stack_adapters(
    declared: nnx.State,
    adapters: Sequence[tuple[LoRAConfig, Mapping[tuple[str, ...], np.ndarray]] | None],
    dtype: Any,
) -> AdapterStack:
    """Stack adapters.

    Args:
        declared: adapters of a model with `stack_config` of them all, abstract.
        adapters: each one's configuration and matrices {path: [L, R, in] or [L, out, R]}; None for no adapter at all.
        dtype: of the result.
    """

    def stacked(path: tuple[str, ...], abstract: Any) -> Array:
        values = np.zeros(_stacked_shape(abstract, len(adapters)), dtype)
        for i, adapter in enumerate(adapters):
            own = None if adapter is None else adapter[1].get(path)
            if own is not None:
                values[:, i, : own.shape[1], : own.shape[2]] = own
        return jnp.asarray(values)

    matrices = [
        (path, variable.replace(stacked(tuple(map(str, path)), variable.get_value())))
        for path, variable in nnx.to_flat_state(declared)
    ]
    scalings = jnp.asarray([0.0 if each is None else each[0].scaling for each in adapters], jnp.float32)
    return AdapterStack(nnx.from_flat_state(matrices), scalings)


def _stacked_shape(matrix: Any, count: int) -> tuple[int, ...]:
    layers, rows, columns = matrix.shape
    return layers, count, rows, columns
