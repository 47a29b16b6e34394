"""Rotary positions: plain, linearly stretched and dynamic NTK (spec stage 3, 6.2)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions and how they are stretched for long sequences.

    Attributes:
        theta: base of the frequencies.
        scaling: 'none'; 'linear' divides positions by `factor`; 'dynamic' (dynamic NTK) raises
            `theta` once a row is longer than `base_length`.
        factor: of the scaling.
        base_length: tokens up to which 'dynamic' changes nothing.
        divisors: numbers that the `head_dim / 2` frequencies are divided by (LLaMA 3.1's
            stretching, whatever made them); empty for none.
    """

    theta: float = 1e4
    scaling: Literal["none", "linear", "dynamic"] = "none"
    factor: float = 1.0
    base_length: int = 0
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise ConfigError(f"rope.theta={self.theta} must be positive")
        if self.scaling not in ("none", "linear", "dynamic"):
            raise ConfigError(
                f"rope.scaling={self.scaling!r} must be 'none', 'linear' or 'dynamic'"
            )
        if self.factor < 1.0:
            raise ConfigError(f"rope.factor={self.factor} must be at least 1")
        if self.scaling == "dynamic" and self.base_length < 1:
            raise ConfigError("rope.base_length must be given with rope.scaling='dynamic'")
        if any(divisor <= 0 for divisor in self.divisors):
            raise ConfigError(f"rope.divisors={self.divisors} must be positive")


def rotation(
    positions: jax.Array, head_dim: int, config: RopeConfig
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles (spec stage 3, 6.2).

    With dynamic scaling a row's length is its largest position plus one, each row for itself (the
    original takes the longest row of the batch; with one row there is no difference). Keys that a
    cache holds keep the angles of the length at which they came, as in the original.

    Args:
        positions: int `(B, N)`.
        head_dim: size of a head, even.
        config: base and scaling.

    Returns:
        Two float32 arrays `(B, N, 1, head_dim / 2)`.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    places = positions.astype(jnp.float32)
    # Powers in float32, as the original takes them: the rounding of a frequency is multiplied by
    # the position.
    theta: np.ndarray | jax.Array = np.float32(config.theta)
    if config.scaling == "linear":
        places = places / config.factor
    elif config.scaling == "dynamic":
        length = jnp.max(places, axis=1) + 1.0
        growth = config.factor * length / config.base_length - (config.factor - 1.0)
        theta = theta * jnp.maximum(growth, 1.0) ** (head_dim / (head_dim - 2))
        theta = theta[:, None]
    frequencies = 1.0 / theta**exponents  # (head_dim / 2,), or one row for each sample
    if config.divisors:
        frequencies = frequencies / np.asarray(config.divisors, np.float32)
    frequencies = jnp.broadcast_to(frequencies, (positions.shape[0], len(exponents)))
    angles = places[:, :, None, None] * frequencies[:, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + d/2) of `(B, N, h, d)` by the angles; float32 inside."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
