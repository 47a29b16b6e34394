"""RandAugment of clips for fine-tuning (spec stage1 7.4); (T, H, W, 3) uint8 in and out.

The fifteen operations of the "increasing" list: a larger magnitude always changes a picture more.
What is drawn holds for all frames of a clip, so that nothing flickers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from iv2_jax.errors import ConfigError

MAX_LEVEL = 10.0
_GREY = (128, 128, 128)  # what comes in from outside of the picture
_SOLARIZE_ADD_BELOW = 128

Change = Callable[[Image.Image], Image.Image]


@dataclasses.dataclass(frozen=True)
class RandAugmentConfig:
    """How many operations, and how strong (the original's `rand-m7-n4-mstd0.5-inc1`).

    Attributes:
      ops: operations of a clip, drawn with replacement.
      magnitude: mean of their magnitude, 0 to 10.
      deviation: its standard deviation; each operation draws its own, clipped to 0..10.
      probability: of doing a drawn operation at all.
    """

    ops: int = 4
    magnitude: float = 7.0
    deviation: float = 0.5
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.ops < 1:
            raise ConfigError(f"rand_augment.ops must be at least 1, is {self.ops}")
        if not 0 <= self.magnitude <= MAX_LEVEL:
            raise ConfigError(f"rand_augment.magnitude must be 0 to 10, is {self.magnitude}")
        if not self.deviation >= 0:
            raise ConfigError(f"rand_augment.deviation must not be negative, is {self.deviation}")
        if not 0 < self.probability <= 1:
            raise ConfigError(f"rand_augment.probability must be in (0, 1], is {self.probability}")


def rand_augment(
    frames: np.ndarray, config: RandAugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """Draws and applies the operations.

    Args:
      frames: (T, H, W, 3) uint8.
      config: how many, how strong.
      rng: source of every draw.

    Returns:
      (T, H, W, 3) uint8.
    """
    height, width = frames.shape[1:3]
    changes = draw(config, rng, height, width)
    if not changes:
        return frames
    out = np.empty_like(frames)
    for i, frame in enumerate(frames):
        image = Image.fromarray(np.ascontiguousarray(frame))
        for change in changes:
            image = change(image)
        out[i] = image
    return out


def draw(
    config: RandAugmentConfig, rng: np.random.Generator, height: int, width: int
) -> list[Change]:
    """The operations of a clip of this size, each with its magnitude and direction."""
    changes = []
    for _ in range(config.ops):
        make = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
        if rng.random() >= config.probability:
            continue
        level = float(np.clip(rng.normal(config.magnitude, config.deviation), 0.0, MAX_LEVEL))
        sign = 1.0 if rng.random() < 0.5 else -1.0
        changes.append(make(level / MAX_LEVEL, sign, height, width))
    return changes


def _auto_contrast(share: float, sign: float, height: int, width: int) -> Change:
    return ImageOps.autocontrast


def _equalize(share: float, sign: float, height: int, width: int) -> Change:
    return ImageOps.equalize


def _invert(share: float, sign: float, height: int, width: int) -> Change:
    return ImageOps.invert


def _rotate(share: float, sign: float, height: int, width: int) -> Change:
    angle = sign * 30.0 * share
    return lambda image: image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=_GREY)


def _posterize(share: float, sign: float, height: int, width: int) -> Change:
    bits = 4 - int(4 * share)
    return lambda image: ImageOps.posterize(image, bits)


def _solarize(share: float, sign: float, height: int, width: int) -> Change:
    threshold = 256 - int(256 * share)
    return lambda image: ImageOps.solarize(image, threshold)


def _solarize_add(share: float, sign: float, height: int, width: int) -> Change:
    added = int(110 * share)
    table = [min(v + added, 255) if v < _SOLARIZE_ADD_BELOW else v for v in range(256)]
    return lambda image: image.point(table * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[..., Change]:
    """Colour, contrast, brightness or sharpness, up or down."""

    def make(share: float, sign: float, height: int, width: int) -> Change:
        factor = 1.0 + sign * 0.9 * share
        return lambda image: kind(image).enhance(factor)

    return make


def _shear_x(share: float, sign: float, height: int, width: int) -> Change:
    return _affine(1, sign * 0.3 * share, 0, 0, 1, 0)


def _shear_y(share: float, sign: float, height: int, width: int) -> Change:
    return _affine(1, 0, 0, sign * 0.3 * share, 1, 0)


def _translate_x(share: float, sign: float, height: int, width: int) -> Change:
    return _affine(1, 0, sign * 0.45 * share * width, 0, 1, 0)


def _translate_y(share: float, sign: float, height: int, width: int) -> Change:
    return _affine(1, 0, 0, 0, 1, sign * 0.45 * share * height)


def _affine(*matrix: float) -> Change:
    """Where each pixel comes from: (x, y) = matrix of (x, y, 1)."""
    return lambda image: image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        Image.Resampling.BICUBIC,
        fillcolor=_GREY,
    )


OPERATIONS: tuple[Callable[[float, float, int, int], Change], ...] = (
    _auto_contrast,
    _equalize,
    _invert,
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
