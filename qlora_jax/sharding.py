"""Logical axes of tensors -> axes of a mesh of devices: one declaration yields shapes, dtypes and shardings.

Every frozen or trained variable names its logical axes (`qlora_jax.nn.variables`); `ShardingRules` say over which mesh
axis each is cut. Placing, planning, restoring and the step read the same rules. A weight that is cut is gathered where
a layer takes it (`qlora_jax.nn.stack`), as packed bytes: a row-major weight's rows are contiguous in its codes, so that
a cut through the bytes is a cut through the rows.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.quantization import QuantizedTensor

LOGICAL_AXES = frozenset(("layers", "rows", "rank", "vocabulary", None))
"""Names that a variable may give its axes."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axis of each logical axis; None for whole on every device.

    Attributes:
        batch: rows of a batch; results are added up over it.
        rows: rows (outputs) of quantised linear weights.
        vocabulary: rows of embedding and head.
    """

    batch: str = "data"
    rows: str | None = None
    vocabulary: str | None = None

    def mesh_axis(self, logical: str | None) -> str | None:
        """Mesh axis of a logical one; those without a rule are whole everywhere."""
        if logical not in LOGICAL_AXES:
            raise ValueError(f"{logical!r} is no logical axis; those are {sorted(map(str, LOGICAL_AXES))}.")
        return {"rows": self.rows, "vocabulary": self.vocabulary}.get(logical or "")

    def batch_spec(self, dims: int = 2) -> PartitionSpec:
        """Of a batch's arrays: the second of three axes [A, B, S], or the first of two [B, S]."""
        return PartitionSpec(*(None,) * (dims - 2), self.batch)


REPLICATED = ShardingRules()
"""Sequences are split over the devices; weights and adapters are whole on each."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh of devices, and how tensors are cut over it.

    Attributes:
        mesh: the devices.
        rules: mesh axis of each logical axis.
    """

    mesh: jax.sharding.Mesh
    rules: ShardingRules = REPLICATED

    def batch_sharding(self, dims: int = 2) -> NamedSharding:
        """Of a batch's arrays, see `ShardingRules.batch_spec`."""
        return NamedSharding(self.mesh, self.rules.batch_spec(dims))

    @property
    def whole(self) -> NamedSharding:
        """Of an array that is whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, state: nnx.State) -> nnx.State:
        """`state` with a NamedSharding in place of every array."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs(state, self.rules))

    def place(self, state: nnx.State) -> nnx.State:
        """The arrays of `state` on the devices."""
        return jax.device_put(state, self.shardings(state))


def specs(state: nnx.State, rules: ShardingRules) -> nnx.State:
    """`state` with a PartitionSpec in place of every array, by the axes its variables declare."""
    flat = []
    for path, variable in nnx.to_flat_state(state):
        axes = [rules.mesh_axis(axis) for axis in variable.get_metadata("axes")]
        flat.append((path, variable.replace(_specs_of(variable.get_value(), axes))))
    return nnx.from_flat_state(flat)


def _specs_of(value: Any, axes: list[str | None]) -> Any:
    if not isinstance(value, QuantizedTensor):
        return jax.tree.map(lambda leaf: _spec(axes), value)
    # Codes, scales and minima are cut as rows are; scales of scales run across rows and are small.
    cut, whole = _spec(axes[: len(value.stack_shape) + 1]), PartitionSpec()
    return dataclasses.replace(
        value,
        codes=cut,
        absmax=cut,
        nested_absmax=None if value.nested_absmax is None else whole,
        offset=None if value.offset is None else whole,
        minimum=None if value.minimum is None else cut,
        scale_map=None if value.scale_map is None else whole,
    )


def _spec(axes: list[str | None]) -> PartitionSpec:
    """PartitionSpec without the axes behind the last one that is cut: it then fits arrays of fewer dimensions too."""
    cut = [i for i, axis in enumerate(axes) if axis is not None]
    return PartitionSpec(*axes[: cut[-1] + 1]) if cut else PartitionSpec()


def gathered(weight: QuantizedTensor, mesh_axis: str | None) -> QuantizedTensor:
    """One whole weight from this device's rows of it; itself where it is whole already.

    Packed bytes travel, and nothing is decoded.
    """
    n = weight.n_elements
    whole = weight.shape[0] if weight.quant_type == "int8" else n if weight.format.bits == 8 else -(-n // 2)
    if mesh_axis is None or weight.codes.shape[0] == whole:
        return weight
    cut = {name: getattr(weight, name) for name in ("codes", "absmax", "minimum")}
    return dataclasses.replace(
        weight,
        **{name: jax.lax.all_gather(x, mesh_axis, tiled=True) for name, x in cut.items() if x is not None},
    )
