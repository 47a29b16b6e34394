"""Next-token loss: what is scored by what, and how means are taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.data.dialogue import IGNORE
from iv2_jax.objectives.next_token import next_token_loss


def _case(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, 6, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (4, 6)).astype(np.int32)
    targets[rng.random((4, 6)) < 0.4] = IGNORE
    return logits, targets


def _row_losses(logits, targets):
    """Losses of each row's targets, one after the other."""
    rows = []
    for scores, row in zip(logits.astype(np.float64), targets, strict=True):
        log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        rows.append([-log_probs[i - 1, row[i]] for i in range(1, len(row)) if row[i] != IGNORE])
    return rows


def test_mean_over_all_targets():
    logits, targets = _case()
    losses = np.concatenate(_row_losses(logits, targets))
    loss, metrics = next_token_loss(logits, targets)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-6)
    assert metrics["targets"] == len(losses)
    best = logits[:, :-1].argmax(-1) == targets[:, 1:]
    np.testing.assert_allclose(metrics["accuracy"], best.sum() / len(losses), rtol=1e-6)


def test_mean_of_the_devices_means():
    logits, targets = _case()
    rows = _row_losses(logits, targets)
    loss, _ = next_token_loss(logits, targets, groups=2)
    means = [np.mean(rows[0] + rows[1]), np.mean(rows[2] + rows[3])]
    np.testing.assert_allclose(loss, np.mean(means), rtol=1e-6)
    with pytest.raises(ValueError, match="groups=3"):
        next_token_loss(logits, targets, groups=3)


def test_positions_left_out_get_no_gradient():
    logits, targets = _case()
    gradient = jax.grad(lambda x: next_token_loss(x, targets)[0])(jnp.asarray(logits))
    moved = np.abs(np.asarray(gradient)).sum(-1) > 0
    np.testing.assert_array_equal(moved[:, :-1], targets[:, 1:] != IGNORE)
    assert not moved[:, -1].any()


def test_nothing_to_learn_is_zero_and_a_wrong_id_is_nan():
    logits, targets = _case()
    loss, metrics = next_token_loss(logits, np.full_like(targets, IGNORE))
    assert loss == 0
    assert metrics["targets"] == 0
    targets[0, 3] = 11
    assert jnp.isnan(next_token_loss(logits, targets)[0])
