"""Masks that do not look at the video: tube and random (spec stage1 3.5).

Drawn on the host, as NumPy. Masks guided by a teacher's attention are drawn on the device
(`iv2_jax.models.masking`).
"""

from __future__ import annotations

import numpy as np


def _shuffled(
    size: int, ratio: float, rng: np.random.Generator | np.random.RandomState
) -> np.ndarray:
    """(size,) bool with int(ratio * size) True in random places."""
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"mask ratio must be from 0 up to but not including 1, is {ratio}")
    hidden = int(ratio * size)
    mask = np.hstack([np.zeros(size - hidden), np.ones(hidden)])
    rng.shuffle(mask)
    return mask.astype(bool)


def tube_mask(
    grid: tuple[int, int, int],
    ratio: float,
    rng: np.random.Generator | np.random.RandomState,
) -> np.ndarray:
    """One spatial pattern, the same in every frame.

    Args:
      grid: (T', H', W') of the tokens.
      ratio: share that is hidden; int(ratio * H' * W') tokens a frame.
      rng: a generator, or a legacy `RandomState` to repeat the released code's draws.

    Returns:
      (T' * H' * W',) bool, frame-major then row-major, True = hidden, no class token.
    """
    frames, height, width = grid
    return np.tile(_shuffled(height * width, ratio, rng), frames)


def random_mask(
    grid: tuple[int, int, int],
    ratio: float,
    rng: np.random.Generator | np.random.RandomState,
) -> np.ndarray:
    """int(ratio * T' * H' * W') tokens of the whole clip; see `tube_mask`."""
    return _shuffled(grid[0] * grid[1] * grid[2], ratio, rng)


def to_visible(mask: np.ndarray, *, class_token: bool = True) -> np.ndarray:
    """Indices of the visible tokens.

    Args:
      mask: (..., N) bool, True = hidden, without a class token; every row hides equally many.
      class_token: put token 0 in front and move the others up by one.

    Returns:
      (..., N_visible) int32, ascending.

    Raises:
      ValueError: the rows hide different numbers of tokens.
    """
    flat = mask.reshape(-1, mask.shape[-1])
    counts = (~flat).sum(axis=1)
    if np.any(counts != counts[0]):
        raise ValueError(f"rows show from {counts.min()} to {counts.max()} tokens; need one number")
    visible = np.nonzero(~flat)[1].reshape(*mask.shape[:-1], int(counts[0])).astype(np.int32)
    if not class_token:
        return visible
    front = np.zeros((*visible.shape[:-1], 1), np.int32)
    return np.concatenate([front, visible + 1], axis=-1)
