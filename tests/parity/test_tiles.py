"""High-definition views against the original: grids exact, pixels within rounding."""

from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.data import tiles
from tests.parity import goldens


@pytest.fixture(scope="module")
def case(golden):
    return golden("chat_hd_tiles")


def test_grids(case):
    assert case.meta["aspect_table"]
    for row in case.meta["aspect_table"]:
        grid = tiles.choose_grid(
            row["h"], row["w"], max_tiles=row["hd_num"], tile_size=row["image_size"]
        )
        assert grid == tuple(row["ratio_w_h"]), row


def test_views(case):
    frames = case.inputs["frames_TCHW"].transpose(0, 2, 3, 1)
    size = case.meta["local_size"]
    resized = case.outputs["resized_TCHW"].transpose(0, 2, 3, 1)
    config = tiles.TilingConfig(tile_size=size)
    grid = config.grid(*frames.shape[1:3])
    assert (grid.rows * size, grid.columns * size) == resized.shape[1:3]
    ours = tiles.resize_to_grid(frames, grid, size)
    goldens.assert_close(ours, resized, goldens.OUTPUT_LIMIT, "resized")
    views = case.outputs["tiles_NCTHW"].transpose(0, 2, 3, 4, 1)
    goldens.assert_close(
        tiles.hd_views(frames, config), views, goldens.OUTPUT_LIMIT, "tiles and global view"
    )
    # Cutting moves pixels and computes nothing.
    np.testing.assert_array_equal(tiles.split_views(resized, size)[:-1], views[:-1])
