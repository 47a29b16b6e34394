"""The contrastive loss: soft targets, symmetry, sharding, temperature and gradient scale."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from iv2_jax.objectives.contrastive import (
    clamp_temperature,
    contrastive_loss,
    scale_gradient,
    similarity,
    soft_targets,
)

TEMPERATURE = jnp.float32(0.1)


def _pairs(batch=8, width=5, seed=0):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(batch, width)).astype(np.float32) for _ in range(2))
    return a, b, np.array([0, 1, 2, 1, 4, 5, 0, 7][:batch])


def test_similarity_is_the_cosine_over_the_temperature():
    a, b, _ = _pairs()
    wanted = (a[2] @ b[3]) / np.linalg.norm(a[2]) / np.linalg.norm(b[3]) / 0.1
    np.testing.assert_allclose(similarity(a, b, TEMPERATURE)[2, 3], wanted, rtol=1e-5)
    np.testing.assert_allclose(similarity(3 * a, b), similarity(a, b), atol=1e-6)


def test_frames_are_averaged_or_the_best_is_taken():
    a, b, _ = _pairs()
    frames = np.stack([a, np.roll(a, 1, axis=0)], axis=1)
    single = np.stack([similarity(frames[:, i], b) for i in range(2)])
    np.testing.assert_allclose(similarity(frames, b), single.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(similarity(frames, b, 1.0, "max"), single.max(axis=0), atol=1e-6)
    np.testing.assert_allclose(similarity(b, frames), single.mean(axis=0).T, atol=1e-6)
    with pytest.raises(ValueError, match="frames='sum'"):
        similarity(frames, b, 1.0, "sum")
    with pytest.raises(ValueError, match="only one side"):
        similarity(frames, frames)


def test_repeated_ids_share_the_target():
    targets = np.asarray(soft_targets(jnp.array([3, 1, 3, 3]), jnp.array([3, 1, 3, 3])))
    np.testing.assert_allclose(targets[0], [1 / 3, 0, 1 / 3, 1 / 3], atol=1e-7)
    np.testing.assert_allclose(targets[1], [0, 1, 0, 0])


def test_loss_is_the_mean_of_two_cross_entropies():
    a, b, ids = _pairs()
    scores = np.asarray(similarity(a, b, TEMPERATURE), np.float64)
    targets = np.asarray(soft_targets(ids, ids), np.float64)

    def cross_entropy(scores):
        logs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return -(targets * logs).sum(axis=1).mean()

    wanted = (cross_entropy(scores) + cross_entropy(scores.T)) / 2
    loss = contrastive_loss(a, b, TEMPERATURE, ids)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(contrastive_loss(b, a, TEMPERATURE, ids), loss, rtol=1e-5)


def test_shards_give_the_global_loss_and_gradient():
    a, b, ids = _pairs()
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))

    def local(a, b, ids):
        every = partial(jax.lax.all_gather, axis_name="data", tiled=True)
        loss = contrastive_loss(
            a, b, TEMPERATURE, ids, all_a=every(a), all_b=every(b), all_ids=every(ids)
        )
        return jax.lax.pmean(loss, "data")

    rows = PartitionSpec("data")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=PartitionSpec())
    value, grads = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))(a, b, ids)
    whole, wanted = jax.value_and_grad(
        lambda a, b: contrastive_loss(a, b, TEMPERATURE, ids), argnums=(0, 1)
    )(a, b)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), grads, wanted)


def test_gradient_scale_reaches_features_and_not_the_temperature():
    a, b, ids = _pairs()

    def loss(a, temperature, factor):
        return contrastive_loss(scale_gradient(a, factor), b, temperature, ids)

    whole, part = (jax.value_and_grad(loss, argnums=(0, 1))(a, TEMPERATURE, f) for f in (1.0, 0.25))
    assert whole[0] == part[0]
    np.testing.assert_allclose(part[1][0], 0.25 * whole[1][0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(part[1][1], whole[1][1], rtol=1e-6)


@pytest.mark.parametrize(("value", "clamped"), [(0.07, 0.07), (0.9, 0.5), (-1.0, 0.001)])
def test_temperature_is_clamped_and_its_gradient_is_not(value, clamped):
    result, gradient = jax.value_and_grad(lambda t: 3.0 * clamp_temperature(t))(jnp.float32(value))
    np.testing.assert_allclose(result, 3 * clamped, rtol=1e-5)
    assert gradient == 3.0


def test_clip_has_no_upper_bound():
    assert clamp_temperature(jnp.float32(2.0), 0.01, None) == 2.0
    np.testing.assert_allclose(clamp_temperature(jnp.float32(0.0), 0.01, None), 0.01, rtol=1e-6)
