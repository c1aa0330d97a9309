"""Answers to prompts: batched decoding with a key-value cache, greedy or sampled."""

from qlora_jax.generation.decoding import generate
from qlora_jax.generation.sampling import Sampling

__all__ = ["Sampling", "generate"]
