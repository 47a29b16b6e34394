"""Crops, resizing and flips of decoded clips; (T, H, W, 3) uint8 in and out.

Stage-1 training (spec stage1 7.3): multi-scale crop, Pillow BILINEAR resize, flip. Evaluation
(7.5): resize of the short side as OpenCV's INTER_LINEAR does it (half-pixel centres, no
antialiasing, the same fixed-point arithmetic), then centre crop or crops along the longer side.
Normalisation is done on the device. Stage 2 has its own rules: `augment_stage2`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from iv2_jax.data import augment_stage2

SCALES = (1.0, 0.875, 0.75, 0.66)
_SNAP = 3  # pixels: a crop this close to the output size becomes the output size
_STEPS = (  # the 13 offsets, in quarters of the free space (x, y)
    (0, 0),
    (4, 0),
    (0, 4),
    (4, 4),
    (2, 2),
    (0, 2),
    (4, 2),
    (2, 4),
    (2, 0),
    (1, 1),
    (3, 1),
    (1, 3),
    (3, 3),
)
_COEF_BITS = 11  # of OpenCV's interpolation weights


def crop_sizes(width: int, height: int, size: int) -> list[tuple[int, int]]:
    """The 10 (width, height) pairs that a multi-scale crop is drawn from.

    A side a little under `size` snaps up to it, but never past the picture's edge, which the
    original would read beyond.
    """
    base = min(width, height)
    sides = [int(base * scale) for scale in SCALES]
    sides = [min(size, base) if abs(side - size) < _SNAP else side for side in sides]
    return [
        (w, h)
        for i, h in enumerate(sides)
        for j, w in enumerate(sides)
        if abs(i - j) <= 1 and w > 0 and h > 0
    ]


def crop_offsets(width: int, height: int, crop: tuple[int, int]) -> list[tuple[int, int]]:
    """The 13 (x, y) corners that a crop of this (width, height) may have."""
    step_x, step_y = (width - crop[0]) // 4, (height - crop[1]) // 4
    return [(x * step_x, y * step_y) for x, y in _STEPS]


def draw_crop(
    width: int, height: int, size: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws (x, y, width, height) of a multi-scale crop."""
    crop = _choice(crop_sizes(width, height, size), rng)
    x, y = _choice(crop_offsets(width, height, crop), rng)
    return x, y, crop[0], crop[1]


def _choice(options: list[tuple[int, int]], rng: np.random.Generator) -> tuple[int, int]:
    """One of them; `rng.choice` would make an array of the pairs."""
    return options[int(rng.integers(len(options)))]


def multiscale_crop(
    frames: np.ndarray, size: int, rng: np.random.Generator, *, flip: bool = True
) -> np.ndarray:
    """Stage-1 training augmentation, one draw for the whole clip.

    Args:
      frames: (T, H, W, 3) uint8.
      size: side of the output.
      rng: source of the draws; the flip is drawn whether it is used or not.
      flip: mirror with probability one half (off for SSv2, whose classes have a direction).

    Returns:
      (T, size, size, 3) uint8.
    """
    height, width = frames.shape[1:3]
    x, y, w, h = draw_crop(width, height, size, rng)
    mirrored = bool(rng.random() < 0.5) and flip
    out = pil_resize(frames[:, y : y + h, x : x + w], size, size)
    return np.ascontiguousarray(out[:, :, ::-1]) if mirrored else out


def pil_resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """(T, height, width, 3): Pillow's BILINEAR, which averages when it makes smaller."""
    if frames.shape[1:3] == (height, width):
        return np.ascontiguousarray(frames)
    out = np.empty((len(frames), height, width, 3), np.uint8)
    for i, frame in enumerate(frames):
        image = Image.fromarray(np.ascontiguousarray(frame))
        out[i] = image.resize((width, height), Image.Resampling.BILINEAR)
    return out


def random_resized_crop(
    frames: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
) -> np.ndarray:
    """Fine-tuning's crop (spec stage1 7.4), one draw for the whole clip.

    Bilinear without antialiasing, as the original's, which however resizes normalised pixels; here
    they come back to 8 bits, at most half a grey level away.

    Args:
      frames: (T, H, W, 3) uint8.
      size: side of the output.
      rng: source of the draws; the flip is drawn whether it is used or not.
      scale: least and largest share of the picture's area.
      flip: mirror with probability one half (off for SSv2, whose classes have a direction).

    Returns:
      (T, size, size, 3) uint8.
    """
    y, x, h, w = augment_stage2.draw_resized_crop(*frames.shape[1:3], rng, scale=scale)
    mirrored = bool(rng.random() < 0.5) and flip
    out = linear_resize(frames[:, y : y + h, x : x + w], size, size)
    return np.ascontiguousarray(out[:, :, ::-1] if mirrored else out)


