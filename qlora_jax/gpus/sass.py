"""Registers, spills, shared memory and main-loop instructions of a compiled Pallas Mosaic GPU kernel.

`dumped_kernels` makes the compiler write PTX, ptxas' log and machine code (SASS) of the kernels it compiles;
`kernel_report` reads them. No GPU takes part and nothing is timed: cache misses, bank conflicts and the overlap of
instructions show on hardware only. Needs `nvdisasm` (pip install 'qlora-jax[plan]').

Everything is counted in the text of the program: a loop's body once, both sides of a branch, predicated instructions as
if they ran, per thread.
"""

import contextlib
import dataclasses
import importlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from qlora_jax.errors import UserError
from qlora_jax.extras import install_command

Kind = Literal["alu", "memory", "tensor", "control", "uniform"]

# The part of an opcode before the first dot.
_TENSOR = re.compile(r"\w*MMA")
_MEMORY = re.compile(
    r"LD|LDC|LDCU|LDG|LDGSTS|LDL|LDS|LDSM|LDTM|ST|STG|STL|STS|STSM|STTM|STAS|ATOM\w*|RED|REDG|REDAS|SHFL|MOVM|MATCH|S2R"
    r"|UTMA(?!CMDFLUSH)\w*|UBLK\w*|UTCCP|UTCSHIFT|ULDC|TEX|TLD|SULD|SUST"
)
_CONTROL = re.compile(
    r"BRA|BRX|BRXU|JMP|JMX|JMXU|EXIT|RET|CALL|BSSY|BSYNC|BREAK|BMOV|WARPSYNC|YIELD|KILL|BPT|NOP|NANOSLEEP|RTT|PREEXIT"
    r"|ACQBULK|BAR|B2R|R2B|DEPBAR|LDGDEPBAR|ARRIVES|SYNCS|WARPGROUP|WARPGROUPSET|MEMBAR|FENCE|ERRBAR|CCTL\w*|CGAERRBAR"
    r"|UCGABAR\w*|UTCBAR|UTCATOMSWS|UTMACMDFLUSH|USETMAXREG|ELECT|SETCTAID|UGETNEXTWORKID|USETSHMSZ"
)
_UNIFORM = re.compile(r"U\w+|R2UR|S2UR|VOTEU|REDUX|CREDUX|R2P2UR")

