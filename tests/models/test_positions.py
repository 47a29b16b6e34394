from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.models import positions


def test_joint_table_by_its_formula():
    """Token (frame 2, row 1, column 3): time D/4, then column 3D/8, then row 3D/8 (spec 2.2)."""
    width, grid = 32, (3, 2, 4)
    table = positions.sincos_3d(width, grid, has_cls=True)
    assert table.shape == (1 + 24, width)

    def half(size, position):
        angles = position * 10000.0 ** (-np.arange(size // 2) / (size / 2))
        return np.concatenate([np.sin(angles), np.cos(angles)])

    token = 1 + (2 * 2 + 1) * 4 + 3
    expected = np.concatenate([half(8, 2), half(12, 3), half(12, 1)])
    np.testing.assert_allclose(table[token], expected, atol=1e-7)
    np.testing.assert_array_equal(table[0], 0)
    np.testing.assert_array_equal(positions.sincos_3d(width, grid, has_cls=False), table[1:])


def test_widths_that_do_not_split_are_refused():
    with pytest.raises(ConfigError, match="width=40"):
        positions.sincos_3d(40, (1, 2, 2), has_cls=True)
    with pytest.raises(ConfigError, match="even"):
        positions.sincos_2d(6, (2, 2))


def test_resizing_to_the_same_grid_changes_no_bit():
    table = np.random.default_rng(0).normal(size=(1, 1 + 2 * 9, 5)).astype(np.float32)
    np.testing.assert_array_equal(positions.resize_positions(table, (2, 3, 3), (2, 3, 3)), table)


def test_resizing_keeps_the_class_row_and_other_axes():
    table = np.random.default_rng(0).normal(size=(1, 1 + 4 * 9, 5)).astype(np.float32)
    out = positions.resize_positions(table, (4, 3, 3), (8, 3, 3))
    assert out.shape == (1, 1 + 8 * 9, 5)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out[0, 0], table[0, 0])
    np.testing.assert_array_equal(out[0, 1:10], table[0, 1:10])  # frame 0 is clamped to the first
    mixed = 0.75 * table[0, 1:10] + 0.25 * table[0, 10:19]
    np.testing.assert_allclose(out[0, 10:19], mixed, rtol=1e-6)


def test_resizing_refuses_another_size():
    with pytest.raises(ConfigError, match=r"\(1, 9, 4\).*\(2, 2, 2\) without class token"):
        positions.resize_positions(np.zeros((1, 9, 4)), (2, 2, 2), (1, 2, 2), has_cls=False)


@pytest.mark.parametrize("weights", [positions.linear_weights, positions.cubic_weights])
def test_interpolation_keeps_constants(weights):
    for size, new_size in ((16, 24), (24, 16), (5, 7), (1, 4), (4, 1)):
        np.testing.assert_allclose(weights(size, new_size).sum(axis=1), 1.0, atol=1e-6)


def test_interpolation_agrees_with_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is the reference of this test")
    image = np.random.default_rng(0).normal(size=(1, 2, 16, 16)).astype(np.float32)
    for mode, weights in (
        ("bicubic", positions.cubic_weights),
        ("bilinear", positions.linear_weights),
    ):
        for size in (24, 14, 9):
            reference = torch.nn.functional.interpolate(
                torch.tensor(image), size=(size, size), mode=mode, align_corners=False
            )
            ours = weights(16, size) @ image @ weights(16, size).T
            np.testing.assert_allclose(ours, reference.numpy(), atol=2e-6)


def test_area_weights_share_each_old_cell_out():
    weights = positions.area_weights(3, 2)
    np.testing.assert_allclose(weights, [[1, 0.5, 0], [0, 0.5, 1]])
    for size, new_size in ((4, 6), (16, 7), (5, 5), (1, 3)):
        weights = positions.area_weights(size, new_size)
        np.testing.assert_allclose(weights.sum(axis=0), 1.0)
        np.testing.assert_allclose(weights.sum(axis=1), size / new_size)
    np.testing.assert_array_equal(positions.area_weights(4, 4), np.eye(4))
