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
    """

    checkpoint: int
    model: int
    convert: int
    load: int
    load_converted: int


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
    # A part, orbax's copy of it and tensorstore's, and the tensor that did not fit into it any more.
    largest_part = max(sum(map(sum, part.values())) for part in parts)
    convert = 3 * largest_part + max(tensor.quantised + tensor.stored for tensor in tensors)
    return Ceilings(
        checkpoint=sum(2 * math.prod(spec.shape) for spec in specs),
        model=model,
        convert=convert + ALLOWANCE + QUANTISING,
        load=_peak(tensors) - model + ALLOWANCE + QUANTISING,
        # Two copies of one array: the largest while there is nothing else; of linears beside all the rest, and beside
        # those of the array before, which threads of tensorstore may let go of late.
        load_converted=max(2 * max(max(tensor.arrays) for tensor in tensors) - model, 4 * codes) + ALLOWANCE,
    )


def _peak(tensors: list[_Tensor]) -> int:
    """Read and quantise tensors in their order, while the two before are digested."""
    peak = done = 0
    for i, tensor in enumerate(tensors):
        done += tensor.stored
        peak = max(peak, done + tensor.quantised + sum(one.stored for one in tensors[max(0, i - 2) : i + 1]))
    return peak


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
    print("| model | checkpoint | in memory | `convert` takes | a load takes beside it | of a converted directory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:]:
        found = ceilings(LLAMA_405B if name == "llama-3.1-405b" else PRESETS[name])
        sizes = [found.checkpoint, found.model, found.convert, found.load, found.load_converted]
        print(f"| {name} | {' | '.join(f'{size / 1e9:.2f} GB' for size in sizes)} |")


if __name__ == "__main__":
    main()
