"""Gradients part by part: means of the parts', split over devices or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.objectives.next_token import next_token_loss, target_weights
from iv2_jax.parallel.mesh import MeshConfig, batch_sharding, check_batch_size, make_mesh
from iv2_jax.train.accumulate import mean_over_parts

PARTS = 4


def test_parts_of_a_token_loss_are_the_whole_batchs():
    """Rows with unequal numbers of targets, on four devices; frozen parameters have no gradient."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6, 5)).astype(np.float32)
    targets = rng.integers(0, 7, (16, 6))
    targets[rng.random(targets.shape) < np.linspace(0, 1, 16)[:, None]] = -100
    params = {"w": rng.normal(size=(5, 7)).astype(np.float32), "frozen": np.ones(7, np.float32)}
    mask = {"w": True, "frozen": False}
    mesh = make_mesh(MeshConfig(fsdp=4, data=1, max_devices=4))

    def gradients(part, key):
        def loss(params):
            logits = part["x"] @ params["w"] + jax.lax.stop_gradient(params["frozen"])
            weights, after = part["weight"], part["targets"][:, 1:]
            losses = -jnp.take_along_axis(
                jax.nn.log_softmax(logits[:, :-1]),
                jnp.maximum(part["targets"][:, 1:], 0)[..., None],
                2,
            )
            total = jnp.sum(weights[:, None] * jnp.where(after >= 0, losses[..., 0], 0))
            return PARTS * total, {"rows": jnp.float32(len(part["x"]))}

        return jax.value_and_grad(loss, has_aux=True)(params)

    @jax.jit
    def accumulated(batch):
        batch = {**batch, "weight": target_weights(batch["targets"])}
        return mean_over_parts(gradients, batch, jax.random.key(0), PARTS, params, mask, mesh)

    batch = jax.device_put({"x": x, "targets": targets}, batch_sharding(mesh))
    (loss, metrics), grads = accumulated(batch)

    def whole(params):
        return next_token_loss(x @ params["w"] + params["frozen"], targets)[0]

    value, want = jax.value_and_grad(whole)(params)
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    np.testing.assert_allclose(grads["w"], want["w"], atol=1e-6)
    assert metrics["rows"] == 4
    assert not grads["frozen"].any()


def test_more_parts_than_the_mesh_has_rows_for_are_refused():
    mesh = make_mesh(MeshConfig(fsdp=4, data=1, max_devices=4))
    check_batch_size(16, mesh, parts=4)
    with pytest.raises(ConfigError, match=r"over 32 batch shards.*8 parts.*a smaller accumulate"):
        check_batch_size(16, mesh, parts=8)
