"""Pallas kernels for NVIDIA GPUs (Mosaic GPU), in which 4-bit weights are dequantized."""
