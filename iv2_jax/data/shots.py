"""Sliding a shot-boundary network over a video, cutting scenes; NumPy only (spec stage3 13.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from iv2_jax.errors import ConfigError

WINDOW = 100
STRIDE = 50
# Frames at each end of a window that only give context; the middle `STRIDE` ones are kept.
MARGIN = (WINDOW - STRIDE) // 2
# What InternVideo2 cut its data with. AutoShot's authors found 0.296 best on their own set.
THRESHOLD = 0.5

Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def window_frames(num_frames: int) -> np.ndarray:
    """Which frames each window holds.

    The first and the last frame stand in for what lies beyond the ends, so every frame is in the
    middle of exactly one window.

    Args:
        num_frames: frames of the video.

    Returns:
        int64 `(windows, WINDOW)` frame numbers, a window every `STRIDE` frames.

    Raises:
        ConfigError: there is no frame.
    """
    if num_frames < 1:
        raise ConfigError(f"num_frames={num_frames}: a video of at least one frame is needed")
    starts = np.arange(-(-num_frames // STRIDE))[:, None] * STRIDE - MARGIN
    return np.clip(starts + np.arange(WINDOW), 0, num_frames - 1)


def predict_video(
    predict: Predict, frames: np.ndarray, *, batch_size: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of every frame of a video of any length.

    Args:
        predict: takes uint8 `(batch_size, WINDOW, H, W, 3)`, gives two arrays of logits
            `(batch_size, WINDOW)`: middle of a transition, anywhere in one. It always gets whole
            batches, so a compiled function is compiled once.
        frames: uint8 `(n, H, W, 3)` RGB, at the network's size; may be memory-mapped.
        batch_size: windows a call.

    Returns:
        Two float32 `(n,)` arrays of probabilities, in the order of `predict`.

    Raises:
        ConfigError: there is no frame, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1")
    kept: tuple[list, list] = ([], [])
    for windows, count in _batches(window_frames(len(frames)), batch_size):
        for logits, parts in zip(predict(frames[windows]), kept, strict=True):
            middle = np.asarray(logits, np.float32)[:count, MARGIN : MARGIN + STRIDE]
            parts.append(_sigmoid(middle).reshape(-1))
    single, every = (np.concatenate(parts)[: len(frames)] for parts in kept)
    return single, every


def scenes(probabilities: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Cuts a video into scenes.

    A frame above the threshold is a transition; the first one of a run closes the scene before
    it, and the first one after the run opens the next. Frames between are in no scene.

    Args:
        probabilities: `(n,)`, that each frame is the middle of a transition.
        threshold: a probability must be above it, not equal.

    Returns:
        int64 `(scenes, 2)` first and last frame, both inclusive; one scene of all frames if every
        frame is a transition.

    Raises:
        ConfigError: there is no frame.
    """
    if len(probabilities) == 0:
        raise ConfigError("probabilities: a video of at least one frame is needed")
    cut = np.asarray(probabilities) > threshold
    change = np.flatnonzero(cut[1:] != cut[:-1]) + 1
    starts, ends = change[~cut[change]], change[cut[change]]
    # A transition at the very start closes nothing, one at the very end is closed by nothing.
    if not cut[0]:
        starts = np.concatenate([[0], starts])
    if not cut[-1]:
        ends = np.concatenate([ends, [len(cut) - 1]])
    if len(starts) == 0:
        return np.array([[0, len(cut) - 1]])
    return np.stack([starts, ends], axis=1)


def _batches(windows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Groups of `size` windows, the last one filled up with its last, and how many are real."""
    for start in range(0, len(windows), size):
        group = windows[start : start + size]
        missing = size - len(group)
        yield np.concatenate([group, np.repeat(group[-1:], missing, axis=0)]), len(group)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logistic function that does not overflow."""
    return np.float32(0.5) * (np.tanh(np.float32(0.5) * logits) + 1)
