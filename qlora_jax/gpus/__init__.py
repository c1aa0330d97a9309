"""CUDA GPUs known by their data sheets, and programs compiled for them on a machine that has none."""

from qlora_jax.gpus.ahead_of_time import compile_for, mesh, topology, tracing_for
from qlora_jax.gpus.chips import CHIPS, REPRESENTATIVES, Chip, chip_like, chip_named, chip_of

__all__ = [
    "CHIPS",
    "REPRESENTATIVES",
    "Chip",
    "chip_like",
    "chip_named",
    "chip_of",
    "compile_for",
    "mesh",
    "topology",
    "tracing_for",
]
