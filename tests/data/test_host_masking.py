"""Tube and random masks drawn on the host."""

from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.data import masking


def test_tube_hides_the_same_places_in_every_frame():
    mask = masking.tube_mask((3, 4, 5), 0.8, np.random.default_rng(0)).reshape(3, 20)
    assert mask.dtype == bool
    assert (mask.sum(axis=1) == 16).all()
    assert (mask == mask[0]).all()


def test_random_hides_a_share_of_the_clip():
    mask = masking.random_mask((3, 4, 5), 0.75, np.random.default_rng(0))
    assert mask.shape == (60,)
    assert mask.sum() == 45
    assert len({tuple(f) for f in mask.reshape(3, 20)}) == 3


def test_visible_indices():
    mask = np.array([[True, False, False, True], [False, True, True, False]])
    assert masking.to_visible(mask).tolist() == [[0, 2, 3], [0, 1, 4]]
    visible = masking.to_visible(mask[0], class_token=False)
    assert visible.tolist() == [1, 2]
    assert visible.dtype == np.int32


def test_nothing_hidden():
    mask = masking.tube_mask((2, 2, 2), 0.0, np.random.default_rng(0))
    assert masking.to_visible(mask).tolist() == list(range(9))


def test_errors():
    with pytest.raises(ValueError, match="mask ratio"):
        masking.random_mask((1, 2, 2), 1.0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="rows show from 1 to 2 tokens"):
        masking.to_visible(np.array([[True, False], [False, False]]))
