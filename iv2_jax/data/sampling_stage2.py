"""Which frames of a clip stage 2 takes: intervals of equal length, or a rate (spec stage2 8.5).

Every function returns (T,) int64 indices into the n frames of a clip, see `sampling`.
"""

from __future__ import annotations

import numpy as np


def check_counts(num_available: int, num_frames: int) -> None:
    """Refuses counts that no rule is made for."""
    if num_available < 1 or num_frames < 1:
        raise ValueError(f"{num_frames} of {num_available} frames: both must be at least 1")


def spread_edges(num_available: int, num_frames: int) -> np.ndarray:
    """Edges of the min(T, n) intervals that stage 2 divides a clip into."""
    check_counts(num_available, num_frames)
    count = min(num_frames, num_available)
    return np.linspace(0, num_available, count + 1).astype(np.int64)


def middle(num_available: int, num_frames: int, *, shift: int | None = None) -> np.ndarray:
    """The middle frame of each interval, or its `shift`-th; short clips repeat the last frame."""
    edges = spread_edges(num_available, num_frames)
    if shift is None:
        return _pad((edges[:-1] + edges[1:] - 1) // 2, num_frames)
    return _pad(np.minimum(edges[:-1] + shift, num_available - 1), num_frames)


def spread_random(
    num_available: int, num_frames: int, rng: np.random.Generator, *, released: bool = False
) -> np.ndarray:
    """One random frame of each interval.

    Args:
      num_available: n.
      num_frames: T.
      rng: source of the draws.
      released: never draw an interval's last frame, and take sorted distinct frames of the whole
        clip when an interval has a single frame, as the released loader does.
    """
    edges = spread_edges(num_available, num_frames)
    low, high = edges[:-1], edges[1:]
    if not released:
        return _pad(rng.integers(low, high), num_frames)
    if np.any(high - low < 2):
        return _pad(np.sort(rng.permutation(num_available)[: len(low)]), num_frames)
    return _pad(rng.integers(low, high - 1), num_frames)


def at_rate(
    num_available: int, fps: float, rate: float, *, max_frames: int | None = None
) -> np.ndarray:
    """Frames at the centres of intervals of 1 / rate seconds; may be empty for a short clip.

    Args:
      num_available: n.
      fps: frames per second of the clip.
      rate: frames wanted per second.
      max_frames: at most so many, the first ones.
    """
    step = 1 / rate
    seconds = np.arange(step / 2, num_available / fps + step / 2, step)
    indices = np.around(seconds * fps).astype(np.int64)
    return indices[indices < num_available][:max_frames]


def at_fixed_rate(num_available: int, num_frames: int, fps: float, rate: float) -> np.ndarray:
    """`at_rate` brought to T frames: the first T, or the last one again; the middle if none."""
    check_counts(num_available, num_frames)
    indices = at_rate(num_available, fps, rate, max_frames=num_frames)
    if not len(indices):
        indices = np.array([(num_available - 1) // 2], np.int64)
    return _pad(indices, num_frames)


def _pad(indices: np.ndarray, num_frames: int) -> np.ndarray:
    """Repeats the last index until there are T."""
    return np.concatenate([indices, np.full(num_frames - len(indices), indices[-1])])
