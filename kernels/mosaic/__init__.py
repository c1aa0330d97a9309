"""Pallas kernels for NVIDIA GPUs (Mosaic GPU): 4-bit weights are decoded inside them."""
