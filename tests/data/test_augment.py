"""Crops, resizes and flips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iv2_jax.data import augment


def _frames(height, width, count=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def test_crop_sizes_snap_to_the_output():
    sizes = augment.crop_sizes(340, 256, 224)
    assert len(sizes) == 10
    assert set(sizes) == {
        (w, h)
        for i, h in enumerate((256, 224, 192, 168))
        for j, w in enumerate((256, 224, 192, 168))
        if abs(i - j) <= 1
    }
    assert (224, 224) in augment.crop_sizes(300, 226, 224)  # 226 is within 3 pixels


def test_thirteen_corners():
    corners = augment.crop_offsets(340, 256, (224, 192))
    assert len(set(corners)) == 13
    assert {(0, 0), (116, 0), (0, 64), (116, 64), (58, 32)} <= set(corners)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(2, 400),
    height=st.integers(2, 400),
    size=st.integers(2, 64),
    seed=st.integers(0, 1000),
)
def test_crops_lie_inside_the_picture(width, height, size, seed):
    x, y, w, h = augment.draw_crop(width, height, size, np.random.default_rng(seed))
    assert min(x, y) >= 0
    assert min(w, h) > 0
    assert x + w <= width
    assert y + h <= height


def test_a_side_does_not_snap_past_the_edge():
    assert max(max(pair) for pair in augment.crop_sizes(60, 62, 61)) == 60


def test_one_draw_for_the_whole_clip_and_pillows_pixels():
    frames = np.repeat(_frames(70, 90, 1), 3, axis=0)
    for seed in range(6):
        out = augment.multiscale_crop(frames, 32, np.random.default_rng(seed), flip=True)
        assert out.shape == (3, 32, 32, 3)
        assert (out == out[0]).all()
        rng = np.random.default_rng(seed)
        x, y, w, h = augment.draw_crop(90, 70, 32, rng)
        image = Image.fromarray(frames[0]).crop((x, y, x + w, y + h))
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
        if rng.random() < 0.5:
            expected = expected[:, ::-1]
        np.testing.assert_array_equal(out[0], expected)


def test_flip_can_be_off_without_changing_the_other_draws():
    frames = _frames(40, 50)
    flipped = 0
    for seed in range(20):
        on, off = (
            augment.multiscale_crop(frames, 16, np.random.default_rng(seed), flip=flip)
            for flip in (True, False)
        )
        same, mirrored = (on == off).all(), (on == off[:, :, ::-1]).all()
        assert same or mirrored
        flipped += not same
    assert 4 < flipped < 16


def test_linear_resize_has_half_pixel_centres_and_no_antialiasing():
    ramp = np.zeros((1, 4, 8, 3), np.uint8)
    ramp[:] = (np.arange(8) * 16)[None, None, :, None]
    out = augment.linear_resize(ramp, 4, 4)[0, 0, :, 0]
    assert out.tolist() == [8, 40, 72, 104]
    out = augment.linear_resize(ramp, 4, 16)[0, 0, :, 0]
    assert out.tolist()[:4] == [0, 4, 12, 20]
    spike = np.zeros((1, 9, 9, 3), np.uint8)
    spike[:, 4, 4] = 255
    assert augment.linear_resize(spike, 3, 3).max() == 255  # an antialiased one would be 28


@pytest.mark.parametrize("shape", [(37, 61), (61, 37), (32, 32), (20, 50)])
def test_window_equals_cropping_afterwards(shape):
    frames = _frames(*shape)
    height, width = augment.short_side_size(*shape, 32)
    window = augment.center_window(height, width, 24)
    whole = augment.linear_resize(frames, height, width)
    part = augment.linear_resize(frames, height, width, window=window)
    np.testing.assert_array_equal(part, whole[:, window[0], window[1]])


@pytest.mark.parametrize("crops", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (40, 40)])
def test_views(shape, crops):
    views = augment.eval_views(_frames(*shape), 32, num_crops=crops)
    assert views.shape == (crops, 2, 32, 32, 3)
    resized = augment.resize_short(_frames(*shape), 32)
    if crops > 1:
        np.testing.assert_array_equal(views[0], resized[:, :32, :32])
        np.testing.assert_array_equal(views[-1], resized[:, -32:, -32:])


def test_bad_sizes():
    with pytest.raises(ValueError, match="no short side of 32"):
        augment.crop_window(40, 50, 32)
    with pytest.raises(ValueError, match="has no 32x32 centre"):
        augment.center_window(30, 50, 32)


def test_view_fusion_averages_probabilities():
    logits = np.log([[0.9, 0.1], [0.2, 0.8]])
    np.testing.assert_allclose(augment.fuse_views(logits), [0.55, 0.45])
    np.testing.assert_allclose(augment.fuse_views(np.array([[1e4, 0.0]])), [1.0, 0.0])