_INSTRUCTION = re.compile(r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET_LABEL = re.compile(r"`\((\.L_\w+)\)")
_LOAD = re.compile(r"LD|LDG|LDGSTS|LDS|LDSM|LDTM|UTMALDG|UBLKCP")

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REMARK = re.compile(r"^ptxas \w+\s*: (\(C\d+\).*)$", re.MULTILINE)
_CONSTANT = re.compile(r"\s*(%\w+) = arith\.constant (\d+) : (?:i32|index)")
_LAUNCH = re.compile(
    r"gpu\.launch .*threads\(.*\) in \(\S+ = (%\w+), \S+ = (%\w+), \S+ = (%\w+)\) dynamic_shared_memory_size (%\w+)"
)


def kind_of(opcode: str) -> Kind:
    """Return the part of the SM that an instruction keeps busy.

    Args:
        opcode: With or without its modifiers: "IMAD", "LDS.128".

    Returns:
        "tensor": multiplies matrices. "memory": loads, stores, asynchronous copies, atomics, shuffles. "control":
        branches, barriers, waits, fences. "uniform": the scalar unit that works once for a whole warp. "alu": the rest,
        that is everything issued to the integer and float pipes, conversions and special functions included (those run
        at a quarter of the others' rate or less).
    """
    base = opcode.partition(".")[0]
    if _TENSOR.fullmatch(base):
        return "tensor"
    if _MEMORY.fullmatch(base):
        return "memory"
    if _CONTROL.fullmatch(base):
        return "control"
    return "uniform" if _UNIFORM.fullmatch(base) else "alu"


@dataclasses.dataclass(frozen=True)
class Counts:
    """Instructions of a piece of a program by the part of the SM they keep busy (see `kind_of`), for one thread.

    `opcodes` maps each opcode without modifiers to its count; the five sums add up to all of them.
    """

    alu: int
    memory: int
    tensor: int
    control: int
    uniform: int
    opcodes: Mapping[str, int]

    def alu_per_weight(self, *, threads: int, weights: int) -> float:
        """Return the ALU instructions, counted per thread, for each weight.

        Args:
            threads: Threads that run this piece together: of all warps of the block that take part in it.
            weights: Weights that those threads dequantize in one pass of it.
        """
        return self.alu * threads / weights


@dataclasses.dataclass(frozen=True)
class Loop:
    """One pass through a loop.

    Attributes:
        label: Its first label in the SASS text.
        counts: Its instructions; loops inside it count once, but for those that only wait for a barrier, not at all.
        inner_loops: Loops inside it that count once though they may run more often.
    """

    label: str
    counts: Counts
    inner_loops: int


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """Resources and loops of one compiled kernel.

    Attributes:
        name: The kernel's name, "_mosaic_gpu_kernel" left out.
        arch: Target architecture, such as "sm_86".
        threads: Threads of a block.
        registers: Registers of a thread, as it starts.
        spill_stores: Bytes that a thread's registers spill to local memory.
        spill_loads: Bytes it reads back.
        shared_bytes: Shared memory of a block that the launch asks for: buffers and barriers.
        warnings: ptxas' numbered remarks, such as C7510 and C7511: wgmma instructions run one after the other.
        loops: Every loop but those that only wait for a barrier. Where some warps dequantize and others multiply,
            each has its own.
        main_loop: The loop whose tensor instructions are in no loop inside it (of several, the one with most); in a
            kernel without tensor instructions, the innermost loop with most loads. None without any loop.
        total: The whole program.
    """

    name: str
    arch: str
    threads: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    warnings: tuple[str, ...]
    loops: tuple[Loop, ...]
    main_loop: Loop | None
    total: Counts

    @property
    def serialized(self) -> bool:
        """True if ptxas says that it made wgmma instructions wait for one another."""
        return any("serialized" in warning for warning in self.warnings)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    opcode: str
    predicate: str | None
    target: str | None
    conditional: bool

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> Kind:
        # Placeholders that never run take an issue slot, no pipe.
        return "control" if self.predicate == "!PT" else kind_of(self.opcode)

    @property
    def jumps(self) -> bool:
        return self.target is not None and self.base not in ("BSSY", "CALL")

    @property
    def falls_through(self) -> bool:
        return self.conditional or self.base not in ("BRA", "BRX", "JMP", "EXIT", "RET")


@dataclasses.dataclass
class _Block:
    label: str
    instructions: list[_Instruction]
    successors: set[int] = dataclasses.field(default_factory=set)


def _basic_blocks(sass: str) -> list[_Block]:
    """Split a program into basic blocks, with the successors of each."""
    blocks = [_Block("entry", [])]
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            blocks.append(_Block(label[1], []))
        elif found := _INSTRUCTION.search(line):
            target = _TARGET_LABEL.search(line, found.end())
            # A branch may have its condition for an operand: BRA.DIV ~URZ, BRA.U UP0.
            operands = line[found.end() : target.start()] if target else ""
            instruction = _Instruction(
                found["opcode"],
                found["predicate"],
                target[1] if target else None,
                conditional=found["predicate"] is not None or bool(operands.strip()),
            )
            blocks[-1].instructions.append(instruction)
            if instruction.jumps or not instruction.falls_through:
                blocks.append(_Block(f"after {found['address']}", []))
    at = {block.label: index for index, block in enumerate(blocks)}
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if index + 1 < len(blocks) and (last is None or last.falls_through):
            block.successors.add(index + 1)
        if last is not None and last.jumps and last.target in at:
            block.successors.add(at[last.target])
    return blocks


def _natural_loops(blocks: Sequence[_Block]) -> dict[int, frozenset[int]]:
    """Return first block -> blocks of every natural loop.

    A backward jump alone makes no loop, for rarely run code is placed last and jumps back: its target must dominate it.
    """
    reached, waiting = {0}, [0]
    while waiting:
        new = blocks[waiting.pop()].successors - reached
        reached |= new
        waiting.extend(new)
    predecessors: dict[int, set[int]] = {index: set() for index in reached}
    for index in reached:
        for successor in blocks[index].successors:
            predecessors[successor].add(index)

    dominators = {index: reached for index in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for index in sorted(reached - {0}):
            new = {index} | set.intersection(*(dominators[before] for before in predecessors[index]))
            if new != dominators[index]:
                dominators[index], changed = new, True

    loops: dict[int, set[int]] = {}
    for index in reached:
        for head in blocks[index].successors & dominators[index]:
            body = loops.setdefault(head, {head})
            waiting = [index]
            while waiting:
                current = waiting.pop()
                if current not in body:
                    body.add(current)
                    waiting.extend(predecessors[current])
    return {head: frozenset(body) for head, body in sorted(loops.items())}


def _count(blocks: Iterable[_Block]) -> Counts:
    instructions = [instruction for block in blocks for instruction in block.instructions]
    kinds = Counter(instruction.kind for instruction in instructions)
    opcodes = Counter(instruction.base for instruction in instructions)
    return Counts(**{kind: kinds[kind] for kind in get_args(Kind)}, opcodes=dict(opcodes.most_common()))


def _loads(counts: Counts) -> int:
    return sum(count for opcode, count in counts.opcodes.items() if _LOAD.fullmatch(opcode))


def program_loops(sass: str) -> tuple[tuple[Loop, ...], Loop | None, Counts]:
    """Return every loop of a program in the order of the text, the main one (see `KernelReport`), and counts of all.

    Args:
        sass: What `nvdisasm` prints, with or without scheduling codes. Loops that only wait for a barrier are left out.
    """
    blocks = _basic_blocks(sass)
    bodies = _natural_loops(blocks)

    def waits(body: frozenset[int]) -> bool:
        counts = _count(blocks[index] for index in body)
        asks = counts.opcodes.keys() & {"SYNCS", "NANOSLEEP", "USETMAXREG"}
        return bool(asks) and not counts.tensor and not counts.memory

    working = {head: body for head, body in bodies.items() if not waits(body)}
    idle = {index for head, body in bodies.items() if head not in working for index in body}
    loops = {}
    for head, body in working.items():
        inner = [other for other in working if other in body and other != head]
        counts = _count(blocks[index] for index in sorted(body - idle))
        loops[head] = Loop(blocks[head].label, counts, len(inner))

    eligible = {head for head, loop in loops.items() if loop.counts.tensor} or set(loops)
    main = max(
        (loops[head] for head in sorted(eligible) if not working[head] & eligible - {head}),
        key=lambda loop: (loop.counts.tensor, _loads(loop.counts)),
        default=None,
    )
    return tuple(loops.values()), main, _count(blocks)


def _nvdisasm() -> Path:
    """Find NVIDIA's disassembler: a wheel's, or the one on the PATH."""
    with contextlib.suppress(ModuleNotFoundError):
        for root in importlib.import_module("nvidia").__path__:
            for found in Path(root).glob("*/bin/nvdisasm"):
                return found
    if on_path := shutil.which("nvdisasm"):
        return Path(on_path)
    raise UserError(f"Reading machine code needs NVIDIA's nvdisasm: {install_command('plan')}.")


@contextlib.contextmanager
def dumped_kernels(directory: Path) -> Iterator[None]:
    """Dump PTX, ptxas' log, SASS and every compiler pass of kernels compiled in this context into `directory`.

    Some MB for each kernel, named after the kernel with a number. A program that JAX has compiled before in this
    process is not compiled again and leaves nothing.

    Raises:
        UserError: `nvdisasm` is not installed.
    """
    # Sets MOSAIC_GPU_CUDA_ROOT, where the compiler looks for bin/nvdisasm, when it is imported.
    importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    directory.mkdir(parents=True, exist_ok=True)
    ours = {
        "MOSAIC_GPU_CUDA_ROOT": str(_nvdisasm().parents[1]),
        "MOSAIC_GPU_DUMP_TO": str(directory),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _launch(passes: Path) -> tuple[int, int]:
    """Return the threads of a block and its bytes of shared memory, from the program before the first pass."""
    constants = {}
    with passes.open(encoding="utf-8") as lines:
        for line in lines:
            if constant := _CONSTANT.match(line):
                constants[constant[1]] = int(constant[2])
            elif launch := _LAUNCH.search(line):
                x, y, z, shared = (constants[name] for name in launch.groups())
                return x * y * z, shared
    raise UserError(f"{passes} shows no kernel launch.")


def _report(ptxas: Path) -> KernelReport:
    passes, sass = ptxas.with_suffix(".mlir-passes.log"), ptxas.with_suffix(".sass_ctrl")
    for needed in (passes, sass):
        if not needed.exists():
            raise UserError(f"{needed} is missing: compile the kernel again within dumped_kernels().")
    log, text = ptxas.read_text(encoding="utf-8"), sass.read_text(encoding="utf-8")
    used, spills, entry = _REGISTERS.search(log), _SPILLS.search(log), _ENTRY.search(log)
    if not (used and spills and entry):
        raise UserError(f"{ptxas} is not what ptxas prints about a kernel.")
    threads, shared_bytes = _launch(passes)
    loops, main_loop, total = program_loops(text)
    return KernelReport(
        name=entry[1].removesuffix("_mosaic_gpu_kernel"),
        arch=entry[2],
        threads=threads,
        registers=int(used[1]),
        spill_stores=int(spills[1]),
        spill_loads=int(spills[2]),
        shared_bytes=shared_bytes,
        warnings=tuple(_REMARK.findall(log)),
        loops=loops,
        main_loop=main_loop,
        total=total,
    )


def kernel_reports(directory: Path) -> list[KernelReport]:
    """Return reports of all kernels in a directory that `dumped_kernels` filled, in the order of compilation.

    Raises:
        UserError: A file is missing or is not what the compiler writes.
    """
    return [_report(path) for path in sorted(directory.glob("*.ptxas"), key=lambda path: path.stat().st_mtime_ns)]


def kernel_report(directory: Path) -> KernelReport:
    """Return the report of the only kernel in a directory that `dumped_kernels` filled.

    Raises:
        UserError: There is none or more than one, or a file is missing or is not what the compiler writes.
    """
    reports = kernel_reports(directory)
    if len(reports) != 1:
        names = ", ".join(report.name for report in reports) or "none"
        raise UserError(f"{directory} should hold one kernel's dump and holds {len(reports)}: {names}.")
    return reports[0]
