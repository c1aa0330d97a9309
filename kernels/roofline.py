"""A model of the time a product takes, and the choice it leads to."""

from qlora_jax.gpus import Chip


def choose(chip: Chip, m: int, n: int, k: int, *, transposed: bool) -> str:
    """Return "fused" or "dequantize"."""
    return "fused"
