"""Matching: how negatives are weighted and drawn, what is judged, and the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.objectives.matching import (
    draw_negatives,
    matching_batch,
    matching_loss,
    negative_weights,
    uniform_weights,
)


def test_weights_are_shares_without_equal_ids():
    scores = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [5.0, 1.0, 2.0]])
    weights = np.asarray(negative_weights(scores, jnp.array([7, 8, 7])))
    shares = np.asarray(jax.nn.softmax(scores, axis=1))
    np.testing.assert_allclose(weights[1], [shares[1, 0], 0, shares[1, 2]], rtol=1e-6)
    np.testing.assert_allclose(weights[0], [0, shares[0, 1], 0], rtol=1e-6)


def test_what_is_not_finite_counts_little():
    scores = jnp.array([[jnp.nan, 1.0], [0.0, 0.0]])
    weights = np.asarray(negative_weights(scores, jnp.array([0, 1])))
    np.testing.assert_allclose(weights[0], [0, 0.01])


def test_no_gradient_flows_through_the_weights():
    gradient = jax.grad(lambda s: negative_weights(s, jnp.arange(3))[0, 1])(jnp.eye(3))
    assert (gradient == 0).all()


def test_draws_follow_the_weights_and_never_a_zero():
    weights = jnp.tile(jnp.array([[0.0, 3.0, 1.0, 0.0]]), (4000, 1))
    columns, valid = draw_negatives(jax.random.key(0), weights)
    counts = np.bincount(columns, minlength=4) / 4000
    assert counts[0] == counts[3] == 0
    assert counts[1] == pytest.approx(0.75, abs=0.03)
    assert valid.all()
    assert columns.dtype == jnp.int32


def test_draws_are_a_function_of_the_key():
    weights = uniform_weights(jnp.arange(16))
    first, second, other = (draw_negatives(jax.random.key(k), weights)[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    assert (first != jnp.arange(16)).all()


def test_a_row_without_negatives_is_told():
    ids = jnp.array([5, 5, 6])
    _, valid = draw_negatives(jax.random.key(0), uniform_weights(ids))
    assert valid.tolist() == [True, True, True]
    _, valid = draw_negatives(jax.random.key(0), uniform_weights(ids[:2]))
    assert valid.tolist() == [False, False]


def test_the_batch_is_pairs_then_wrong_media_then_wrong_texts():
    media, text = jnp.arange(3.0).reshape(3, 1, 1), 10 + jnp.arange(3.0).reshape(3, 1, 1)
    mask = jnp.array([[1], [2], [3]])
    tokens, hidden, masks = matching_batch(
        media, text, mask, jnp.array([1, 2, 0]), jnp.array([2, 0, 1])
    )
    assert tokens[:, 0, 0].tolist() == [0, 1, 2, 1, 2, 0, 0, 1, 2]
    assert hidden[:, 0, 0].tolist() == [10, 11, 12, 10, 11, 12, 12, 10, 11]
    assert masks[:, 0].tolist() == [1, 2, 3, 1, 2, 3, 3, 1, 2]


def test_loss_is_the_mean_cross_entropy():
    logits = np.random.default_rng(0).normal(size=(9, 2))
    labels = [1, 1, 1, 0, 0, 0, 0, 0, 0]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = -np.mean([row[label] for row, label in zip(logs, labels, strict=True)])
    np.testing.assert_allclose(matching_loss(logits), wanted, rtol=1e-5)


def test_pairs_without_a_negative_are_left_out():
    logits = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    valid = jnp.array([True, False])
    damaged = logits.copy()
    damaged[[3, 5]] = 50.0
    results = [matching_loss(x, valid, valid) for x in (logits, damaged)]
    np.testing.assert_allclose(*results)
    assert abs(results[0] - matching_loss(logits)) > 1e-3
    nothing = jnp.zeros(2, bool)
    np.testing.assert_allclose(
        matching_loss(logits, nothing, nothing),
        -np.mean(jax.nn.log_softmax(logits[:2], axis=1)[:, 1]),
        rtol=1e-5,
    )
