"""Pixel statistics shared by students, teachers and the exported preprocessing config."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

# Spec stage1 7.3: ImageNet statistics, for the student and both original teachers.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    video: jax.Array,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> jax.Array:
    """uint8 or 0..255 float pixels (..., 3) -> float32, `(x / 255 - mean) / std` per channel."""
    import jax.numpy as jnp

    scale = jnp.asarray([1 / (255 * s) for s in std], jnp.float32)
    shift = jnp.asarray([m / s for m, s in zip(mean, std, strict=True)], jnp.float32)
    return video.astype(jnp.float32) * scale - shift
