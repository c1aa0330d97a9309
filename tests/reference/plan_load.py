"""Bytes and ceilings of memory of a conversion and of loads, from config.json alone: nothing is read or run.

    python tests/reference/plan_load.py llama-3.3-70b llama-3.1-405b

Of bfloat16 checkpoints, NF4 with double quantisation. The rules are those that the modules state; the test of
tests/checkpoints/test_loading_memory.py holds them against measured peaks.
"""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from qlora_jax.checkpoints import conversion
from qlora_jax.checkpoints.streaming import abstract_tensor
from qlora_jax.models import PRESETS, base_tensors, model_config
from qlora_jax.quantization import QuantizationConfig

ALLOWANCE, QUANTISING = 32 << 20, 64 << 20
"""Bytes of threads and of what the allocator keeps; of compiled programs and what they work on."""
LLAMA_405B = {
    **PRESETS["llama-3.3-70b"],
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}


class Ceilings(NamedTuple):
    """Bytes.

    Attributes:
        checkpoint: of the checkpoint's tensors, which are read.
        model: of the model in memory, and about those of a converted directory.
        convert: of memory that `convert` takes.
        load: that loading the checkpoint takes beside the model.
        load_converted: that loading the converted directory takes beside the model.
        load_to_gpu: of host memory that loading the checkpoint takes where the model is on a GPU.
        load_converted_to_gpu: the same of the converted directory.
    """

    checkpoint: int
    model: int
    convert: int
    load: int
    load_converted: int
    load_to_gpu: int
    load_converted_to_gpu: int


class _Tensor(NamedTuple):
    """A base tensor: bytes that are read only to be quantised, and of the arrays that are stored."""

    path: tuple[str, ...]
    quantised: int
    arrays: tuple[int, ...]

    @property
    def stored(self) -> int:
        return sum(self.arrays)


def ceilings(config: dict[str, Any]) -> Ceilings:
    """Apply the rules to the base tensors of a model."""
    specs = base_tensors(model_config(config))
    tensors = []
    for spec in specs:
        abstract = abstract_tensor(spec, QuantizationConfig(), np.dtype("bfloat16"), ())
        arrays = tuple(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        tensors.append(_Tensor(spec.path, 2 * math.prod(spec.shape) * spec.quantized, arrays))
    model, parts = sum(tensor.stored for tensor in tensors), _parts(tensors)
    linears = {tensor.path for tensor in tensors if tensor.quantised}
    codes = max(max(arrays) for part in parts for path, arrays in part.items() if path in linears)
    others = [jax.ShapeDtypeStruct(spec.shape, np.dtype("bfloat16")) for spec in specs if not spec.quantized]
    # Codes of all layers have an axis that is as good as any size's multiple.
    chunk = max(2 * conversion._CHUNK_BYTES, *map(conversion.chunk_bytes, others))
    # Of two tensors in work, float32 for every block of 64.
    scales = 2 * max(tensor.quantised for tensor in tensors) // 32
    # A part, orbax's copy of it and tensorstore's; the tensor that did not fit into it any more, and two in work.
    largest_part = max(sum(map(sum, part.values())) for part in parts)
    array = max(max(tensor.arrays) for tensor in tensors)
    convert = 3 * largest_part + 3 * max(tensor.stored for tensor in tensors) + scales
    return Ceilings(
        checkpoint=sum(2 * math.prod(spec.shape) for spec in specs),
        model=model,
        convert=convert + ALLOWANCE + QUANTISING,
        load=scales + ALLOWANCE + QUANTISING,
        load_converted=chunk + ALLOWANCE,
        # Two in work, one that is written, and two that are digested.
        load_to_gpu=sum(sorted(tensor.stored for tensor in tensors)[-5:]) + scales + ALLOWANCE + QUANTISING,
        # The array before may still be on its way to the GPU.
        load_converted_to_gpu=2 * max(array, codes) + chunk + ALLOWANCE,
    )


def _parts(tensors: list[_Tensor]) -> list[dict[tuple[str, ...], list[int]]]:
    """Fill parts as `convert` does: {path: bytes of each array of its layers}."""
    parts: list[dict[tuple[str, ...], list[int]]] = [{}]
    filled = 0
    for tensor in tensors:
        if filled and filled + tensor.stored > conversion._PART_BYTES:
            parts.append({})
            filled = 0
        arrays = parts[-1].setdefault(tensor.path, [0] * len(tensor.arrays))
        arrays[:] = [sum(pair) for pair in zip(arrays, tensor.arrays, strict=True)]
        filled += tensor.stored
    return parts


def main() -> None:
    """Print a table."""
    loads = ["a load takes beside it", "of a converted directory", "to a GPU", "to a GPU, converted"]
    columns = ["model", "checkpoint", "in memory", "`convert` takes", *loads]
    print(f"| {' | '.join(columns)} |")
    print(f"|{' --- |' * len(columns)}")
    for name in sys.argv[1:]:
        found = ceilings(LLAMA_405B if name == "llama-3.1-405b" else PRESETS[name])
        print(f"| {name} | {' | '.join(f'{size / 1e9:.2f} GB' for size in found)} |")


if __name__ == "__main__":
    main()
