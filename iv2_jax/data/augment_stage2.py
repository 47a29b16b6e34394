"""Crops and resizing of stage 2 (spec stage2 8.5); (T, H, W, 3) uint8 in and out.

Training: a random crop of random area and shape, resized to a square, flip. Evaluation: the whole
picture resized to a square, whatever its shape. Both resize by bicubic interpolation and come back
to 8 bits. With antialiasing, the default here and in torchvision since 0.17, the filter (a =
-0.5) grows with the reduction; without, as all released numbers were made (trap 11.8), four
neighbours count (a = -0.75), so that fine patterns alias.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from iv2_jax.models.positions import cubic_weights  # NumPy only, like this module

SCALE = (0.5, 1.0)  # share of the picture's area
RATIO = (3 / 4, 4 / 3)  # width by height
_TRIES = 10
_BAND = 8  # output lines that share one product: few zeros, few calls


def draw_resized_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> tuple[int, int, int, int]:
    """Draws (y, x, height, width) of a crop.

    The area is uniform, the shape uniform in its logarithm; where ten draws do not fit into the
    picture, the largest centred crop of an allowed shape is taken.

    Args:
      height: of the picture.
      width: of the picture.
      rng: source of the draws.
      scale: least and largest share of the picture's area.
      ratio: least and largest width by height.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(y), int(x), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    frames: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
    flip: bool = True,
    antialias: bool = True,
) -> np.ndarray:
    """Stage-2 training augmentation, one draw for the whole clip.

    Args:
      frames: (T, H, W, 3) uint8.
      size: S, side of the output.
      rng: source of the draws; the flip is drawn whether it is used or not.
      scale: see `draw_resized_crop`.
      ratio: see `draw_resized_crop`.
      flip: mirror with probability one half. The original does even where the caption speaks of
        left or right (trap 11.28), see `captions.mentions_side`.
      antialias: see the module.

    Returns:
      (T, S, S, 3) uint8.
    """
    y, x, h, w = draw_resized_crop(*frames.shape[1:3], rng, scale=scale, ratio=ratio)
    mirrored = bool(rng.random() < 0.5) and flip
    crop = frames[:, y : y + h, x : x + w]
    out = bicubic_resize(crop, size, size, antialias=antialias)
    return np.ascontiguousarray(out[:, :, ::-1]) if mirrored else out


def stretch(frames: np.ndarray, size: int, *, antialias: bool = True) -> np.ndarray:
    """Evaluation: (T, H, W, 3) uint8 -> (T, size, size, 3), the aspect ratio not kept."""
    return bicubic_resize(frames, size, size, antialias=antialias)


def bicubic_resize(
    frames: np.ndarray, height: int, width: int, *, antialias: bool = True
) -> np.ndarray:
    """Bicubic resize of 8-bit pictures, rounded half to even and clamped.

    Args:
      frames: (T, H, W, 3) uint8.
      height: new H.
      width: new W.
      antialias: see the module.

    Returns:
      (T, height, width, 3) uint8, contiguous.
    """
    if frames.shape[1:3] == (height, width):
        return np.ascontiguousarray(frames)
    rows = _bands(frames.shape[1], height, antialias)
    columns = _bands(frames.shape[2], width, antialias)
    out = np.empty((len(frames), height, width, frames.shape[3]), np.uint8)
    for i, frame in enumerate(frames):  # a frame at a time stays in the cache
        across = _weighted(frame, rows)
        full = _weighted(np.ascontiguousarray(across.swapaxes(0, 1)), columns)
        np.rint(full, out=full)
        out[i] = np.clip(full, 0, 255, out=full).swapaxes(0, 1)
    return out


@dataclasses.dataclass(frozen=True)
class _Band:
    """Output lines `to` as (n, k) float32 weights of the k input lines `source`."""

    to: slice
    source: slice
    weights: np.ndarray


def _weighted(lines: np.ndarray, bands: tuple[_Band, ...]) -> np.ndarray:
    """(old, n, 3) -> (new, n, 3) float32, whichever lines the bands need."""
    flat = lines.reshape(len(lines), -1)
    out = np.empty((bands[-1].to.stop, flat.shape[1]), np.float32)
    for band in bands:
        np.matmul(band.weights, flat[band.source].astype(np.float32, copy=False), out=out[band.to])
    return out.reshape(len(out), *lines.shape[1:])


@functools.lru_cache(maxsize=512)
def _bands(old: int, new: int, antialias: bool) -> tuple[_Band, ...]:
    """The weights that bring `old` lines to `new`, in bands without the many zeros between."""
    matrix = (antialiased_weights if antialias else cubic_weights)(old, new).astype(np.float32)
    bands = []
    for at in range(0, new, _BAND):
        part = matrix[at : at + _BAND]
        used = np.flatnonzero(part.any(axis=0))
        source = slice(int(used[0]), int(used[-1]) + 1)
        to = slice(at, at + len(part))
        bands.append(_Band(to, source, np.ascontiguousarray(part[:, source])))
    return tuple(bands)


def antialiased_weights(size: int, new_size: int) -> np.ndarray:
    """Matrix (new_size, size) of bicubic interpolation that averages when it makes smaller.

    The kernel has a = -0.5 and is widened by the reduction, as in Pillow and in PyTorch's
    `interpolate(antialias=True)`; places outside the picture do not count.
    """
    scale = np.float32(size) / np.float32(new_size)  # float32 throughout, as PyTorch's
    widening = max(scale, np.float32(1))
    centres = scale * (np.arange(new_size, dtype=np.float32)[:, None] + np.float32(0.5))
    reach = 2 * widening
    first = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + reach + 0.5).astype(np.int64), size)
    places = np.arange(size, dtype=np.float32)[None]
    x = np.abs(places - centres + 0.5) * (1 / widening)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights = np.where((places >= first) & (places < last), weights, 0).astype(np.float32)
    return weights / weights.sum(axis=1, keepdims=True)
