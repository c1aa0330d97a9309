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
from qlora_jax.optimizers import PagedOptimizer, transformation
from qlora_jax.quantization import QuantizationConfig, QuantizedTensor
from qlora_jax.remat import Remat
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import make_gradient_step

MODELS = {"smollm2": models.PRESETS["smollm2-135m"], "llama-7b": models.PRESETS["llama-7b"]}
MODELS["wide"] = {**MODELS["llama-7b"], "vocab_size": 1000, "num_hidden_layers": 2}
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
    """Compile the gradients of a training step, on `rows` rows a GPU; return `_weights_in`."""
    compiled, frozen = _gradients(chip_name, model, kernel, (1, rows * n_devices, seq), n_devices)
    return _weights_in(compiled, frozen)


def long_step(chip_name: str, model: str, kernel: str, rows: int, seq: int) -> dict[str, Any]:
    """The same by tiles, layer inputs offloaded; also pinned host bytes and what the host itself would compute."""
    compiled, frozen = _gradients(chip_name, model, kernel, (1, rows, seq), remat="offload")
    return {
        **_weights_in(compiled, frozen),
        "host_bytes": compiled.memory_analysis().host_temp_size_in_bytes,
        "host_computations": compiled.as_text().count('_xla_compute_type="host"'),
    }


def _gradients(
    chip_name: str, model: str, kernel: str, shape: tuple[int, int, int], n_devices: int = 1, remat: Remat = "full"
) -> tuple[jax.stages.Compiled, nnx.State]:
    """The gradient program of a step on a batch [A, B, S], and the frozen state it takes."""
    chip = gpus.chip_named(chip_name)
    graphdef, lora, frozen = _abstract(model, kernel)
    mesh = gpus.mesh(chip, n_devices)
    working = make_optimizer(TrainConfig(), 1000, lora, dtype=jnp.bfloat16).abstract_lora()
    names = ("input_ids", "labels", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    step = make_gradient_step(graphdef, remat=remat, max_grad_norm=0.3, mesh=mesh)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (
        _placed(working, mesh), _placed(frozen, mesh), _placed(batch, mesh, None, "data"), _placed(count, mesh)
    )  # fmt: skip
    return gpus.compile_for(chip, step, *arguments, n_devices=n_devices), frozen


def gradient_bytes(chip_name: str, model: str, micro_batches: list[int]) -> dict[str, Any]:
    """Temporaries of gradient programs with so many micro-batches of one row of 128 tokens, and what they return."""
    programs = [_gradients(chip_name, model, "xla", (count, 1, 128))[0].memory_analysis() for count in micro_batches]
    return {
        "temporary_bytes": [memory.temp_size_in_bytes for memory in programs],
        "output_bytes": [memory.output_size_in_bytes for memory in programs],
    }


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


def paged_update(chip_name: str, name: str) -> dict[str, Any]:
    """Compile what the paged optimizer runs for a 7B model's adapters with bfloat16 working copies."""
    chip = gpus.chip_named(chip_name)
    _, lora, _ = _abstract("llama-7b", "xla")
    rule = transformation(name, 1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    optimizer = PagedOptimizer(rule, lora, dtype=jnp.bfloat16)
    programs = {}
    for chunk in optimizer.chunks:
        leaf, *others = optimizer.abstract_update(chunk)
        if (leaf.shape, chunk.layers) not in programs:
            arguments = _placed((leaf, *others), gpus.mesh(chip))
            memory = gpus.compile_for(chip, optimizer.update_program, *arguments, layers=chunk.layers).memory_analysis()
            programs[leaf.shape, chunk.layers] = {
                "chunk_bytes": chunk.nbytes,
                "leaf_bytes": leaf.size * leaf.dtype.itemsize,
                "alias_bytes": memory.alias_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
            }
    return {"state_bytes": optimizer.state_bytes, "programs": list(programs.values())}
