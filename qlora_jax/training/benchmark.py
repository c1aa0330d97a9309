"""What `scripts/benchmark.py` prints: the training step timed on random data, and tables of the 4-bit products."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax import models
from qlora_jax.device_memory import device_limit
from qlora_jax.gpus import CHIPS
from qlora_jax.kernels import roofline
from qlora_jax.kernels.static import Row
from qlora_jax.kernels.timing import IMPLEMENTATIONS, Measurement
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.nn.remat import Remat
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.config import StepConfig, TrainConfig
from qlora_jax.training.schedule import make_optimizer
from qlora_jax.training.step import TrainState, make_train_step

_LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model's shapes and the batch [B, S] it is timed on."""

    config: Mapping[str, Any]
    batch: int
    sequence: int


WORKLOADS = {
    "small": Workload(
        {
            **_LLAMA,
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
        },
        batch=1,
        sequence=256,
    ),
    "smollm2": Workload(
        {
            **_LLAMA,
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        batch=4,
        sequence=256,
    ),
}


def random_base(frozen: nnx.State, seed: int = 0) -> nnx.State:
    """Fill an abstract frozen state with random codes, scales and small weights: the time does not depend on them.

    Integer leaves are uniform over their range; float leaves are normal with standard deviation 0.02.
    """
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            info = jnp.iinfo(leaf.dtype)
            return jnp.asarray(rng.integers(info.min, info.max, leaf.shape, leaf.dtype, endpoint=True))
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    return jax.tree.map(fill, frozen)


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """Seconds of the timed steps, the compilation before them, and tokens a step."""

    seconds: tuple[float, ...]
    compile_seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second in the median step."""
        return self.tokens / float(np.median(self.seconds))


def time_step(
    workload: Workload,
    *,
    quantization: QuantizationConfig,
    dtype: Any = jnp.float32,
    rank: int = 16,
    remat: Remat = "none",
    kernel: str = "auto",
    steps: int = 10,
    warmup: int = 2,
) -> StepTiming:
    """Time the step that training runs: forward, backward, clipping, AdamW; every token trained, all linears adapted.

    Args:
        workload: shapes.
        quantization: of the linear weights.
        dtype: compute dtype.
        rank: of the adapters.
        remat: what of a layer is kept for the backward pass, see `qlora_jax.nn.remat`.
        kernel: implementation of the 4-bit ops.
        steps: timed steps, after one that compiles and `warmup` more.
        warmup: steps run before the timed ones.
    """
    config = workload.config
    lora_config = LoRAConfig(rank, float(rank), 0.0, models.lora_modules(config, "all"))
    precision = QLoRAConfig(quantization, dtype, lora_config, kernel)
    graphdef, lora, frozen = models.split_model(models.abstract_model(config, precision))
    frozen = random_base(frozen)
    defaults = TrainConfig()
    optimizer = make_optimizer(defaults, steps, lora, dtype=dtype, limit=device_limit(jax.devices()[0]))
    state = TrainState.create(models.init_lora(lora, jax.random.key(0)), optimizer)
    step_config = StepConfig(remat=remat, max_grad_norm=defaults.max_grad_norm)
    train_step = make_train_step(graphdef, optimizer, step_config)
    shape = (1, workload.batch, workload.sequence)
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], shape, np.int32)
    positions = jnp.broadcast_to(jnp.arange(workload.sequence, dtype=jnp.int32), shape)
    batch = {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(ids), "positions": positions}
    seconds = []
    for _ in range(1 + warmup + steps):
        start = time.perf_counter()
        state, report = train_step(state, frozen, batch)
        jax.block_until_ready((state, report.loss))
        seconds.append(time.perf_counter() - start)
    return StepTiming(tuple(seconds[1 + warmup :]), seconds[0], workload.batch * workload.sequence)


STATIC_COLUMNS = (
    "arch",
    "kernel",
    "computes",
    "ALU/weight",
    "registers",
    "spilled",
    "shared",
    "serialized",
    "B/weight",
)
CROSSOVER_CHIPS = ("a6000", "rtx4090", "a100", "h100", "b200")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Lines of a table that both people and Markdown can read."""
    for row in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(map(str, row))} |"


def static_cells(row: Row) -> tuple[str, ...]:
    """A kernel's row under `STATIC_COLUMNS`; shared memory in KiB."""
    return (
        row.arch,
        row.kernel,
        row.operation,
        f"{row.alu_per_weight:.2f}",
        str(row.registers),
        str(row.spilled),
        f"{row.shared_bytes / 1024:.0f} KiB",
        "yes" if row.serialized else "no",
        f"{row.bytes_per_weight:.3f}",
    )


def crossover_table(model_names: Sequence[str] = ("7b", "70b")) -> Iterator[str]:
    """M from which on the roofline model decodes first, forward / backward, for each chip; a dash if it never does."""

    def cell(name: str, n: int, k: int) -> str:
        both = (roofline.crossover(CHIPS[name], n, k, transposed=transposed) for transposed in (False, True))
        return " / ".join("-" if m is None else str(m) for m in both)

    shapes = [(f"{model} {layer}", *shape) for model in model_names for layer, shape in roofline.SHAPES[model].items()]
    rows = [(layer, f"{n} x {k}", *(cell(name, n, k) for name in CROSSOVER_CHIPS)) for layer, n, k in shapes]
    yield from markdown(("layer", "N x K", *CROSSOVER_CHIPS), rows)


def plot_kernels(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    """Draw the share of the roofline over M, a panel for each shape and direction, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Measurement]] = {}
    for one in measurements:
        product = one.product
        direction = "x W" if product.transposed else "x W^T"
        panels.setdefault(f"{one.layer}: {product.n} x {product.k}, {direction}", []).append(one)
    columns = min(4, len(panels))
    n_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.subplots(n_rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for axes, (name, ones) in zip(grid, panels.items(), strict=False):
        for implementation in IMPLEMENTATIONS:
            points = sorted((one.product.m, one.percent) for one in ones if one.implementation == implementation)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=implementation)
        axes.set_title(name, fontsize=8)
        axes.set(xscale="log", ylim=(0, 100), xlabel="M", ylabel="% of the roofline")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130, format="png")
