"""Position tables and their resizing: NumPy in float64, rounded once to float32.

Resizing follows PyTorch's `interpolate` (half-pixel centres, no antialiasing, cubic a = -0.75,
borders clamped), which `jax.image.resize` does not (spec stage1 6.6).
"""

from __future__ import annotations

import numpy as np

from iv2_jax.errors import ConfigError

CUBIC_A = -0.75


def sincos(width: int, positions: np.ndarray) -> np.ndarray:
    """Sines then cosines of `positions` at `width / 2` frequencies (spec stage1 2.2).

    Args:
        width: number of features, even.
        positions: `(N,)`.

    Returns:
        `(N, width)` float64.

    Raises:
        ConfigError: `width` is odd.
    """
    if width % 2:
        raise ConfigError(f"a sine-cosine table needs an even number of features, not {width}")
    frequencies = 1.0 / 10000.0 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = positions.reshape(-1, 1).astype(np.float64) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_1d(width: int, length: int) -> np.ndarray:
    """Table `(length, width)`, float32, over time."""
    return sincos(width, np.arange(length)).astype(np.float32)


def sincos_2d(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Table `(H * W, width)`, float32: first half from the column, second half from the row."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    table = np.concatenate([sincos(width // 2, columns), sincos(width // 2, rows)], axis=1)
    return table.astype(np.float32)


def sincos_3d(width: int, grid: tuple[int, int, int], *, has_cls: bool) -> np.ndarray:
    """Joint table of time, column and row, in this order, with D/4, 3D/8 and 3D/8 features.

    Args:
        width: number of features D, a multiple of 16.
        grid: `(T, H, W)`.
        has_cls: puts a row of zeros in front, for the class token.

    Returns:
        `(has_cls + T * H * W, width)` float32, time-major, then row, then column.

    Raises:
        ConfigError: `width` does not split.
    """
    if width % 16:
        raise ConfigError(
            f"width={width}: a joint position table needs a multiple of 16 "
            "(or set separable_positions)"
        )
    frames, height, columns = grid
    time = np.repeat(sincos(width // 4, np.arange(frames)), height * columns, axis=0)
    space = np.concatenate(
        [
            np.tile(sincos(3 * width // 8, np.arange(columns)), (height, 1)),
            np.repeat(sincos(3 * width // 8, np.arange(height)), columns, axis=0),
        ],
        axis=1,
    )
    table = np.concatenate([time, np.tile(space, (frames, 1))], axis=1)
    if has_cls:
        table = np.concatenate([np.zeros((1, width)), table])
    return table.astype(np.float32)


def videomae_sinusoid(
    width: int,
    grid: tuple[int, int, int],
    table_grid: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """VideoMAE's table: interleaved sines and cosines of the flattened token number (spec 4.2).

    Args:
        width: number of features.
        grid: `(T, H, W)` wanted.
        table_grid: grid the table is written for; when it differs from `grid` the table is resized
            (bicubic in space, linear in time). None means `grid`.

    Returns:
        `(T * H * W, width)` float32.
    """
    table_grid = table_grid or grid
    feature = np.arange(width)
    positions = np.arange(np.prod(table_grid), dtype=np.float64)[:, None]
    angles = positions / 10000.0 ** (2 * (feature // 2) / width)
    table = np.where(feature % 2 == 0, np.sin(angles), np.cos(angles)).astype(np.float32)
    return resize_positions(table[None], table_grid, grid, has_cls=False)[0]


def linear_weights(size: int, new_size: int) -> np.ndarray:
    """Matrix `(new_size, size)` of PyTorch's 1-D linear interpolation, align_corners=False."""
    source = np.maximum(_source_centres(size, new_size), 0.0)
    low = np.minimum(np.floor(source).astype(np.int64), size - 1)
    fraction = source - low
    weights = np.zeros((new_size, size))
    row = np.arange(new_size)
    np.add.at(weights, (row, low), 1.0 - fraction)
    np.add.at(weights, (row, np.minimum(low + 1, size - 1)), fraction)
    return weights


def cubic_weights(size: int, new_size: int) -> np.ndarray:
    """Matrix `(new_size, size)` of PyTorch's 1-D cubic interpolation, a = -0.75, clamped."""
    source = _source_centres(size, new_size)
    low = np.floor(source).astype(np.int64)
    fraction = (source - low).astype(np.float32)
    weights = np.zeros((new_size, size))
    row = np.arange(new_size)
    for offset in (-1, 0, 1, 2):
        weight = _cubic_kernel(np.abs(fraction - np.float32(offset)))
        np.add.at(weights, (row, np.clip(low + offset, 0, size - 1)), weight)
    return weights


def _source_centres(size: int, new_size: int) -> np.ndarray:
    """Where the centres of new cells lie among old ones; rounded to float32, as PyTorch does."""
    scale = np.float64(np.float32(size) / np.float32(new_size))
    return ((np.arange(new_size) + 0.5) * scale - 0.5).astype(np.float32).astype(np.float64)


def _cubic_kernel(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel at non-negative float32 distances, in float32."""
    a, x = CUBIC_A, distance
    near = _fma(_fma(_fma(a + 2, x, -(a + 3)), x, 0), x, 1)
    far = _fma(_fma(_fma(a, x, -5 * a), x, 8 * a), x, -4 * a)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _fma(a: np.ndarray | float, b: np.ndarray, c: float) -> np.ndarray:
    """`a * b + c` rounded once to float32."""
    return (np.asarray(a, np.float64) * np.asarray(b, np.float64) + c).astype(np.float32)


def resize_positions(
    table: np.ndarray,
    from_grid: tuple[int, int, int],
    to_grid: tuple[int, int, int],
    *,
    has_cls: bool = True,
) -> np.ndarray:
    """Resizes a position table: linear in time, then bicubic in space (spec stage1 6.6).

    An axis whose size stays the same is left untouched, bit for bit, and so is the class row.

    Args:
        table: `(1, has_cls + T * H * W, D)`.
        from_grid: `(T, H, W)` of `table`.
        to_grid: `(T', H', W')` wanted.
        has_cls: the first row belongs to the class token.

    Returns:
        `(1, has_cls + T' * H' * W', D)` in the dtype of `table`.

    Raises:
        ConfigError: `table` does not have the size of `from_grid`.
    """
    table = np.asarray(table)
    prefix = int(has_cls)
    rows = int(np.prod(from_grid))
    if table.ndim != 3 or table.shape[:2] != (1, prefix + rows):
        raise ConfigError(
            f"position table of shape {table.shape} does not fit grid {from_grid} "
            f"{'with' if has_cls else 'without'} class token: (1, {prefix + rows}, D) is needed"
        )
    width = table.shape[-1]
    grid = table[0, prefix:].reshape(*from_grid, width)
    if from_grid[0] != to_grid[0]:
        grid = np.einsum("ab,bhwd->ahwd", linear_weights(from_grid[0], to_grid[0]), grid)
    if tuple(from_grid[1:]) != tuple(to_grid[1:]):
        grid = np.einsum("ab,tbwd->tawd", cubic_weights(from_grid[1], to_grid[1]), grid)
        grid = np.einsum("ab,thbd->thad", cubic_weights(from_grid[2], to_grid[2]), grid)
    grid = grid.reshape(1, -1, width).astype(table.dtype)
    return np.concatenate([table[:, :prefix], grid], axis=1)


def area_weights(size: int, new_size: int) -> np.ndarray:
    """Matrix `(new_size, size)`: share of each old cell's length that lies in each new cell.

    Columns sum to one. Computed in whole numbers, so that cells that only touch share exactly 0.
    """
    old = np.arange(size) * new_size
    new = (np.arange(new_size) * size)[:, None]
    overlap = np.minimum(old + new_size, new + size) - np.maximum(old, new)
    return np.maximum(overlap, 0) / new_size
