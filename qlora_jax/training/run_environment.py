"""Surroundings of a run that may change its bits: told, not refused, when a run is resumed."""

import importlib.metadata
from collections.abc import Mapping

import jax


def current_environment() -> dict[str, str]:
    """Return what is recorded when a run begins: versions of the libraries that compute, and the device."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "qlora-jax")}
    return {**versions, "device": jax.devices()[0].device_kind}


def changed_environment(before: Mapping[str, str]) -> list[str]:
    """Say of each part of the environment that is not as it was recorded that bits may differ."""
    now = current_environment()
    return [
        f"this run began with {name} {before[name]} and goes on with {now[name]}: bits of its results may differ"
        for name in now
        if name in before and before[name] != now[name]
    ]
