"""Answers to prompts: continuous batching over a key-value cache, greedy or sampled, with one adapter or several."""

from qlora_jax.generation.adapters import AdapterStack, empty_stack, stack_adapters, stack_config
from qlora_jax.generation.beams import Beam, BeamSearch, beam_search
from qlora_jax.generation.engine import Engine, EngineOptions, Request, Token, generate
from qlora_jax.generation.sampling import Sampling

__all__ = [
    "AdapterStack",
    "Beam",
    "BeamSearch",
    "Engine",
    "EngineOptions",
    "Request",
    "Sampling",
    "Token",
    "beam_search",
    "empty_stack",
    "generate",
    "stack_adapters",
    "stack_config",
]
