"""Probes: right on data where the answer is known, at chance where there is nothing to find."""

from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.eval.knn import knn_accuracy, neighbours
from iv2_jax.eval.linear_probe import linear_probe


def clusters(rng, n, noise):
    labels = rng.integers(0, 3, n)
    centres = np.eye(3, 20) * 4
    return (centres[labels] + noise * rng.normal(size=(n, 20))).astype(np.float32), labels


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_separable_classes_are_found(rng):
    (x, y), (tx, ty) = clusters(rng, 120, 0.5), clusters(rng, 60, 0.5)
    assert linear_probe(x, y, tx, ty).accuracy == 1.0
    assert knn_accuracy(x, y, tx, ty) == 1.0


def test_noise_stays_near_chance(rng):
    x, tx = rng.normal(size=(150, 20)), rng.normal(size=(300, 20))
    y, ty = rng.integers(0, 3, 150), rng.integers(0, 3, 300)
    assert 0.2 < linear_probe(x, y, tx, ty).accuracy < 0.47
    assert 0.2 < knn_accuracy(x, y, tx, ty) < 0.47


def test_probe_matches_a_direct_solution(rng):
    """Two classes in one dimension: the boundary lies in the middle."""
    x = np.concatenate([rng.normal(-2, 1, 200), rng.normal(2, 1, 200)])[:, None]
    y = np.repeat([0, 1], 200)
    grid = np.linspace(-4, 4, 401)[:, None]
    got = linear_probe(x, y, grid, (grid[:, 0] > 0).astype(int))
    assert got.accuracy > 0.95


def test_scale_and_constant_features_do_not_matter(rng):
    (x, y), (tx, ty) = clusters(rng, 90, 2.0), clusters(rng, 90, 2.0)
    plain = linear_probe(x, y, tx, ty)
    pad = lambda a: np.concatenate([a * 1e4, np.full((len(a), 3), 7.0)], axis=1)  # noqa: E731
    scaled = linear_probe(pad(x), y, pad(tx), ty)
    assert abs(plain.accuracy - scaled.accuracy) < 0.05


def test_groups_keep_copies_out_of_the_validation_fold(rng):
    """With each row copied five times an ungrouped split would prefer the weakest penalty."""
    x, y = rng.normal(size=(30, 60)), rng.integers(0, 2, 30)
    x5, y5 = np.repeat(x, 5, 0), np.repeat(y, 5)
    grouped = linear_probe(x5, y5, x, y, groups=np.repeat(np.arange(30), 5), seed=1)
    ungrouped = linear_probe(x5, y5, x, y, seed=1)
    assert ungrouped.penalty <= grouped.penalty


def test_neighbours_are_nearest_first(rng):
    keys = rng.normal(size=(50, 8))
    index, cosine = neighbours(keys[:5], keys, 4)
    assert (index[:, 0] == np.arange(5)).all()
    assert (np.diff(cosine, axis=1) <= 0).all()
