"""Optimizers: what they do to one adapter matrix, and where their state lives."""
