"""Masked language modelling: shares of corrupted tokens, specials, labels and the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.objectives.masked_lm import IGNORED, corrupt, masked_lm_loss, masked_lm_sums

PAD, CLS, MASK, VOCAB = 0, 2, 4, 1000


def _corrupt(ids, key=0, **options):
    return corrupt(
        jax.random.key(key), ids, vocab_size=VOCAB, mask_id=MASK, special_ids=(PAD, CLS), **options
    )


@pytest.fixture(scope="module")
def big():
    ids = jnp.asarray(np.random.default_rng(0).integers(10, VOCAB, (200, 100)))
    return ids, *_corrupt(ids)


def test_half_of_the_tokens_are_chosen(big):
    ids, _, labels = big
    chosen = labels != IGNORED
    assert chosen.mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(labels[chosen], ids[chosen])


def test_of_them_four_fifths_are_hidden_a_tenth_replaced_a_tenth_kept(big):
    ids, corrupted, labels = big
    chosen = labels != IGNORED
    hidden = (corrupted == MASK)[chosen].mean()
    kept = (corrupted == ids)[chosen].mean()
    assert hidden == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    assert 1 - hidden - kept == pytest.approx(0.1, abs=0.02)


def test_the_others_stay(big):
    ids, corrupted, labels = big
    left = labels == IGNORED
    np.testing.assert_array_equal(corrupted[left], ids[left])


def test_specials_are_never_chosen():
    ids = jnp.tile(jnp.array([[CLS, 50, 51, PAD, PAD]]), (100, 1))
    corrupted, labels = _corrupt(ids, probability=1.0)
    assert (labels[:, jnp.array([0, 3, 4])] == IGNORED).all()
    np.testing.assert_array_equal(labels[:, 1:3], ids[:, 1:3])
    np.testing.assert_array_equal(corrupted[:, 3:], ids[:, 3:])


def test_corruption_is_a_function_of_the_key():
    ids = jnp.arange(10, 110).reshape(4, 25)
    first, again, other = (_corrupt(ids, key) for key in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first[0] != other[0]).any()
    assert first[0].dtype == ids.dtype


def test_loss_is_the_mean_over_labelled_places():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    labels = jnp.array([[IGNORED, 4, IGNORED], [0, IGNORED, 2]])
    logs = jax.nn.log_softmax(logits, axis=-1)
    wanted = -np.mean([logs[0, 1, 4], logs[1, 0, 0], logs[1, 2, 2]])
    np.testing.assert_allclose(masked_lm_loss(logits, labels), wanted, rtol=1e-5)


def test_nothing_to_guess_is_zero_with_a_zero_gradient():
    labels = jnp.full((1, 2), IGNORED)
    value, gradient = jax.value_and_grad(masked_lm_loss)(jnp.ones((1, 2, 3)), labels)
    assert value == 0
    assert (gradient == 0).all()


def test_sums_of_shards_make_the_whole():
    logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    labels = np.full((4, 3), IGNORED)
    labels[0], labels[1, 1], labels[3, 2] = [1, 2, 3], 0, 4
    parts = [masked_lm_sums(logits[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    total, count = (sum(x) for x in zip(*parts, strict=True))
    assert count == 5
    np.testing.assert_allclose(total / count, masked_lm_loss(logits, labels), rtol=1e-6)
