"""The kernels' emitted PTX, executed on the CPU, and numpy references that sum in the kernels' own order.

`compile_all` compiles many kernels in one child process and hands back how they are launched, `execute` runs one, and
`expected` says, bit for bit, what must come out.
"""

import dataclasses
import functools
import importlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gpu_child
import ml_dtypes
import numpy as np
from ptx import MosaicLaunch, mosaic_args

from qlora_jax.kernels.mosaic import tiles
from qlora_jax.quantization.codebooks import NESTED_BLOCK_SIZE, TABLES, dynamic_map

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel.

    Attributes:
        chip: name of the GPU it is compiled for.
        kernel: module of qlora_jax.kernels.mosaic.
        m: rows of x; 0 for "dequantize".
        n, k: of the weight.
        transposed: the product of the backward pass.
        quant_type, dtype, block_size, double_quant: what the kernel is specialised for.
        layers: of the stack the weight lies in; the last but one is used.
        config: (name, value) pairs for the module's Config, if it has one; empty for what `launch` would choose or,
            where it would choose another kernel, the module's defaults.
    """

    chip: str
    kernel: str
    m: int
    n: int
    k: int
    transposed: bool = False
    quant_type: str = "nf4"
    dtype: str = "bfloat16"
    block_size: int = 64
    double_quant: bool = True
    layers: int = 1
    config: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in (self.m, self.n, self.k) if size)
        direction = "t" if self.transposed else ""
        options = [self.quant_type, self.dtype[0] + "16", f"b{self.block_size}", "dq" if self.double_quant else "f32"]
        stack = [f"l{self.layers}"] if self.layers > 1 else []
        tiles = [f"{name}={value}" for name, value in self.config]
        return "-".join([self.chip, self.kernel + direction, shape, *options, *stack, *tiles])

    @property
    def layer(self) -> int:
        """The layer used."""
        return max(0, self.layers - 2)


def config_of(case: Case) -> Any:
    """The Config that a case's kernel is compiled with, None if its module has none."""
    from qlora_jax.gpus import CHIPS
    from qlora_jax.kernels.mosaic import launch

    module = importlib.import_module(f"qlora_jax.kernels.mosaic.{case.kernel}")
    if not hasattr(module, "Config"):
        return None
    if not case.config:
        chip, shape = CHIPS[case.chip], (case.n, case.k)
        plan = launch.plan(chip, case.m, shape, transposed=case.transposed)
        if plan.kernel == case.kernel:
            return plan.config
        if case.kernel == "mma":
            return launch.mma_config(chip, case.m, case.transposed and case.k % 128 != 0)
    return module.Config(**dict(case.config))


# ------------------------------------------------------------------------------------------------- compilation


def _compiled(case: Case) -> dict[str, Any]:
    import jax

    from qlora_jax.gpus import CHIPS, compile_for
    from qlora_jax.gpus.sass import dumped_kernels
    from qlora_jax.kernels.mosaic.operands import Operands

    module = importlib.import_module(f"qlora_jax.kernels.mosaic.{case.kernel}")
    config = config_of(case)

    def function(layer: Any, codes: Any, *rest: Any) -> Any:
        *scales, x = rest
        w = Operands(codes, tuple(scales), layer, case.quant_type, case.block_size, case.n)
        if case.kernel == "dequantize":
            return module.dequantize(w, case.dtype)
        if config is None:
            return module.matmul(x, w)
        return module.matmul(x, w, config=config, transposed=case.transposed)

    problem = Problem(case)
    arguments = (problem.layer, problem.codes, *problem.scales, problem.padded_x())
    with tempfile.TemporaryDirectory() as directory:
        with dumped_kernels(Path(directory)):
            compile_for(CHIPS[case.chip], function, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments))
        return dataclasses.asdict(mosaic_args(directory))


