"""Rotary position embeddings (Su et al. 2021) and the scalings that stretch them to longer contexts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qlora_jax.errors import UserError

# Every field a scaling may carry; one that is not here is an error, not a guess.
_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    },
}
_NUMBERS = frozenset({"rope_theta"}).union(*_FIELDS.values()) - {"truncate"}
# Beyond every number that a model has, and within float32.
_MOST = 1e30
_REQUIRED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
}


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Rotary embedding of one head.

    Attributes:
        head_dim: width of a head; its first half is rotated against the second, as Hugging Face stores it.
        theta: base wavelength.
        max_position_embeddings: the context length the model's config states.
        kind: default | linear | dynamic (NTK) | llama3 | yarn.
        parameters: the scaling's own fields, sorted (name, value) pairs, as in Hugging Face's `rope_parameters`.
    """

    head_dim: int
    theta: float = 10000.0
    max_position_embeddings: int = 2048
    kind: str = "default"
    parameters: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int, max_positions: int | None = None) -> "RotaryConfig":
        """Read a Hugging Face config: `rope_parameters` (transformers 5), or `rope_theta` + `rope_scaling` (before).

        Args:
            config: contents of config.json.
            head_dim: width of a head.
            max_positions: the model's context length; by default `config`'s `max_position_embeddings`.

        Raises:
            UserError: an unknown scaling, or a field of it that is unknown or missing; names the field.
        """
        source = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        values = {} if config.get(source) is None else config[source]
        if not isinstance(values, Mapping):
            raise UserError(f"config.json: {source} must be an object, not {values!r}.")
        values = {name: value for name, value in values.items() if value is not None}
        theta = values.pop("rope_theta", config.get("rope_theta"))
        theta = 10000.0 if theta is None else theta
        legacy = values.pop("type", "default")
        kind = values.pop("rope_type", legacy)
        _check_numbers({"rope_theta": theta, **values}, source)
        if not isinstance(kind, str) or kind not in _FIELDS:
            supported = ", ".join(_FIELDS)
            raise UserError(f"config.json: {source}.rope_type {kind!r} is not supported; supported are {supported}.")
        if values.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
            raise UserError(f"config.json: {source}.partial_rotary_factor other than 1 is not supported.")
        # transformers writes `original_max_position_embeddings` beside scalings that do not use it.
        unknown = set(values) - _FIELDS[kind] - {"original_max_position_embeddings"}
        missing = _REQUIRED[kind] - set(values)
        if unknown:
            raise UserError(f"config.json: {source}.{min(unknown)} is not supported for rope_type {kind!r}.")
        if missing:
            raise UserError(f"config.json: {source}.{min(missing)} is missing; rope_type {kind!r} needs it.")
        if kind == "llama3" and not values["high_freq_factor"] > values["low_freq_factor"]:
            raise UserError(f"config.json: {source}.high_freq_factor must be above low_freq_factor.")
        max_positions = int(max_positions or config.get("max_position_embeddings") or 2048)
        if kind in ("llama3", "yarn"):
            values["original_max_position_embeddings"] = (
                config.get("original_max_position_embeddings")
                or values.get("original_max_position_embeddings")
                or max_positions
            )
        used = {name: value for name, value in values.items() if name in _FIELDS[kind] and value is not None}
        found = cls(head_dim, float(theta), max_positions, kind, tuple(sorted(used.items())))
        _check_frequencies(found, source)
        return found


def _check_numbers(values: Mapping[str, Any], source: str) -> None:
    """Refuse a number of a scaling that is not finite and positive."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _NUMBERS and not (number and 0 < value < _MOST):
            raise UserError(f"config.json: {source}.{name} must be a positive number, not {value!r}.")


def _check_frequencies(config: RotaryConfig, source: str) -> None:
    """Refuse numbers that are plausible one by one, but together give frequencies that are not."""
    try:
        with np.errstate(all="ignore"):
            freq, attention = _frequencies(config)
        usable = bool(np.isfinite(freq).all()) and math.isfinite(attention)
    except (ArithmeticError, ValueError):
        usable = False
    if not usable:
        numbers = ", ".join(f"{name} {value!r}" for name, value in (("rope_theta", config.theta), *config.parameters))
        raise UserError(f"config.json: {source} does not give finite frequencies ({numbers}).")


def _base_frequencies(theta: Any, dim: int) -> Any:
    """1 / theta^(2i / dim), float32 [dim / 2], for a NumPy or JAX theta, a scalar or [..., 1]."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return 1.0 / (theta**exponents)


def _llama3(freq: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """Llama 3.1: keep high frequencies, divide low ones by `factor`, blend between."""
    old, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
    wavelength = 2 * math.pi / freq
    smooth = (old / wavelength - low) / (high - low)
    blended = (1 - smooth) * freq / p["factor"] + smooth * freq
    scaled = np.where(wavelength > old / low, freq / p["factor"], freq)
    medium = (wavelength <= old / low) & (wavelength >= old / high)
    return np.where(medium, blended, scaled)


def _yarn(config: RotaryConfig, freq: np.ndarray, p: dict[str, Any]) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023): per-frequency blend of interpolation and extrapolation, and a score scale."""
    dim, factor = config.head_dim, p["factor"]

    def correction(rotations: float) -> float:
        length = p["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = correction(float(p.get("beta_fast") or 32)), correction(float(p.get("beta_slow") or 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width has no slope
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    scaled = freq / factor * ramp + freq * (1 - ramp)

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = p.get("attention_factor")
    if attention is None:
        if p.get("mscale") and p.get("mscale_all_dim"):
            attention = mscale(float(p["mscale"])) / mscale(float(p["mscale_all_dim"]))
        else:
            attention = mscale()
    return scaled, float(attention)


def _frequencies(config: RotaryConfig) -> tuple[np.ndarray, float]:
    """Frequencies [head_dim / 2] and the scale of cosines and sines; of dynamic NTK those of a short sequence."""
    p = dict(config.parameters)
    freq = _base_frequencies(np.float32(config.theta), config.head_dim)
    if config.kind == "linear":
        return freq / p["factor"], 1.0
    if config.kind == "llama3":
        return _llama3(freq, p), 1.0
    if config.kind == "yarn":
        return _yarn(config, freq, p)
    return freq, 1.0


def rotary_tables(
    config: RotaryConfig, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Cosines and sines, float32 [B, S, head_dim / 2], for the given positions.

    The dynamic-NTK base follows the longest position of a row. (transformers takes the batch's: a row would depend on
    its neighbours.)
    """
    if config.kind == "dynamic":
        p = dict(config.parameters)
        longest = jnp.max(positions, axis=1)[:, None, None] + 1
        length = jnp.maximum(longest, config.max_position_embeddings).astype(jnp.float32)
        growth = p["factor"] * length / config.max_position_embeddings - (p["factor"] - 1)
        theta = config.theta * growth ** (config.head_dim / (config.head_dim - 2))
        freq, attention = _base_frequencies(theta, config.head_dim), 1.0
    else:
        freq, attention = _frequencies(config)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(freq, jnp.float32)
    return jnp.cos(angles) * attention, jnp.sin(angles) * attention


def apply_rotary(
    x: Float[Array, "B S N E"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S N E"]:
    """Rotate the halves of every head of x [B, S, N, head_dim], in float32, returned in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
