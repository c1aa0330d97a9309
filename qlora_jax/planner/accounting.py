"""Bytes by class: what lies on the device while a compiled program runs, from XLA's own buffer assignment.

The parts of a `Phase` add up to `Program.peak` plus what the program does not take as an argument; nothing is estimated
but the `Allowance`, which no compiler knows.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from qlora_jax.device_memory import CONTEXT_BYTES, allowance_bytes
from qlora_jax.gpus import Chip
from qlora_jax.quantization import QuantizedTensor

TEMPORARIES, ALLOWANCE = "temporaries", "allowance"


@dataclasses.dataclass(frozen=True)
class Program:
    """What XLA's buffer assignment says of one compiled program, in bytes on one device.

    Attributes:
        name: for people.
        arguments: buffers of the arguments that the program reads.
        outputs: buffers of its results.
        aliased: of those, that are arguments written over (donated).
        temporaries: its heap at the fullest moment.
        code: what it keeps loaded.
        host_temporaries: in pinned host memory, for what is offloaded while it runs.
    """

    name: str
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    host_temporaries: int

    @classmethod
    def of(cls, name: str, compiled: jax.stages.Compiled, arguments: Any) -> "Program":
        """Read a compiled program's memory analysis, and hold it against the abstract arguments it was compiled for.

        XLA keeps every argument in a buffer of exactly its size, and none for those the program does not read.

        Raises:
            RuntimeError: the two differ, so that bytes by class would not add up to what the program takes.
        """
        memory: Any = compiled.memory_analysis()
        structure: Any
        leaves, structure = jax.tree.flatten(arguments)
        # An argument that is not read has None for a sharding.
        shardings = structure.flatten_up_to(compiled.input_shardings[0])
        read = [leaf for leaf, sharding in zip(leaves, shardings, strict=True) if sharding is not None]
        expected = tree_bytes(read)
        if expected != memory.argument_size_in_bytes:
            raise RuntimeError(
                f"{name}: the compiler counts {memory.argument_size_in_bytes} bytes of arguments, their shapes say "
                f"{expected}"
            )
        return cls(
            name,
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            host_temporaries=memory.host_temp_size_in_bytes,
        )

    @property
    def peak(self) -> int:
        """Device bytes while it runs: arguments, results that are not written over them, heap and code."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program, and what lies on the device while it runs.

    Attributes:
        program: what runs.
        resident: class -> bytes that are there before and after, arguments of the program or not.
        results: class -> bytes of those of its results that have buffers of their own.
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
        """All of it."""
        return sum(self.by_class.values())

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Phase":
        """What `dataclasses.asdict` made of a phase."""
        return cls(Program(**value["program"]), value["resident"], value["results"])


@dataclasses.dataclass(frozen=True)
class Allowance:
    """Device memory that no compiler counts: a stated allowance, not a measurement.

    context: `device_memory.CONTEXT_BYTES`; reserve: `device_memory.RESERVE_FRACTION` of the device's memory.
    """

    context: int
    reserve: int

    @classmethod
    def of(cls, chip: Chip) -> "Allowance":
        """The allowance on a GPU."""
        return cls(CONTEXT_BYTES, allowance_bytes(chip.memory_bytes) - CONTEXT_BYTES)

    @property
    def total(self) -> int:
        """Both."""
        return self.context + self.reserve


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step takes of one GPU and its host.

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
        """What is set aside on the device beside the programs."""
        return Allowance.of(self.chip)

    @property
    def fullest(self) -> Phase:
        """The phase with most on the device."""
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
    def excess(self) -> int:
        """Bytes beyond the limit of the device or the host, whichever is exceeded by more; negative if it fits."""
        over_host = -self.device_limit if self.host_limit is None else self.host_bytes - self.host_limit
        return max(self.device_bytes - self.device_limit, over_host)

    @property
    def fits(self) -> bool:
        """Whether the device, allowance included, and the host hold it."""
        return self.excess <= 0


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays, abstract or not."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def base_bytes(frozen: nnx.State) -> dict[str, int]:
    """Bytes of a base model by class: base_packed, scales, and unquantised_* by the kind of tensor."""
    classes: dict[str, int] = {}

    def add(name: str, tree: Any) -> None:
        classes[name] = classes.get(name, 0) + tree_bytes(tree)

    for _, variable in nnx.to_flat_state(frozen):
        value = variable.get_value()
        if isinstance(value, QuantizedTensor):
            add("base_packed", value.codes)
            add("scales", (value.absmax, value.nested_absmax, value.offset))
        else:
            add(f"unquantised_{variable.get_metadata('kind')}", value)
    return classes
