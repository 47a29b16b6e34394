"""Which tokens the student sees: sampling by the teacher's attention, on the device.

Visible tokens are int32 index rows `(B, N)` into the token sequence, sorted, class token (0)
first. N is static; boolean indexing is never used.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.errors import ConfigError
from iv2_jax.models.positions import linear_weights

SCOPES = ("frame", "clip")


def num_visible(num_tokens: int, mask_ratio: float) -> int:
    """Tokens kept out of `num_tokens` when `int(num_tokens * mask_ratio)` are hidden.

    Args:
        num_tokens: patches of a frame (scope 'frame') or of the clip (scope 'clip').
        mask_ratio: share to hide, in [0, 1).

    Raises:
        ConfigError: the ratio is out of range.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ConfigError(f"mask_ratio={mask_ratio}: must be in [0, 1)")
    return num_tokens - int(num_tokens * mask_ratio)


def sampling_keys(saliency: jax.Array, noise: jax.Array) -> jax.Array:
    """Keys whose descending order is a draw without replacement, weighted by saliency.

    `saliency / e` with e ~ Exp(1) ranks as `torch.multinomial` does without replacement. Tokens of
    no saliency come after all others, in uniformly random order, so that any saliency, all-zero
    and NaN included, gives a valid mask.

    Args:
        saliency: non-negative, any shape.
        noise: Exp(1) draws of the same shape.

    Returns:
        float32 keys of the same shape, finite.
    """
    saliency, noise = saliency.astype(jnp.float32), noise.astype(jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    keys = jnp.minimum(saliency / jnp.maximum(noise, tiny), jnp.finfo(jnp.float32).max)
    return jnp.where(saliency > 0, keys, -noise)


def attention_guided_visible(
    saliency: jax.Array, noise: jax.Array, num_visible: int, *, scope: str = "frame"
) -> jax.Array:
    """Draws the visible tokens of each clip by the teacher's attention (spec stage1 3.5, 5).

    Args:
        saliency: `(B, F, L)` non-negative, on the student's grid of F frames of L patches; rows
            need not sum to one.
        noise: `(B, F, L)` draws from Exp(1).
        num_visible: patches kept in each frame (scope 'frame') or in the clip (scope 'clip').
        scope: 'frame' keeps the same number in every frame (stage 1), 'clip' draws once over the
            whole clip (distillation of the small models).

    Returns:
        int32 `(B, 1 + F * num_visible)` or `(B, 1 + num_visible)`, sorted, class token (0) first.

    Raises:
        ConfigError: shapes differ, the scope is unknown or `num_visible` is out of range.
    """
    if saliency.shape != noise.shape or saliency.ndim != 3:
        raise ConfigError(
            f"saliency {saliency.shape} and noise {noise.shape} must both be (B, frames, patches)"
        )
    if scope not in SCOPES:
        raise ConfigError(f"mask scope {scope!r}: choose one of {', '.join(SCOPES)}")
    batch, frames, length = saliency.shape
    limit = length if scope == "frame" else frames * length
    if not 1 <= num_visible <= limit:
        raise ConfigError(f"num_visible={num_visible}: must be in [1, {limit}] per {scope}")
    keys = sampling_keys(saliency, noise)
    if scope == "clip":
        index = jax.lax.top_k(keys.reshape(batch, -1), num_visible)[1]
    else:
        index = jax.lax.top_k(keys, num_visible)[1] + length * jnp.arange(frames)[:, None]
    index = jnp.sort(index.reshape(batch, -1), axis=1) + 1
    return jnp.pad(index, ((0, 0), (1, 0))).astype(jnp.int32)


def uniform_saliency(batch: int, grid: tuple[int, int, int]) -> jax.Array:
    """Saliency `(B, T, H*W)` of ones: every token is as likely to be seen as any other."""
    return jnp.ones((batch, grid[0], grid[1] * grid[2]), jnp.float32)


def resize_saliency(
    saliency: jax.Array, from_grid: tuple[int, int, int], to_grid: tuple[int, int, int]
) -> jax.Array:
    """Moves saliency from the teacher's grid to the student's, linearly along each axis.

    Args:
        saliency: `(B, T, H*W)` non-negative, on `from_grid`.
        from_grid: `(T, H, W)` of the teacher.
        to_grid: `(T', H', W')` of the student.

    Returns:
        `(B, T', H'*W')` float32, non-negative: the weights are those of PyTorch's bilinear
        interpolation (half-pixel centres, no antialiasing), all in [0, 1].

    Raises:
        ConfigError: `saliency` is not of `from_grid`'s size.
    """
    if saliency.shape[1:] != (from_grid[0], from_grid[1] * from_grid[2]):
        raise ConfigError(f"saliency of shape {saliency.shape} does not fit grid {from_grid}")
    if tuple(from_grid) == tuple(to_grid):
        return saliency.astype(jnp.float32)
    weights = [
        jnp.asarray(linear_weights(size, new_size), jnp.float32)
        for size, new_size in zip(from_grid, to_grid, strict=True)
    ]
    x = saliency.astype(jnp.float32).reshape(-1, *from_grid)
    x = jnp.einsum("bthw,at,ch,dw->bacd", x, *weights)
    return x.reshape(-1, to_grid[0], to_grid[1] * to_grid[2])


def mask_to_visible(mask: np.ndarray) -> np.ndarray:
    """Turns boolean masks (True = hidden) into index rows.

    Args:
        mask: bool `(B, N)` on the host, class token first.

    Returns:
        int32 `(B, N_visible)`, sorted.

    Raises:
        ConfigError: rows keep different numbers of tokens, or one hides the class token.
    """
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.ndim != 2:
        raise ConfigError(f"mask has dtype {mask.dtype} and shape {mask.shape}; bool (B, N) needed")
    if mask[:, 0].any():
        row = int(mask[:, 0].argmax())
        raise ConfigError(f"mask row {row} hides token 0, the class token, which is always visible")
    counts = (~mask).sum(axis=1)
    if len(mask) and (counts != counts[0]).any():
        row = int((counts != counts[0]).argmax())
        raise ConfigError(
            f"mask row {row} keeps {counts[row]} tokens, row 0 keeps {counts[0]}: every clip of a "
            "batch must keep the same number"
        )
    return np.nonzero(~mask)[1].reshape(len(mask), -1).astype(np.int32)
