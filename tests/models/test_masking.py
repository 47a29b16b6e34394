from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.models import masking


def _draw(saliency, count, scope, seed=0):
    noise = jax.random.exponential(jax.random.key(seed), saliency.shape)
    return np.asarray(masking.attention_guided_visible(saliency, noise, count, scope=scope))


def test_num_visible_truncates_the_hidden_count():
    assert masking.num_visible(256, 0.8) == 52
    assert masking.num_visible(2048, 0.8) == 410
    assert masking.num_visible(16, 0.0) == 16
    with pytest.raises(ConfigError, match=r"mask_ratio=1.0: must be in \[0, 1\)"):
        masking.num_visible(16, 1.0)


@pytest.mark.parametrize(("scope", "kept"), [("frame", 1 + 3 * 4), ("clip", 1 + 4)])
def test_rows_are_sorted_distinct_and_start_with_the_class_token(scope, kept):
    visible = _draw(masking.uniform_saliency(5, (3, 2, 5)), 4, scope)
    assert visible.shape == (5, kept)
    assert visible.dtype == np.int32
    assert (visible[:, 0] == 0).all()
    assert (np.diff(visible, axis=1) > 0).all()
    assert visible.max() <= 30
    if scope == "frame":
        frames = (visible[:, 1:] - 1) // 10
        np.testing.assert_array_equal(frames, np.tile(np.repeat(np.arange(3), 4), (5, 1)))


def test_one_token_is_drawn_in_proportion_to_saliency():
    saliency = jnp.tile(jnp.array([1.0, 2.0, 5.0]), (8000, 1, 1))
    first = _draw(saliency, 1, "frame")[:, 1] - 1
    share = np.bincount(first, minlength=3) / len(first)
    np.testing.assert_allclose(share, [1 / 8, 2 / 8, 5 / 8], atol=0.02)


def test_scale_of_saliency_does_not_matter():
    saliency = jax.random.uniform(jax.random.key(1), (4, 2, 9))
    a, b = (_draw(scale * saliency, 3, "frame") for scale in (1.0, 2.0**-20))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_saliency_that_says_nothing_gives_a_uniform_draw(value):
    saliency = jnp.full((6000, 1, 4), value)
    visible = _draw(saliency, 2, "frame") - 1
    share = np.bincount(visible[:, 1:].ravel(), minlength=4) / visible[:, 1:].size
    np.testing.assert_allclose(share, 0.25, atol=0.02)


def test_tokens_without_saliency_come_last():
    saliency = jnp.array([[[0.0, 1e-30, 0.0, 1e30, 0.0]]])
    for seed in range(5):
        np.testing.assert_array_equal(_draw(saliency, 2, "clip", seed), [[0, 2, 4]])
    keys = masking.sampling_keys(saliency, jnp.zeros_like(saliency))  # the rarest noise
    assert np.isfinite(keys).all()


def test_wrong_arguments_are_named():
    saliency = masking.uniform_saliency(1, (2, 3, 3))
    with pytest.raises(ConfigError, match="scope 'video': choose one of frame, clip"):
        _draw(saliency, 2, "video")
    with pytest.raises(ConfigError, match=r"num_visible=10: must be in \[1, 9\] per frame"):
        _draw(saliency, 10, "frame")
    with pytest.raises(ConfigError, match="noise"):
        masking.attention_guided_visible(saliency, saliency[:, :1], 1)


def test_resizing_saliency():
    saliency = jax.random.uniform(jax.random.key(0), (2, 4, 9))
    same = masking.resize_saliency(saliency, (4, 3, 3), (4, 3, 3))
    np.testing.assert_array_equal(same, saliency)
    up = masking.resize_saliency(saliency, (4, 3, 3), (8, 5, 7))
    assert up.shape == (2, 8, 35)
    assert up.min() >= 0
    constant = masking.resize_saliency(jnp.ones((1, 2, 16)), (2, 4, 4), (3, 3, 5))
    np.testing.assert_allclose(constant, 1.0, rtol=1e-6)
    # a peak stays where it is: column 3 of 4 in row 0 becomes columns 6 and 7 of 8
    peak = jnp.zeros((1, 1, 16)).at[0, 0, 3].set(1.0)
    moved = masking.resize_saliency(peak, (1, 4, 4), (1, 8, 8)).reshape(8, 8)
    assert moved[0, 7] == 1.0
    assert moved[0, 6] == 0.75
    assert moved[7].max() == 0
    with pytest.raises(ConfigError, match=r"\(2, 4, 9\).*\(4, 3, 4\)"):
        masking.resize_saliency(saliency, (4, 3, 4), (4, 3, 3))


def test_mask_to_visible():
    mask = np.array([[False, True, False, True], [False, False, True, True]])
    visible = masking.mask_to_visible(mask)
    np.testing.assert_array_equal(visible, [[0, 2], [0, 1]])
    assert visible.dtype == np.int32
    with pytest.raises(ConfigError, match="row 1 keeps 3 tokens, row 0 keeps 2"):
        masking.mask_to_visible(np.array([[False, True, False, True], [False, False, True, False]]))
    with pytest.raises(ConfigError, match="row 0 hides token 0"):
        masking.mask_to_visible(np.array([[True, False]]))
    with pytest.raises(ConfigError, match="int64"):
        masking.mask_to_visible(mask.astype(np.int64))
