"""Model of a run: the frozen base on the device, and what is trained on top of it."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx

from qlora_jax import kernels, models
from qlora_jax.checkpoints.loading import LoadedBase, load_base
from qlora_jax.checkpoints.peft import AdapterConfig, save_adapter
from qlora_jax.nn.linear import LoRAConfig
from qlora_jax.nn.long_sequence import tile_size
from qlora_jax.sharding import Devices
from qlora_jax.training import setup
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.datasets import Datasets
from qlora_jax.training.progress import announced

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to train.

    Attributes:
        parts: structure, shapes of what is trained, and the base weights on the devices.
        base: what was loaded.
        adapters: rank, scale, dropout and adapted linears.
        start: adapters to start from; None for fresh ones.
    """

    parts: setup.ModelParts
    base: LoadedBase
    adapters: LoRAConfig
    start: nnx.State | None = None

    def write_adapter(self, masters: nnx.State, directory: Path, base_model_name: str) -> None:
        """Write float32 adapters in PEFT's format."""
        lora = self.adapters
        described = AdapterConfig(lora.rank, lora.alpha, lora.dropout, lora.modules, base_model_name)
        save_adapter(directory, models.flatten(masters), described, self.base.config)


def load_model(config: TrainConfig, path: Path, declared: setup.Declared, devices: Devices) -> Model:
    """Load and quantise the base of a declared model onto the devices."""
    adapters, parts, start = declared.adapters, declared.parts, None
    with announced("loading the base model"):
        base = load_base(
            path,
            quantization=setup.quantization_of(config, declared.model_config),
            dtype=setup.compute_dtype(config),
            shardings=models.flatten(devices.shardings(parts.frozen)),
        )
    if adapters.tensors is not None:
        logger.info(
            "adapter %s: rank %d, alpha %g, on %s (its own, not the configuration's)",
            config.adapter, adapters.config.rank, adapters.config.alpha, ", ".join(adapters.config.modules),
        )  # fmt: skip
        start = models.unflatten_like(parts.lora, adapters.tensors, what=f"adapter {config.adapter}")
    frozen = models.fill_base(parts.frozen, base.tensors)
    return Model(dataclasses.replace(parts, frozen=frozen), base, adapters.config, start)


def kernel_choices(config: TrainConfig, model: Model, rows: Sequence[int]) -> tuple[kernels.Choice, ...]:
    """Resolve the implementation of the 4-bit products with activations of so many rows."""
    weights = {
        ".".join(name for name in path if name not in ("layers", "weight")): value
        for path, value in models.flatten(model.parts.frozen).items()
    }
    return kernels.resolve(weights, rows, setup.compute_dtype(config), implementation=config.kernel)


def product_rows(config: TrainConfig, datasets: Datasets) -> list[int]:
    """Return the rows of activations that a device multiplies at once, those of the longest training batch first."""
    devices = jax.device_count()
    micro_batches = config.gradient_accumulation_steps * devices
    longest, *others = (math.prod(shape) // micro_batches for shape in sorted(datasets.train.shapes(), reverse=True))
    # Long batches pass in tiles where activations are recomputed, and always in evaluation.
    tile = tile_size if config.remat_policy != "none" else int
    evaluation = (tile_size(math.prod(batch.shape) // devices) for batch in datasets.evaluation)
    return list(dict.fromkeys([tile(longest), *map(tile, others), *evaluation]))
