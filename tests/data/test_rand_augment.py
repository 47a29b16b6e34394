"""RandAugment of clips, fine-tuning's crop, and views that share their frames."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from iv2_jax.data import augment, rand_augment, rows
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.rand_augment import OPERATIONS, RandAugmentConfig
from iv2_jax.errors import ConfigError


def _frames(count=3, height=40, width=56, seed=0):
    """Ramps with grain, all alike but for their brightness."""
    y, x = np.mgrid[:height, :width]
    grain = np.random.default_rng(seed).integers(-6, 7, (height, width))
    waves = (60 + 1.5 * x + 20 * np.cos(y / 12) + grain)[..., None] + [0, 20, 40]
    return np.stack([np.clip(waves + 3 * t, 0, 255) for t in range(count)]).astype(np.uint8)


def _applied(operation, share, frame, sign=1.0):
    change = operation(share, sign, *frame.shape[:2])
    return np.asarray(change(Image.fromarray(frame))).astype(int)


def test_larger_magnitudes_change_more():
    frame = _frames(1)[0]
    for operation in OPERATIONS[3:]:  # the first three have no magnitude
        change = [np.abs(_applied(operation, share, frame) - frame).mean() for share in (0.3, 0.9)]
        assert change[0] < change[1], operation


def test_magnitudes_are_the_spec_s():
    names = {operation.__name__: operation for operation in OPERATIONS}
    frame = _frames(1)[0]
    # Level 7 of 10: 4 - int(2.8) bits, threshold 256 - 179, 77 added below 128, 0.315 of the width.
    posterized = _applied(names["_posterize"], 0.7, frame)
    np.testing.assert_array_equal(posterized, frame & 0b11000000)
    solarized = _applied(names["_solarize"], 0.7, frame)
    np.testing.assert_array_equal(solarized, np.where(frame < 77, frame, 255 - frame.astype(int)))
    added = _applied(names["_solarize_add"], 0.7, frame)
    np.testing.assert_array_equal(added, np.where(frame < 128, frame.astype(int) + 77, frame))
    moved = _applied(names["_translate_x"], 20 / (0.45 * 56), frame)
    np.testing.assert_allclose(moved[:, : 56 - 20], frame[:, 20:], atol=1)
    assert np.all(moved[:, 56 - 19 :] == 128)


def test_a_clip_has_one_draw_for_all_frames():
    frames = np.repeat(_frames(1), 3, axis=0)
    config = RandAugmentConfig(probability=1.0)
    rng = np.random.default_rng(1)
    seen = [rand_augment.rand_augment(frames, config, rng) for _ in range(6)]
    for out in seen:
        np.testing.assert_array_equal(out, np.repeat(out[:1], 3, axis=0))
    assert len({out.tobytes() for out in seen}) == 6
    again = rand_augment.rand_augment(frames, config, np.random.default_rng(1))
    np.testing.assert_array_equal(again, seen[0])


def test_half_of_the_operations_are_done():
    rng = np.random.default_rng(0)
    counts = [len(rand_augment.draw(RandAugmentConfig(), rng, 8, 8)) for _ in range(500)]
    assert 1.85 < np.mean(counts) < 2.15
    assert max(counts) == 4


def test_the_crop_is_bilinear():
    frames = _frames()
    rng = np.random.default_rng(0)
    whole = augment.random_resized_crop(frames, 40, rng, scale=(1.0, 1.0), flip=False)
    assert whole.shape == (3, 40, 40, 3)
    crops = [augment.random_resized_crop(frames, 40, rng) for _ in range(8)]
    assert len({crop.tobytes() for crop in crops}) == 8
    # A straight ramp stays straight: nothing rings, as bicubic would.
    ramp = np.broadcast_to(
        np.where(np.arange(56) < 28, 0, 255)[None, None, :, None], (1, 40, 56, 3)
    )
    out = augment.random_resized_crop(ramp.astype(np.uint8), 80, rng, scale=(0.9, 1.0), flip=False)
    assert np.all(np.diff(out[0, 0, :, 0].astype(int)) >= 0)


class _Clip:
    """A clip that remembers which frames were asked for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 30

    def read(self, indices):
        self.asked.append(list(indices))
        return _frames(30)[np.asarray(indices)]


def test_copies_share_their_frames_and_differ_in_their_crops():
    config = DataConfig(
        source="unused",
        num_frames=4,
        size=24,
        views=3,
        shared_frames=True,
        augment="finetune_crop",
        rand_augment=RandAugmentConfig(),
    )
    clip = _Clip()
    views = rows.load_views(clip, config, np.random.default_rng(0))
    assert views.shape == (3, 4, 24, 24, 3)
    assert [len(asked) for asked in clip.asked] == [4]
    assert len({view.tobytes() for view in views}) == 3
    other = dataclasses.replace(config, shared_frames=False)
    rows.load_views(clip, other, np.random.default_rng(0))
    assert len(clip.asked[-1]) == 12
    # Evaluation goes through its own views, unchanged.
    fixed = dataclasses.replace(config, eval=True, augment="center")
    rows.load_views(clip, fixed, np.random.default_rng(0))
    assert len(set(clip.asked[-1])) == 12


@pytest.mark.parametrize(
    "fields", [{"ops": 0}, {"magnitude": 11.0}, {"deviation": -1.0}, {"probability": 0.0}], ids=str
)
def test_mistakes_are_refused(fields):
    with pytest.raises(ConfigError, match=f"rand_augment.{next(iter(fields))}"):
        RandAugmentConfig(**fields)
