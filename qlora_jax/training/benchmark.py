"""Timing of the training step on random data: what `scripts/benchmark.py step` prints."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax import models
from qlora_jax.layers import LoRAConfig, Precision
from qlora_jax.quantization import QuantizationConfig
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
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
    remat: bool = False,
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
        remat: recompute each layer in the backward pass.
        kernel: implementation of the 4-bit ops.
        steps: timed steps, after one that compiles and `warmup` more.
        warmup: steps run before the timed ones.
    """
    config = workload.config
    lora_config = LoRAConfig(rank, float(rank), 0.0, models.lora_modules(config, "all"))
    precision = Precision(quantization, dtype, lora_config, kernel)
    graphdef, lora, frozen = models.split_model(models.abstract_model(config, precision))
    frozen = random_base(frozen)
    optimizer = make_optimizer(TrainConfig(), steps)
    state = TrainState.create(models.init_lora(lora, jax.random.key(0)), optimizer)
    train_step = make_train_step(graphdef, optimizer, remat=remat)
    shape = (1, workload.batch, workload.sequence)
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], shape, np.int32)
    batch = {
        "input_ids": jnp.asarray(ids),
        "labels": jnp.asarray(ids),
        "positions": jnp.broadcast_to(jnp.arange(workload.sequence, dtype=jnp.int32), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
    }
    seconds = []
    for _ in range(1 + warmup + steps):
        start = time.perf_counter()
        state, metrics = train_step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    return StepTiming(tuple(seconds[1 + warmup :]), seconds[0], workload.batch * workload.sequence)
