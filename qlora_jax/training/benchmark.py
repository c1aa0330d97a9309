"""Time of the training step on random data, and the shapes of the products in well-known models."""

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax import models
from qlora_jax.choices import Remat
from qlora_jax.device_memory import device_limit
from qlora_jax.nn.linear import LoRAConfig, QLoRAConfig
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor
from qlora_jax.training.config import StepConfig, TrainConfig
from qlora_jax.training.schedule import make_optimizer
from qlora_jax.training.step import TrainState, make_train_step


@dataclasses.dataclass(frozen=True)
class Workload:
    """The model, as contents of config.json, and the shape of the batch [B, S] that it is timed on."""

    contents: Mapping[str, Any]
    batch: int
    sequence: int


WORKLOADS = {
    "small": Workload(
        {
            "architectures": ["LlamaForCausalLM"],
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "vocab_size": 32000,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
        },
        batch=1,
        sequence=256,
    ),
    "smollm2": Workload(models.PRESETS["smollm2-135m"], batch=4, sequence=256),
}


def linear_layers(presets: Iterable[str]) -> dict[tuple[int, int], str]:
    """Return (N, K) -> "preset layers" of the quantized weights of some presets; equal shapes under their first preset.

    Args:
        presets: names in `models.PRESETS`.
    """
    found: dict[tuple[int, int], str] = {}
    for preset in presets:
        model = models.abstract_model(models.model_config(models.PRESETS[preset]), QLoRAConfig())
        _, _, frozen = models.split_model(model)
        layers: dict[tuple[int, int], list[str]] = {}
        for path, weight in models.flatten(frozen).items():
            if isinstance(weight, QuantizedTensor):
                layers.setdefault((weight.shape[0], weight.shape[1]), []).append(path[-2].removesuffix("_proj"))
        for shape, names in layers.items():
            found.setdefault(shape, f"{preset} {' '.join(names)}")
    return found


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
    config = models.model_config(workload.contents)
    lora_config = LoRAConfig(rank, float(rank), 0.0, models.lora_modules(config, "all"))
    qlora = QLoRAConfig(quantization, dtype, lora_config, kernel)
    graphdef, lora, frozen = models.split_model(models.abstract_model(config, qlora))
    frozen = random_base(frozen)
    defaults = TrainConfig()
    optimizer = make_optimizer(defaults, steps, lora, dtype=dtype, limit=device_limit(jax.devices()[0]))
    state = TrainState.create(models.initialize(lora, jax.random.key(0)), optimizer)
    step_config = StepConfig(remat=remat, max_grad_norm=defaults.max_grad_norm)
    train_step = make_train_step(graphdef, optimizer, step_config)
    shape = (1, workload.batch, workload.sequence)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, shape, np.int32)
    positions = jnp.broadcast_to(jnp.arange(workload.sequence, dtype=jnp.int32), shape)
    batch = {"input_ids": jnp.asarray(ids), "labels": jnp.asarray(ids), "positions": positions}
    seconds = []
    for _ in range(1 + warmup + steps):
        start = time.perf_counter()
        state, report = train_step(state, frozen, batch)
        jax.block_until_ready((state, report.loss))
        seconds.append(time.perf_counter() - start)
    return StepTiming(tuple(seconds[1 + warmup :]), seconds[0], workload.batch * workload.sequence)