def compile_here(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A launch or {"error": traceback} for each case, all of one architecture; runs in a child."""
    done = []
    for fields in cases:
        case = Case(**{**fields, "config": tuple((name, value) for name, value in fields["config"])})
        print(f"compiling {case}", file=sys.stderr, flush=True)  # the last line if the compiler aborts
        try:
            done.append(_compiled(case))
        except Exception:
            done.append({"error": traceback.format_exc()})
    return done


def compile_all(cases: Iterable[Case]) -> dict[Case, MosaicLaunch | str]:
    """The launch of every case, or why it does not compile; one child process for each chip."""
    by_chip: dict[str, list[Case]] = {}
    for case in dict.fromkeys(cases):
        by_chip.setdefault(case.chip, []).append(case)
    out: dict[Case, MosaicLaunch | str] = {}
    for group in by_chip.values():
        described = [dataclasses.asdict(case) for case in group]
        for case, done in zip(group, gpu_child.call("ptx_kernels:compile_here", described, timeout=1800), strict=True):
            out[case] = done["error"] if "error" in done else MosaicLaunch(**done)
    return out


# --------------------------------------------------------------------------------------------- data and references


class Problem:
    """Random operands of a case. Tests may replace them before anything is computed."""

    def __init__(self, case: Case, seed: int = 0):
        self.case = case
        random = np.random.default_rng(seed)
        blocks = -(-case.n * case.k // case.block_size)
        self.layer = np.array([case.layer], np.int32)
        self.x = random.standard_normal((case.m, case.n if case.transposed else case.k)).astype(DTYPES[case.dtype])
        self.codes = random.integers(0, 256, (case.layers, case.n, case.k // 2), np.uint8)
        self.scales: tuple[np.ndarray, ...]
        if case.double_quant:
            nested = (case.layers, -(-blocks // NESTED_BLOCK_SIZE))
            self.scales = (
                random.integers(0, 256, (case.layers, blocks), np.uint8),
                random.uniform(0.5, 1.5, nested).astype(np.float32),
                random.uniform(0.0, 0.1, case.layers).astype(np.float32),
                dynamic_map(),
            )
        else:
            self.scales = (random.uniform(-1.5, 1.5, (case.layers, blocks)).astype(np.float32),)

    def padded_x(self) -> np.ndarray:
        """x as the kernel takes it: see `operands.pad_contraction`."""
        config = config_of(self.case)
        rest = self.case.n % config.block_k if self.case.transposed else 0
        if not rest:
            return self.x
        zeros = np.zeros((self.case.m, config.block_k - rest), self.x.dtype)
        return np.concatenate([self.x[:, :-rest], zeros, self.x[:, -rest:]], axis=1)

    @functools.cached_property
    def weight(self) -> np.ndarray:
        """The decoded weight [N, K] in 16 bits: one rounding of the float32 product."""
        case, layer = self.case, self.case.layer
        scales = self.scales[0][layer]
        if case.double_quant:
            _, nested, offset, table = self.scales
            scales = table[scales] * np.repeat(nested[layer], NESTED_BLOCK_SIZE)[: scales.size] + offset[layer]
        packed = self.codes[layer].reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
        with np.errstate(over="ignore"):
            values = TABLES[case.quant_type][codes] * np.repeat(scales, case.block_size)[: codes.size]
            values = values.astype(DTYPES[case.dtype])
        return values.reshape(case.n, case.k)

    def contracted(self) -> tuple[np.ndarray, np.ndarray]:
        """(x [M, C], w [N or K, C]), float64, the columns in the order in which a tiled kernel takes them in."""
        w = self.weight.T if self.case.transposed else self.weight
        x = self.padded_x()
        config = config_of(self.case)
        if self.case.transposed:
            starts = [min(s, self.case.n - config.block_k) for s in range(0, self.case.n, config.block_k)]
            w = np.concatenate([w[:, s : s + config.block_k] for s in starts], axis=1)
        return x.astype(np.float64), w.astype(np.float64)


def _tensor_core_sum(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ w.T as tensor cores are taken to sum it: sixteen exact products and the float32 accumulator, rounded once."""
    acc = np.zeros((len(x), len(w)), np.float32)
    for k in range(0, x.shape[1], 16):
        acc = (x[:, k : k + 16] @ w[:, k : k + 16].T + acc).astype(np.float32)
    return acc


def _streamed_sum(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ w.T as streaming.py sums it.

    Warp v of four has columns 256 v .. 256 v + 255 of every 1024. One instruction takes four columns of each of the
    four runs of 64 in them. The warps' sums are added in their order.
    """
    k = x.shape[1]
    columns = np.arange(-(-k // 1024) * 1024).reshape(-1, 4, 4, 16, 4)  # step, warp, run, instruction, element
    order = columns.transpose(1, 0, 3, 2, 4).reshape(4, -1)
    total = None
    for of_warp in order:
        of_warp = of_warp.reshape(-1, 16)
        acc = np.zeros((len(x), len(w)), np.float32)
        for taken in of_warp:
            taken = taken[taken < k]
            acc = (x[:, taken] @ w[:, taken].T + acc).astype(np.float32)
        total = acc if total is None else total + acc
    return total


def expected(problem: Problem, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
    """The output, or some rows and columns of it, in 16 bits."""
    case = problem.case
    if case.kernel == "dequantize":
        return problem.weight[rows, columns]
    if case.kernel == "streaming":
        x, w = problem.x.astype(np.float64), problem.weight.astype(np.float64)
        return _streamed_sum(x[rows], w[columns]).astype(DTYPES[case.dtype])
    x, w = problem.contracted()
    return _tensor_core_sum(x[rows], w[columns]).astype(DTYPES[case.dtype])


# --------------------------------------------------------------------------------------------------- execution


def output_shape(case: Case) -> tuple[int, int]:
    if case.kernel == "dequantize":
        return case.n, case.k
    return case.m, case.k if case.transposed else case.n


def execute(
    launch: MosaicLaunch,
    problem: Problem,
    *,
    mutate: Callable[[str], str] = lambda text: text,
    **options: Any,
) -> np.ndarray:
    """The output of a kernel, NaN where nothing was written. `options` of `ptx.run`."""
    case = problem.case
    out = np.full(output_shape(case), np.nan, DTYPES[case.dtype])
    inputs = [problem.codes, *problem.scales, problem.layer]
    if case.kernel != "dequantize":
        inputs.insert(0, problem.padded_x())
    for array in inputs:
        array.flags.writeable = False
    options = {"warps_per_bundle": 4, **options}
    dataclasses.replace(launch, ptx=mutate(launch.ptx)).run([*inputs, out], **options)
    return out


def differences(found: np.ndarray, wanted: np.ndarray) -> int:
    """Elements that differ in any bit."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    return int((np.ascontiguousarray(found).view(np.uint16) != np.ascontiguousarray(wanted).view(np.uint16)).sum())


def owned(case: Case, cta: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of the output that a CTA writes: blocks that would reach over the edge are moved back."""

    def block(index: int, size: int, total: int) -> slice:
        start = min(index * size, total - size)
        return slice(start, start + size)

    if case.kernel == "streaming":
        return slice(None), block(cta[0], 16, case.n)
    if case.kernel == "dequantize":
        rows, columns = (64, 128) if case.k % 128 == 0 else (128, 64)
        return block(cta[1], rows, case.n), block(cta[0], min(4 * columns, case.k), case.k)
    config = config_of(case)
    m, n = output_shape(case)
    band = importlib.import_module(f"qlora_jax.kernels.mosaic.{case.kernel}")._BAND
    row, column = tiles.place(cta[0], -(-m // config.block_m), -(-n // config.block_n), band=band)
    return block(int(row), config.block_m, m), block(int(column), config.block_n, n)
