"""Programs that tests compile for GPUs in a child process (see gpu_child), and what their compiled text says."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax import gpus, models
from qlora_jax.generation import Sampling, _decode
from qlora_jax.layers import LoRAConfig, Precision
from qlora_jax.models.base import flatten
from qlora_jax.optimizers.transformations import transformation
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import TrainState, make_train_step

_LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
MODELS = {
    "smollm2": {
        **_LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
# What makes an array in optimised HLO without writing it anywhere.
_NAMES = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "call"}


def _abstract(model: str, kernel: str) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    config = MODELS[model]
    # A rank whose multiples are no dimension of a weight: XLA may concatenate adapters.
    adapters = LoRAConfig(24, 16.0, 0.0, models.lora_modules(config, "all"))
    precision = Precision(QuantizationConfig(), jnp.bfloat16, adapters, kernel)
    return models.split_model(models.abstract_model(config, precision))


def _placed(tree: Any, mesh: jax.sharding.Mesh, *spec: str | None) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _weights_in(compiled: jax.stages.Compiled, frozen: nnx.State) -> dict[str, Any]:
    """What a program does with the base weights.

    Keys: kernels, the number of Pallas calls; decoded, arrays of a whole base weight in a floating dtype; moved, arrays
    as large as a layer's codes that something writes; gathers, transfers of the rows of other GPUs.
    """
    text = compiled.as_text()
    weights = [value for value in flatten(frozen).values() if isinstance(value, QuantizedTensor)]
    shapes = {tuple(sorted(weight.shape)) for weight in weights}
    smallest = min(weight.n_elements // 2 for weight in weights)
    decoded, moved = set(), set()
    for dtype, dims, operation in re.findall(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", text):
        shape = [int(dim) for dim in dims.split(",") if dim not in ("", "1")]
        if dtype in ("bf16", "f16", "f32") and tuple(sorted(shape)) in shapes:
            decoded.add(f"{dtype}[{dims}] {operation}")
        elements = math.prod(shape)
        if dtype in ("u8", "s8", "s32") and elements and elements % smallest == 0 and operation not in _NAMES:
            moved.add(f"{dtype}[{dims}] {operation}")
    kernels = len(re.findall(r'custom_call_target="mosaic_gpu', text))
    gathers = len(re.findall(r"all-gather(?:-start)?\(", text))
    return {"kernels": kernels, "gathers": gathers, "decoded": sorted(decoded), "moved": sorted(moved)}


def training_step(chip_name: str, model: str, kernel: str, rows: int, seq: int, n_devices: int = 1) -> dict[str, Any]:
    """Compile the whole training step, on `rows` rows a GPU; return `_weights_in`."""
    chip = gpus.chip_named(chip_name)
    graphdef, lora, frozen = _abstract(model, kernel)
    optimizer = make_optimizer(TrainConfig(), 1000)
    state = jax.eval_shape(lambda lora: TrainState.create(lora, optimizer), lora)
    mesh = gpus.mesh(chip, n_devices)
    names = ("input_ids", "labels", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct((1, rows * n_devices, seq), jnp.int32) for name in names}
    step = make_train_step(graphdef, optimizer, remat="full", mesh=mesh)
    arguments = (_placed(state, mesh), _placed(frozen, mesh), _placed(batch, mesh, None, "data"))
    return _weights_in(gpus.compile_for(chip, step, *arguments, n_devices=n_devices), frozen)


def decoding(chip_name: str, model: str, kernel: str, rows: int, seq: int) -> dict[str, Any]:
    """Compile generation after `rows` prompts of `seq` tokens; return `_weights_in`, and the temporary bytes."""
    chip = gpus.chip_named(chip_name)
    graphdef, lora, frozen = _abstract(model, kernel)
    mesh = gpus.mesh(chip)
    prompts = [jax.ShapeDtypeStruct((rows, seq), dtype) for dtype in (jnp.int32, bool)]
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = [_placed(tree, mesh) for tree in (lora, frozen, *prompts, key)]
    step = functools.partial(_decode, graphdef=graphdef, sampling=Sampling(64, False), eos_ids=(2,))
    compiled = gpus.compile_for(chip, step, *arguments)
    return {**_weights_in(compiled, frozen), "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}


def compiled(chip_name: str, programs: list[list[Any]]) -> list[dict[str, Any]]:
    """Results of several programs for one chip: a process compiles kernels for one architecture only."""
    return [globals()[name](chip_name, *arguments) for name, *arguments in programs]


def optimizer_update(chip_name: str, name: str, *shape: int) -> dict[str, Any]:
    """Compile an optimizer's update of a stack of matrices; return its bytes of temporaries and of state."""
    chip = gpus.chip_named(chip_name)
    tx = transformation(name, 1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    stack = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(jax.vmap(tx.init), stack)
    arguments = [_placed(tree, gpus.mesh(chip)) for tree in (stack, state, stack)]
    compiled = gpus.compile_for(chip, jax.vmap(tx.update), *arguments)
    return {
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
    }