# -- evaluation -----------------------------------------------------------------------------------


def short_side_size(height: int, width: int, short: int) -> tuple[int, int]:
    """(height, width) after the short side is brought to `short`; the long side is truncated."""
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def resize_short(frames: np.ndarray, short: int) -> np.ndarray:
    """Brings the short side to `short` pixels; (T, H, W, 3) -> (T, H', W', 3)."""
    height, width = frames.shape[1:3]
    return linear_resize(frames, *short_side_size(height, width, short))


def linear_resize(
    frames: np.ndarray, height: int, width: int, *, window: tuple[slice, slice] | None = None
) -> np.ndarray:
    """Bilinear resize without antialiasing, with OpenCV's rounding.

    Args:
      frames: (T, H, W, 3) uint8.
      height: new H.
      width: new W.
      window: rows and columns of the result to compute, all by default.

    Returns:
      (T, height, width, 3) uint8, or that window of it.
    """
    rows, columns = window or (slice(None), slice(None))
    if frames.shape[1:3] == (height, width):
        return frames[:, rows, columns]
    left, right, w_left, w_right = (a[columns] for a in _taps(frames.shape[2], width))
    top, bottom, w_top, w_bottom = (a[rows] for a in _taps(frames.shape[1], height))
    out = np.empty((len(frames), len(top), len(left), frames.shape[3]), np.uint8)
    for i, frame in enumerate(frames):  # a frame at a time stays in the cache
        across = np.take(frame, left, axis=1) * w_left[:, None]
        across += np.take(frame, right, axis=1) * w_right[:, None]
        across >>= 4
        upper = np.take(across, top, axis=0) * w_top[:, None, None]
        lower = np.take(across, bottom, axis=0) * w_bottom[:, None, None]
        out[i] = ((upper >> 16) + (lower >> 16) + 2) >> 2
    return out


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The two source places of every output place, and their int32 weights of 2**11 together."""
    at = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(at).astype(np.int64)
    part = at - first.astype(np.float32)
    part = np.where((first < 0) | (first >= old - 1), np.float32(0), part)
    first = np.clip(first, 0, old - 1)
    scale = np.float32(1 << _COEF_BITS)
    weights = np.rint((np.float32(1) - part) * scale), np.rint(part * scale)
    second = np.minimum(first + 1, old - 1)
    return first, second, weights[0].astype(np.int32), weights[1].astype(np.int32)


def center_window(height: int, width: int, size: int) -> tuple[slice, slice]:
    """Rows and columns of the middle, rounded half to even as the released code does.

    Raises:
      ValueError: the picture is smaller than the window.
    """
    if min(height, width) < size:
        raise ValueError(f"a picture of {width}x{height} has no {size}x{size} centre")
    y, x = round((height - size) / 2), round((width - size) / 2)
    return slice(y, y + size), slice(x, x + size)


def crop_window(
    height: int, width: int, size: int, crop: int = 0, num_crops: int = 1
) -> tuple[slice, slice]:
    """Rows and columns of crop `crop` of `num_crops` along the longer side.

    Args:
      height: of a picture whose short side is `size`.
      width: of that picture.
      size: side of the window.
      crop: which crop, from the left or the top.
      num_crops: how many; one takes the middle, where some released classes divide by zero.

    Raises:
      ValueError: the short side is not `size`.
    """
    if min(height, width) != size:
        raise ValueError(f"a picture of {width}x{height} has no short side of {size}; resize first")
    room = max(height, width) - size
    start = int(crop * (room / (num_crops - 1))) if num_crops > 1 else int(room / 2)
    along, across = slice(start, start + size), slice(0, size)
    return (along, across) if height >= width else (across, along)


def eval_views(
    frames: np.ndarray, size: int, *, short: int | None = None, num_crops: int = 1
) -> np.ndarray:
    """Resize and crops of validation (one crop, the centre) and test (several).

    Args:
      frames: (T, H, W, 3) uint8.
      size: side of the output.
      short: short side after the resize, `size` by default; several crops need that default.
      num_crops: how many crops along the longer side.

    Returns:
      (num_crops, T, size, size, 3) uint8, contiguous.
    """
    height, width = short_side_size(*frames.shape[1:3], short or size)
    if num_crops == 1:
        window = center_window(height, width, size)
        return np.ascontiguousarray(linear_resize(frames, height, width, window=window))[None]
    resized = linear_resize(frames, height, width)
    windows = (crop_window(height, width, size, c, num_crops) for c in range(num_crops))
    return np.stack([resized[:, rows, columns] for rows, columns in windows])


def fuse_views(logits: np.ndarray) -> np.ndarray:
    """Averages softmax probabilities over views: (..., V, classes) -> (..., classes) float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return (shifted / shifted.sum(axis=-1, keepdims=True)).mean(axis=-2)
