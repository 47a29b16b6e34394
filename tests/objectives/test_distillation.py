from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.objectives.distillation import alignment_loss, final_loss, gather_targets


def _unit(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_loss_is_the_mean_squared_distance_of_unit_vectors():
    u, v = _unit(2, 3, 4, 8), _unit(2, 3, 4, 8, seed=1)
    expected = ((u - v) ** 2).sum(-1).mean()
    np.testing.assert_allclose(alignment_loss(u, v), expected, rtol=1e-6)
    expected = ((u - v)[0, 0] ** 2).sum(-1).mean()
    np.testing.assert_allclose(final_loss(u[0, 0], v[0, 0]), expected, rtol=1e-6)
    assert abs(alignment_loss(u, u)) < 1e-6
    np.testing.assert_allclose(alignment_loss(u, -u), 4.0, rtol=1e-6)


def test_weights_choose_tokens():
    u, v = _unit(2, 3, 4, 8), _unit(2, 3, 4, 8, seed=1)
    weight = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], np.float32)
    distance = ((u - v) ** 2).sum(-1)
    expected = distance[:, weight.astype(bool)].mean()
    np.testing.assert_allclose(alignment_loss(u, v, weight), expected, rtol=1e-6)
    np.testing.assert_allclose(
        alignment_loss(u, v, np.ones((3, 4), np.float32)), alignment_loss(u, v), rtol=1e-6
    )


def test_all_zero_weights_give_zero_loss_and_gradient():
    u, v = _unit(1, 2, 3, 4), _unit(1, 2, 3, 4, seed=1)
    value, grad = jax.value_and_grad(alignment_loss)(jnp.asarray(u), v, jnp.zeros((2, 3)))
    assert value == 0
    np.testing.assert_array_equal(grad, 0)


def test_low_precision_inputs_are_summed_in_float32():
    u = jnp.asarray(_unit(1, 1, 1, 4096), jnp.bfloat16)
    loss = alignment_loss(u, u)
    assert loss.dtype == jnp.float32
    wide = u.astype(jnp.float32)
    np.testing.assert_allclose(loss, 2 - 2 * jnp.sum(wide * wide), atol=1e-6)


def test_targets_are_gathered_with_and_without_class_token():
    target = np.random.default_rng(0).normal(size=(2, 2, 6, 3)).astype(np.float32)
    visible = np.array([[0, 2, 5], [0, 1, 3]], np.int32)
    with_cls = gather_targets(target, visible, has_cls=True)
    without = gather_targets(target, visible, has_cls=False)
    assert with_cls.shape == (2, 2, 3, 3)
    assert without.shape == (2, 2, 2, 3)
    for row in range(2):
        np.testing.assert_array_equal(with_cls[:, row], target[:, row, visible[row]])
        np.testing.assert_array_equal(without[:, row], target[:, row, visible[row, 1:] - 1])
    beyond = gather_targets(target, np.array([[0, 6], [0, 1]]), has_cls=True)
    assert np.isnan(beyond[:, 0, 1]).all()
