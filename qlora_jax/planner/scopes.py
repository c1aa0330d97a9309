"""Temporaries of a compiled program by `jax.named_scope`, from the text files that XLA's buffer assignment leaves.

The memory analysis of a program compiled ahead of time for a GPU has totals only. XLA writes the rest, every buffer's
offset and live range, into the directory of its `xla_dump_to` option.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

OTHER = "other"
"""Scope of buffers that belong to no named scope, and of what fragmentation of the heap leaves unused."""

# "allocation 227: size 181425912, page 0, preallocated-temp:"; one in another memory space than the device's says
# "color 5" before the page.
_HEAP = re.compile(r"^allocation \d+: size \d+, page 0, preallocated-temp:\n((?: value: .*\n)*)", re.MULTILINE)
# " value: <2092 loop_dynamic_slice_fusion.2{1} @0> (size=2359296,offset=79429632): bf16[2048,9,64]{2,1,0}"
_VALUE = re.compile(r"^ value: <\d+ ([^ {]+)(\{[\d,]*\})?(?: \(phi\))? @0> \(size=(\d+),offset=(\d+)\)", re.MULTILINE)
# "    wrapped_dynamic-update-slice{}:76-326"
_LIVE = re.compile(r"^    ([^ {]+)(\{[\d,]*\}):(\d+)-(\d+)$", re.MULTILINE)
# "  %name = bf16[8]{0} fusion(...), ..., metadata={op_name="jit(gradients)/jvp()/while/body/mlp/mul" ..."
_OPERATION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{op_name="([^"]*)"', re.MULTILINE)
# Parts of an operation's name that JAX and its transformations add.
_STRUCTURE = re.compile(
    r"while|body|cond|branch_\d+_fun|body_fun|closed_call|checkpoint|remat\d*|rematted_computation|core_call|eval_jaxpr"
    r"|custom_[jv][vj]p_call\w*|shard_map|pjit|scan|\w*_call|.*(?:->|<.*>).*"
)
_TRANSFORM = re.compile(r"^(?:jvp|transpose|vmap|checkpoint)\((.*)\)$")


@dataclasses.dataclass(frozen=True)
class _Buffer:
    """A slot of the heap: offset and size, and the values that it holds one after the other or under several names."""

    offset: int
    size: int


def scope_of(operation: str) -> str:
    """Named scopes of an operation, outermost first: "mlp/gate_proj" of "jit(f)/jvp(mlp)/while/body/gate_proj/dot"."""
    scopes: list[str] = []
    for part in _parts(operation)[:-1]:
        while (inner := _TRANSFORM.match(part)) is not None:
            part = inner[1]
        if part and not part.startswith("jit(") and not _STRUCTURE.fullmatch(part):
            scopes.extend(inner for inner in part.split("/") if inner)
    # A loop that is differentiated repeats the scopes around it.
    return "/".join(dict.fromkeys(scopes)) or OTHER


def _parts(operation: str) -> list[str]:
    """Split at slashes outside of parentheses."""
    parts, depth = [""], 0
    for character in operation:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "/" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def temporaries_by_scope(directory: Path, program: str) -> dict[str, int]:
    """Bytes of a program's device temporaries by named scope, at the fullest moment of its heap, largest first.

    Args:
        directory: where XLA wrote what it knows of the program, see `xla_dump_to`.
        program: its optimised HLO, as text.

    Returns:
        Scope -> bytes, without what fragmentation leaves unused; empty where XLA has written nothing of it.
    """
    assignment, ranges = (_text(directory, f"*-{name}.txt") for name in ("buffer-assignment", "live-range"))
    operations = dict(_OPERATION.findall(program))
    live = {name + index: (int(start), int(end)) for name, index, start, end in _LIVE.findall(ranges)}
    values: dict[_Buffer, list[tuple[int, int, str]]] = defaultdict(list)
    for name, index, size, offset in _values(assignment):
        if (known := live.get(name + index)) is not None:
            values[_Buffer(int(offset), int(size))].append((*known, name))
    moment = _fullest(values)
    found: dict[str, int] = defaultdict(int)
    for buffer, names in values.items():
        if any(start <= moment <= end for start, end, _ in names):
            found[_scope(names, operations, moment)] += buffer.size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _text(directory: Path, pattern: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(directory.glob(pattern)))


def _values(assignment: str) -> Iterator[tuple[str, str, str, str]]:
    """(name, index in a tuple, size, offset) of every value in the device's heap."""
    for heap in _HEAP.findall(assignment):
        for name, index, size, offset in _VALUE.findall(heap):
            yield name, index or "{}", size, offset


def _fullest(values: Mapping[_Buffer, list[tuple[int, int, str]]]) -> int:
    """The moment of the schedule at which most bytes of the heap are in use; values that share a slot count once."""
    changes: dict[int, int] = defaultdict(int)
    for buffer, names in values.items():
        end = -1
        for start, last, _ in sorted(names):
            if start > end:
                changes[start] += buffer.size
                changes[end + 1] -= buffer.size if end >= 0 else 0
            end = max(end, last)
        changes[end + 1] -= buffer.size
    moment = most = total = 0
    for time in sorted(changes):
        total += changes[time]
        if total > most:
            moment, most = time, total
    return moment


def _scope(names: list[tuple[int, int, str]], operations: Mapping[str, str], moment: int) -> str:
    """Scope of the value that a slot holds at a moment; loops hand it on under names that have no operation."""
    known = [(start, operations[name]) for start, _, name in names if name in operations and start <= moment]
    return scope_of(max(known)[1]) if known else OTHER
