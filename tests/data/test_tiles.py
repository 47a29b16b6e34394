"""Grid choice, resizing and cutting of high-definition views (spec stage3 3)."""

from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.data import tiles
from iv2_jax.errors import ConfigError, DataError


def test_candidates_of_six():
    assert tiles.candidate_grids(6) == (
        (1, 1),
        (1, 2),
        (2, 1),
        (1, 3),
        (3, 1),
        (1, 4),
        (2, 2),
        (4, 1),
        (1, 5),
        (5, 1),
        (1, 6),
        (2, 3),
        (3, 2),
        (6, 1),
    )


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (1920, 1080, (2, 1)),
        (1280, 720, (2, 1)),
        (854, 480, (2, 1)),
        (640, 480, (3, 2)),
        (320, 240, (3, 2)),
        (500, 400, (3, 2)),
        (480, 480, (2, 2)),
        (320, 320, (2, 2)),
        (224, 224, (1, 1)),
        (316, 316, (1, 1)),
        (720, 1280, (1, 2)),
        (480, 640, (2, 3)),
        (1080, 1350, (2, 3)),
        (1000, 300, (3, 1)),
        (3000, 400, (6, 1)),
    ],
)
def test_grid_is_the_nearest(width, height, grid):
    chosen = tiles.choose_grid(height, width)
    assert chosen == grid
    assert chosen.num_views == grid[0] * grid[1] + 1


def test_tiles_go_row_by_row_and_the_global_view_is_last():
    size, rows, columns = 4, 2, 3
    row, column = np.meshgrid(np.arange(rows * size), np.arange(columns * size), indexing="ij")
    frames = np.stack([row, column, np.zeros_like(row)], axis=-1)[None].repeat(2, 0)
    views = tiles.split_views(frames, size)
    assert views.shape == (7, 2, size, size, 3)
    for index in range(6):
        assert (views[index, 0, 0, 0, :2] == (index // 3 * size, index % 3 * size)).all()
    # Away from the border bicubic resizing keeps a plane: the centres of the cells' centres.
    np.testing.assert_allclose(views[6, 1, 1, 1, :2], [2.5, 4.0], atol=1e-6)


def test_one_tile_gives_two_views_and_pixels_keep_their_units():
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    views = tiles.hd_views(frames, tiles.TilingConfig(tile_size=16))
    assert views.dtype == np.float32
    np.testing.assert_array_equal(views, np.stack([frames, frames]).astype(np.float32))


def test_resizing_overshoots_and_is_not_clamped():
    frames = np.zeros((1, 8, 8, 1), np.uint8)
    frames[:, :, 4:] = 255
    resized = tiles.resize_bicubic(frames, 16, 16)
    assert resized.max() > 255
    assert resized.min() < 0


def test_a_fixed_grid_is_used_whatever_the_aspect():
    config = tiles.TilingConfig(tile_size=8, fixed_grid=(2, 1))
    assert tiles.hd_views(np.zeros((1, 30, 10, 3)), config).shape == (3, 1, 8, 8, 3)


def test_misfits_are_refused():
    with pytest.raises(ConfigError, match="fixed_grid=\\(4, 2\\)"):
        tiles.TilingConfig(fixed_grid=(4, 2))
    with pytest.raises(ConfigError, match="tile_size=0"):
        tiles.TilingConfig(tile_size=0)
    with pytest.raises(DataError, match="no whole number of tiles of 8"):
        tiles.split_views(np.zeros((1, 12, 8, 3)), 8)
    with pytest.raises(DataError, match="no pixels"):
        tiles.choose_grid(0, 5)


def test_samples_with_different_grids_make_one_batch():
    samples = [np.full((count, 2, 4, 4, 3), count, np.float32) for count in (2, 3)]
    batch = tiles.stack_views(samples)
    assert batch.shape == (2, 3, 2, 4, 4, 3)
    assert batch[:, :, 0, 0, 0, 0].tolist() == [[2, 2, 0], [3, 3, 3]]
    assert tiles.stack_views(samples, 5).shape[1] == 5
    with pytest.raises(DataError, match="sample 1 has views"):
        tiles.stack_views(samples, 2)
    with pytest.raises(DataError, match="sample 1 has views"):
        tiles.stack_views([samples[0], samples[1][:, :1]])
