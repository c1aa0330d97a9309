"""Bytes by class: device memory in use while a compiled program runs, from XLA's own buffer assignment.

The classes of a `Phase` add up to `Program.peak` plus the residents that are no arguments of the program; nothing is
estimated but the `Allowance`, which no compiler knows.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from qlora_jax.device_memory import CONTEXT_BYTES, ProgramMemory, allowance_bytes
from qlora_jax.gpus import Chip
from qlora_jax.quantization import QuantizedTensor

TEMPORARIES, ALLOWANCE = "temporaries", "allowance"


@dataclasses.dataclass(frozen=True)
class Program(ProgramMemory):
    """Memory of one compiled program of a step.

    Attributes:
        name: for people.
        scopes: named scope -> bytes of its temporaries at the fullest moment of the heap, see `planner.scopes`.
    """

    name: str
    scopes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def checked(
        cls,
        name: str,
        compiled: jax.stages.Compiled,
        arguments: Any,
        scopes: Mapping[str, int] | None = None,
    ) -> "Program":
        """Read a compiled program's memory analysis and compare it with its abstract arguments.

        XLA keeps every argument in a buffer of exactly its size, and none for arguments that the program does not read.

        Raises:
            RuntimeError: the two differ, so that bytes by class would not add up to the program's.
        """
        memory = ProgramMemory.of(compiled)
        structure: Any
        leaves, structure = jax.tree.flatten(arguments)
        # An argument that is not read has None for a sharding.
        shardings = structure.flatten_up_to(compiled.input_shardings[0])
        read = [leaf for leaf, sharding in zip(leaves, shardings, strict=True) if sharding is not None]
        expected = tree_bytes(read)
        if expected != memory.arguments:
            raise RuntimeError(
                f"{name}: the compiler counts {memory.arguments} bytes of arguments, their shapes say {expected}"
            )
        return cls(**dataclasses.asdict(memory), name=name, scopes=scopes or {})


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program and the device memory in use while it runs.

    Attributes:
        program: the program.
        resident: class -> bytes in use before and after it, arguments of the program or not.
        results: class -> bytes of those results that have buffers of their own.
    """

    program: Program
    resident: Mapping[str, int]
    results: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def by_class(self) -> dict[str, int]:
        """Class -> device bytes; results that no class claims count as temporaries."""
        program = self.program
        rest = program.outputs - program.aliased - sum(self.results.values())
        classes = dict(self.resident)
        for name, count in (*self.results.items(), (TEMPORARIES, program.temporaries + program.code + rest)):
            classes[name] = classes.get(name, 0) + count
        return classes

    @property
    def device_bytes(self) -> int:
        """Device bytes of all classes."""
        return sum(self.by_class.values())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Phase":
        """Undo `dataclasses.asdict`."""
        return cls(Program(**value["program"]), value["resident"], value["results"])


@dataclasses.dataclass(frozen=True)
class Allowance:
    """Device memory that no compiler counts: a stated allowance, not a measurement.

    Attributes:
        context: `device_memory.CONTEXT_BYTES`.
        reserve: `device_memory.RESERVE_FRACTION` of the device's memory.
    """

    context: int
    reserve: int

    @classmethod
    def of(cls, chip: Chip) -> "Allowance":
        """Allowance on a GPU."""
        return cls(CONTEXT_BYTES, allowance_bytes(chip.memory_bytes) - CONTEXT_BYTES)

    @property
    def total(self) -> int:
        """Both together."""
        return self.context + self.reserve


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory that a training step takes of one GPU and its host.

    Attributes:
        chip: the GPU.
        phases: the programs of a step, which run one after the other.
        host: class -> bytes of pinned host memory.
        host_limit: host bytes that may be used; None for no limit.
    """

    chip: Chip
    phases: tuple[Phase, ...]
    host: Mapping[str, int]
    host_limit: int | None = None

    @property
    def allowance(self) -> Allowance:
        """Device memory set aside beside the programs."""
        return Allowance.of(self.chip)

    @property
    def fullest(self) -> Phase:
        """The phase that takes most of the device."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def by_class(self) -> dict[str, int]:
        """Class -> device bytes in the fullest phase, allowance included: they add up to `device_bytes`."""
        return {**self.fullest.by_class, ALLOWANCE: self.allowance.total}

    @property
    def device_bytes(self) -> int:
        """Device bytes in the fullest phase, allowance included."""
        return sum(self.by_class.values())

    @property
    def host_bytes(self) -> int:
        """Pinned host bytes."""
        return sum(self.host.values())

    @property
    def device_limit(self) -> int:
        """The device's memory."""
        return self.chip.memory_bytes

    @property
    def device_excess(self) -> int:
        """Bytes beyond the device's memory; negative if it holds the plan."""
        return self.device_bytes - self.device_limit

    @property
    def host_excess(self) -> int:
        """Bytes beyond the host's limit; negative if it holds the plan or has no limit."""
        return -self.device_limit if self.host_limit is None else self.host_bytes - self.host_limit

    @property
    def excess(self) -> int:
        """Bytes beyond the limit of the device or the host, whichever is exceeded by more; negative if it fits."""
        return max(self.device_excess, self.host_excess)

    @property
    def fits(self) -> bool:
        """True if the device, allowance included, and the host hold the plan."""
        return self.excess <= 0


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays, abstract or not."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class BaseBytes:
    """Bytes of a base model.

    Attributes:
        packed: codes of quantised weights.
        scales: their scales, minima, nested scales and offsets.
        unquantised: kind of tensor ("embedding", "norm", "head", ...) -> bytes; "linear" without quantisation.
    """

    packed: int
    scales: int
    unquantised: Mapping[str, int]

    @classmethod
    def of(cls, frozen: nnx.State) -> "BaseBytes":
        """Count the bytes of frozen variables, abstract or not."""
        packed = scales = 0
        unquantised: dict[str, int] = {}
        for _, variable in nnx.to_flat_state(frozen):
            value = variable.get_value()
            if isinstance(value, QuantizedTensor):
                codes = tree_bytes(value.codes)
                packed += codes
                scales += tree_bytes(value) - codes
            else:
                kind = variable.get_metadata("kind")
                unquantised[kind] = unquantised.get(kind, 0) + tree_bytes(value)
        return cls(packed, scales, unquantised)

    @property
    def linears(self) -> int:
        """Bytes of the weights that every pass over the layers reads."""
        return self.packed + self.scales + self.unquantised.get("linear", 0)

    @property
    def head(self) -> int:
        """Bytes of the output projection, which is the embedding where the two are tied."""
        return self.unquantised.get("head", self.unquantised["embedding"])

    @property
    def decoded(self) -> int:
        """Bytes that a step of generation reads, however many rows it has: all but an embedding that is no head."""
        return sum(self.by_class.values()) - self.looked_up

    @property
    def looked_up(self) -> int:
        """Bytes of an embedding of which a step of generation reads one row for each token; 0 where it is the head."""
        return self.unquantised["embedding"] if "head" in self.unquantised else 0

    @property
    def by_class(self) -> dict[str, int]:
        """Class -> bytes, without empty classes."""
        classes = {"base_packed": self.packed, "scales": self.scales}
        classes |= {f"unquantised_{kind}": count for kind, count in self.unquantised.items()}
        return {name: count for name, count in classes.items() if count}
