"""Random model weights that any program can make again from a tensor's name and a seed.

Golden files then hold results only: the producer (PyTorch) and the tests (JAX) both call `random_weights`. NumPy alone
is needed. Each tensor has its own stream, seeded by the CRC-32 of its name: neither the order nor the presence of other
tensors matters.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

__all__ = ["random_adapter", "random_weights"]


def random_weights(
    specs: Iterable[tuple[str, Sequence[int]]], seed: int, *, norm_mean: float = 1.0, embedding_scale: float = 0.5
) -> dict[str, np.ndarray]:
    """Make a float32 tensor for every (Hugging Face name, shape) of `specs`.

    One-dimensional tensors whose name ends in `bias` are 0.3 * normal, other one-dimensional tensors (norms)
    norm_mean + 0.2 * normal, embeddings embedding_scale * normal and matrices [out, in] 1.25 / sqrt(in) * normal:
    activations stay near 1, and attention is sharp enough for a wrong position or mask to show.

    norm_mean: 0 for models whose norms multiply by 1 + weight.
    embedding_scale: small for models that multiply embeddings by sqrt(hidden) and use them as the output layer too:
    the most likely token would be the last one again and again.
    """
    weights = {}
    for name, shape in specs:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(tuple(shape), dtype=np.float32)
        if len(shape) == 1:
            values = values * np.float32(0.3) if name.endswith("bias") else norm_mean + np.float32(0.2) * values
        elif "embed" in name:
            values = values * np.float32(embedding_scale)
        else:
            values = values * np.float32(1.25 / np.sqrt(shape[-1]))
        weights[name] = np.asarray(values, np.float32)
    return weights


def random_adapter(
    linears: Mapping[tuple[str, ...], tuple[int, int, int]], rank: int, seed: int, b_scale: float
) -> dict[tuple[str, ...], np.ndarray]:
    """Make a LoRA adapter, layers stacked, for linears {(*stack, *module): (L, out, in)}.

    A is uniform in +-1/sqrt(in), which is PEFT's Kaiming initialisation; B is b_scale * normal (0 for a fresh adapter).
    Returns {(*path, "lora_a"): float32 [L, R, in], (*path, "lora_b"): float32 [L, out, R]}.
    """
    lora = {}
    for path, (layers, fan_out, fan_in) in linears.items():
        rng = np.random.default_rng([seed, zlib.crc32(".".join(path).encode())])
        bound = np.float32(1 / np.sqrt(fan_in))
        lora[(*path, "lora_a")] = (2 * rng.random((layers, rank, fan_in), dtype=np.float32) - 1) * bound
        lora[(*path, "lora_b")] = np.float32(b_scale) * rng.standard_normal((layers, fan_out, rank), dtype=np.float32)
    return lora
