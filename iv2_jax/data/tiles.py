"""Dynamic-resolution views of a clip for the dialogue model: tiles of a grid and a global view.

A clip is resized to the grid of square tiles whose aspect ratio is nearest its own, cut into the
tiles, row by row, and shown once more whole at the size of one tile (spec stage3 3). NumPy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from iv2_jax.errors import ConfigError, DataError
from iv2_jax.models.positions import cubic_weights  # NumPy only, like this module


class TileGrid(NamedTuple):
    """Tiles along the width and the height of a clip; the original writes it (i, j)."""

    columns: int
    rows: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the grid."""
        return self.columns * self.rows

    @property
    def num_views(self) -> int:
        """Tiles and the global view, which a grid of one tile has too."""
        return self.num_tiles + 1


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """How a clip is cut into views (spec stage3 3.1).

    Attributes:
        tile_size: height and width of a view in pixels.
        max_tiles: most tiles of a grid, the global view not counted.
        fixed_grid: (columns, rows) used whatever the aspect ratio; the released example of the HD
            model fixes (2, 1) (spec stage3 3.4). None chooses by aspect ratio.

    Raises:
        ConfigError: a size is below 1, or the fixed grid has more than `max_tiles` tiles.
    """

    tile_size: int = 224
    max_tiles: int = 6
    fixed_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for field in ("tile_size", "max_tiles"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)}: at least 1 is needed")
        if self.fixed_grid is not None:
            columns, rows = self.fixed_grid
            if min(columns, rows) < 1 or columns * rows > self.max_tiles:
                raise ConfigError(
                    f"fixed_grid={self.fixed_grid}: columns and rows of at least 1 with at most "
                    f"max_tiles={self.max_tiles} tiles are needed"
                )

    def grid(self, height: int, width: int) -> TileGrid:
        """The grid for a clip of this size in pixels."""
        if self.fixed_grid is not None:
            return TileGrid(*self.fixed_grid)
        return choose_grid(height, width, max_tiles=self.max_tiles, tile_size=self.tile_size)


def candidate_grids(max_tiles: int) -> tuple[TileGrid, ...]:
    """Every grid of at most `max_tiles` tiles, the smallest first, then the narrowest."""
    sides = range(1, max_tiles + 1)
    grids = (TileGrid(i, j) for i in sides for j in sides if i * j <= max_tiles)
    return tuple(sorted(grids, key=lambda grid: (grid.num_tiles, grid.columns)))


def choose_grid(height: int, width: int, *, max_tiles: int = 6, tile_size: int = 224) -> TileGrid:
    """Chooses the grid whose aspect ratio is nearest the clip's (spec stage3 3.1).

    Of grids that are equally near, a larger one is taken when the clip has more than half as many
    pixels as it.

    Args:
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        max_tiles: most tiles of a grid.
        tile_size: side of a tile in pixels.

    Returns:
        Columns and rows.

    Raises:
        DataError: the frame is empty.
    """
    if height < 1 or width < 1:
        raise DataError(f"a frame of height {height} and width {width} has no pixels to tile")
    ratio = width / height
    best, least = TileGrid(1, 1), float("inf")
    for grid in candidate_grids(max_tiles):
        distance = abs(ratio - grid.columns / grid.rows)
        is_large = width * height > 0.5 * tile_size * tile_size * grid.num_tiles
        if distance < least or (distance == least and is_large):
            best, least = grid, distance
    return best


def resize_bicubic(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes as PyTorch's `interpolate(mode='bicubic')` does: a = -0.75, no antialiasing.

    Args:
        frames: `(T, H, W, C)`, uint8 or float.
        height: of the result, in pixels.
        width: of the result, in pixels.

    Returns:
        `(T, height, width, C)` float32; not clamped, so values may leave the range of the pixels.
    """
    x = np.asarray(frames, np.float32)
    if x.shape[1] != height:
        weights = cubic_weights(x.shape[1], height).astype(np.float32)
        shape = (len(x), x.shape[1], x.shape[2] * x.shape[3])
        x = np.matmul(weights, x.reshape(shape)).reshape(len(x), height, *x.shape[2:])
    if x.shape[2] != width:
        x = np.matmul(cubic_weights(x.shape[2], width).astype(np.float32), x)
    return x


def resize_to_grid(frames: np.ndarray, grid: TileGrid, tile_size: int = 224) -> np.ndarray:
    """Resizes `(T, H, W, C)` to the grid's size; the aspect ratio is not kept.

    Returns:
        `(T, rows * tile_size, columns * tile_size, C)` float32, not clamped.
    """
    return resize_bicubic(frames, grid.rows * tile_size, grid.columns * tile_size)


def split_views(frames: np.ndarray, tile_size: int = 224) -> np.ndarray:
    """Cuts frames that fill a grid into its tiles, and adds the global view (spec stage3 3.2).

    Args:
        frames: `(T, rows * tile_size, columns * tile_size, C)`.
        tile_size: side of a tile in pixels.

    Returns:
        `(V, T, tile_size, tile_size, C)` float32: tiles row by row, from the left, then the whole
        clip resized to one tile; V = rows * columns + 1.

    Raises:
        DataError: the frames are not a whole number of tiles.
    """
    count, height, width, channels = frames.shape
    if height % tile_size or width % tile_size:
        raise DataError(
            f"frames of {height} x {width} pixels are no whole number of tiles of {tile_size}; "
            "resize_to_grid makes them so"
        )
    rows, columns = height // tile_size, width // tile_size
    tiles = np.asarray(frames, np.float32).reshape(
        count, rows, tile_size, columns, tile_size, channels
    )
    tiles = tiles.transpose(1, 3, 0, 2, 4, 5).reshape(-1, count, tile_size, tile_size, channels)
    whole = resize_bicubic(frames, tile_size, tile_size)
    return np.concatenate([tiles, whole[None]])


def hd_views(frames: np.ndarray, config: TilingConfig | None = None) -> np.ndarray:
    """The views of a clip that enter the video encoder, each on its own.

    Bicubic resizing is linear and nothing is clamped, so normalising the pixels before or after
    is the same (spec stage3 3.4); this module leaves it to the model.

    Args:
        frames: `(T, H, W, 3)`, uint8 or float.
        config: tile size and choice of the grid; None for the released 224 pixels and 6 tiles.

    Returns:
        `(V, T, tile_size, tile_size, 3)` float32 in the units of `frames`.
    """
    config = config or TilingConfig()
    grid = config.grid(*frames.shape[1:3])
    return split_views(resize_to_grid(frames, grid, config.tile_size), config.tile_size)


def stack_views(samples: Sequence[np.ndarray], num_views: int | None = None) -> np.ndarray:
    """Puts the views of several samples into one array, filled up with zeros.

    Views that fill up cost as much as others: batch samples of like grids together.

    Args:
        samples: B arrays `(V, T, S, S, C)`, V each its own, the rest alike.
        num_views: views of a row; None for the most that a sample has.

    Returns:
        `(B, num_views, T, S, S, C)`; `dialogue` gives no slot to what fills up.

    Raises:
        DataError: a sample has more views than `num_views`, or another shape than the first.
    """
    most = max(len(sample) for sample in samples)
    num_views = most if num_views is None else num_views
    out = np.zeros((len(samples), num_views, *samples[0].shape[1:]), samples[0].dtype)
    for row, sample in enumerate(samples):
        if len(sample) > num_views or sample.shape[1:] != out.shape[2:]:
            raise DataError(
                f"sample {row} has views of shape {sample.shape}; at most {num_views} views of "
                f"{out.shape[2:]} fit the batch"
            )
        out[row, : len(sample)] = sample
    return out
