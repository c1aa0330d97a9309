"""QLoRA for JAX/XLA: frozen 4-bit base weights, LoRA adapters as the only trainable parameters."""
