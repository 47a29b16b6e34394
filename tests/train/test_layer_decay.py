"""Learning rates by layer of a stacked model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError
from iv2_jax.train import optim

PARAMS = {
    "encoder": {
        "patch_embed": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "cls_token": jnp.ones((1, 1, 3)),
        "pos_embed": jnp.ones((1, 5, 3)),
        "blocks": {"norm1": {"scale": jnp.ones((4, 3))}, "fc": {"kernel": jnp.ones((4, 3, 3))}},
    },
    "head": {"kernel": jnp.ones((3, 2))},
}


def _update(**fields):
    """One step of Adam of a gradient of ones: minus the learning rate of each value."""
    config = optim.OptimizerConfig(clip_norm=0.0, weight_decay=0.0, **fields)
    tx = optim.make_optimizer(config, lambda _: 1.0, PARAMS)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
    return updates


def test_blocks_step_by_their_depth():
    updates = _update(lr_multipliers=optim.layer_decay(0.5, 4))
    by_block = -np.array([0.0625, 0.125, 0.25, 0.5])
    blocks = updates["encoder"]["blocks"]
    np.testing.assert_allclose(blocks["norm1"]["scale"], by_block[:, None] * np.ones(3), rtol=1e-5)
    np.testing.assert_allclose(blocks["fc"]["kernel"][:, 1, 2], by_block, rtol=1e-5)
    for name in ("cls_token", "pos_embed"):
        np.testing.assert_allclose(updates["encoder"][name], -(0.5**5), rtol=1e-5)
    np.testing.assert_allclose(updates["encoder"]["patch_embed"]["bias"], -(0.5**5), rtol=1e-5)
    np.testing.assert_allclose(updates["head"]["kernel"], -1.0, rtol=1e-5)


def test_frozen_parameters_stay_frozen():
    updates = _update(lr_multipliers=optim.layer_decay(0.5, 4), freeze=("encoder/.*",))
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates["encoder"]))
    np.testing.assert_allclose(updates["head"]["kernel"], -1.0, rtol=1e-5)


def test_no_decay_changes_nothing():
    decayed, plain = _update(lr_multipliers=optim.layer_decay(1.0, 4)), _update()
    for one, other in zip(jax.tree.leaves(decayed), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_depth_is_refused():
    with pytest.raises(ConfigError, match=r"3 numbers for encoder/blocks/fc/kernel.*\(4, 3, 3\)"):
        _update(lr_multipliers=optim.layer_decay(0.5, 3))


def test_description_and_config_file():
    config = optim.OptimizerConfig(lr_multipliers=optim.layer_decay(0.5, 4))
    text = optim.describe(config, PARAMS)
    assert "0.0625.. 0.5" in text
    assert "0.0312" in text
    assert config_lib.build(optim.OptimizerConfig, config_lib.to_dict(config)) == config
