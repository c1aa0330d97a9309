"""Optimizers: update rules of a matrix, and the placement of their state in chunks of layers."""

from qlora_jax.optimizers.paged import CHUNK_BYTES, Chunk, PagedOptimizer, TransferStats
from qlora_jax.optimizers.transformations import OPTIMIZERS, Optimizer, find_optimizer, transformation

__all__ = [
    "CHUNK_BYTES",
    "OPTIMIZERS",
    "Chunk",
    "Optimizer",
    "PagedOptimizer",
    "TransferStats",
    "find_optimizer",
    "transformation",
]
