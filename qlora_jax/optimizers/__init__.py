"""Optimizers of the adapters: state that pages between device and host, in chunks of layers."""

from qlora_jax.optimizers.paged import CHUNK_BYTES, Chunk, PagedOptimizer, Traffic, device_limit

__all__ = ["CHUNK_BYTES", "Chunk", "PagedOptimizer", "Traffic", "device_limit"]
