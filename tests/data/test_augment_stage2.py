"""Stage-2 crops and bicubic resizing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iv2_jax.data import augment_stage2
from iv2_jax.data.augment_stage2 import bicubic_resize, draw_resized_crop, stretch


def _frames(height, width, count=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 1000))
def test_crops_lie_inside_the_picture(width, height, seed):
    y, x, h, w = draw_resized_crop(height, width, np.random.default_rng(seed))
    assert min(x, y) >= 0
    assert min(w, h) > 0
    assert x + w <= width
    assert y + h <= height


def test_areas_and_shapes_are_as_asked():
    rng = np.random.default_rng(0)
    drawn = np.array([draw_resized_crop(300, 400, rng) for _ in range(2000)])
    y, x, h, w = drawn.T
    areas, shapes = h * w / 120_000, w / h
    assert 0.49 < areas.min() < 0.52
    assert areas.max() > 0.9
    assert 0.74 < shapes.min() < 0.77
    assert 1.3 < shapes.max() < 1.35
    assert np.log(shapes).std() > 0.13
    assert len(np.unique(x)) > 80
    assert len(np.unique(y)) > 50
    whole = draw_resized_crop(30, 30, rng, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert whole == (0, 0, 30, 30)


def test_where_no_draw_fits_the_centre_is_taken():
    rng = np.random.default_rng(0)
    assert draw_resized_crop(300, 30, rng) == (130, 0, 40, 30)
    assert draw_resized_crop(30, 300, rng) == (0, 130, 30, 40)
    assert draw_resized_crop(1, 1000, rng) == (0, 499, 1, 1)


@pytest.mark.parametrize("antialias", [True, False])
def test_one_draw_for_the_whole_clip(antialias):
    frames = np.repeat(_frames(70, 90, 1), 3, axis=0)
    flipped = 0
    for seed in range(20):
        out, unflipped = (
            augment_stage2.random_resized_crop(
                frames, 32, np.random.default_rng(seed), flip=flip, antialias=antialias
            )
            for flip in (True, False)
        )
        assert out.shape == (3, 32, 32, 3)
        assert out.flags.c_contiguous
        assert (out == out[0]).all()
        y, x, h, w = draw_resized_crop(70, 90, np.random.default_rng(seed))
        expected = bicubic_resize(frames[:, y : y + h, x : x + w], 32, 32, antialias=antialias)
        np.testing.assert_array_equal(unflipped, expected)
        same, mirrored = (out == unflipped).all(), (out == unflipped[:, :, ::-1]).all()
        assert same or mirrored
        flipped += not same
    assert 4 < flipped < 16


def test_fine_patterns_alias_only_without_antialiasing():
    stripes = np.zeros((1, 96, 96, 3), np.uint8)
    stripes[:, :, ::3] = 255
    grey = stretch(stripes, 40)[0, 10:-10, 10:-10]
    assert np.abs(grey - 85.0).max() < 25
    assert stretch(stripes, 40, antialias=False)[0, 10:-10, 10:-10].std() > 80


@pytest.mark.parametrize("antialias", [True, False])
def test_ends_of_the_range_stay_within_it(antialias):
    step = np.zeros((1, 20, 20, 3), np.uint8)
    step[:, :, 10:] = 255
    out = stretch(step, 44, antialias=antialias)[0, 20, :, 0]
    assert out[:16].max() == 0  # an undershoot that wrapped around would be near 255
    assert out[28:].min() == 255
    flat = np.full((2, 31, 47, 3), 137, np.uint8)
    assert (stretch(flat, 24, antialias=antialias) == 137).all()


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 200), (57, 38)])
def test_any_size_of_picture(shape, antialias):
    out = bicubic_resize(_frames(*shape), 17, 23, antialias=antialias)
    assert out.shape == (2, 17, 23, 3)
    same = _frames(17, 23)
    np.testing.assert_array_equal(bicubic_resize(same, 17, 23, antialias=antialias), same)


@pytest.mark.parametrize("antialias", [True, False])
def test_mirroring_and_turning_commute_with_resizing(antialias):
    frames = _frames(50, 70)
    out = bicubic_resize(frames, 24, 32, antialias=antialias).astype(int)
    mirrored = bicubic_resize(frames[:, :, ::-1], 24, 32, antialias=antialias)[:, :, ::-1]
    turned = bicubic_resize(frames.swapaxes(1, 2), 32, 24, antialias=antialias).swapaxes(1, 2)
    assert np.abs(out - mirrored).max() <= 1
    assert np.abs(out - turned).max() <= 1


@pytest.mark.torch
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("shape", "new"), [((256, 340), (224, 224)), ((60, 45), (80, 70)), ((300, 210), (64, 64))]
)
def test_torch_interpolate(shape, new, antialias):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    frames = _frames(*shape)
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    theirs = torch.nn.functional.interpolate(tensor, new, mode="bicubic", antialias=antialias)
    theirs = theirs.round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(int)
    off = np.abs(bicubic_resize(frames, *new, antialias=antialias) - theirs)
    assert off.max() <= 1  # a value that lies half way between two levels
    assert (off > 0).mean() < 2e-4
