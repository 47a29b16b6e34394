"""The classifiers' heads: what each reads, how they start, and running statistics."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import zoo
from iv2_jax.models.classifier import (
    HEADS,
    RUNNING_STATISTICS,
    ZOO,
    Classifier,
    ClassifierConfig,
    RunningNorm,
    with_running_statistics,
)
from iv2_jax.train import optim

ENCODER = dataclasses.replace(zoo.get("test_tiny"), depth=1, image_size=28, num_frames=2)
TINY = ClassifierConfig(ENCODER, num_classes=5, head_init_scale=1.0)


def _video(batch=2, seed=0):
    e = TINY.encoder
    shape = (batch, e.num_frames, e.image_size, e.image_size, 3)
    return jax.random.normal(jax.random.key(seed), shape)


def _init(config):
    """Parameters as training starts."""
    variables = jax.jit(Classifier(config).init)(jax.random.key(0), _video())
    return meta.unbox(variables["params"])


def _random(config):
    """Parameters away from their neutral start, without compiling anything."""
    leaves, treedef = jax.tree.flatten(zoo.abstract_params(config))
    rng = np.random.default_rng(0)
    values = [rng.normal(0.2, 0.2, leaf.shape).astype(np.float32) for leaf in leaves]
    params = jax.tree.unflatten(treedef, values)
    if "var" in params.get("down_norm", {}):
        params["down_norm"] |= {"var": np.ones_like(params["down_norm"]["var"]), "count": 0.0}
    return params


def _variant(head, norm="LN", **fields):
    return dataclasses.replace(TINY, head=head, merge_norm=norm, **fields)


@pytest.mark.parametrize("head", HEADS)
def test_logits_and_head_width(head):
    config = _variant(head)
    params = zoo.abstract_params(config)
    d, p, frames = config.encoder.width, config.encoder.pool_width, config.encoder.grid[0]
    widths = {
        "plain": p,
        "ap": p,
        "cls_avg1": 2 * d,
        "cls_avgN": p * (1 + frames),
        "cls_avg1_proj": 2 * d + p,
        "cls_avgN_proj": p * (2 + frames),
    }
    assert params["head"]["kernel"].shape == (widths[head], 5)
    logits = jax.eval_shape(Classifier(config).apply, {"params": params}, _video())
    assert logits.shape == (2, 5)
    assert logits.dtype == jnp.float32


def test_head_starts_small():
    """The original scales the first kernel of the last map by 0.001 and zeroes its bias."""
    params = _init(dataclasses.replace(TINY, head_init_scale=0.001))
    assert 0 < float(jnp.abs(params["head"]["kernel"]).max()) < 2e-4
    assert not jnp.any(params["head"]["bias"])


def test_the_extra_mlp_starts_as_nothing():
    params = _init(_variant("ap"))
    assert not jnp.any(params["extra_mlp"]["fc2"]["kernel"])
    plain = {k: v for k, v in params.items() if not k.startswith("extra_")}
    ours = jax.jit(Classifier(_variant("ap")).apply)({"params": params}, _video())
    theirs = jax.jit(Classifier(TINY).apply)({"params": plain}, _video())
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("head", ["cls_avg1", "cls_avg1_proj"])
def test_the_pool_is_idle_without_proj(head):
    """Its parameters are there, as in the original's files, and get no gradient."""
    config = _variant(head)
    params = _random(config)

    def loss(params):
        return jnp.sum(Classifier(config).apply({"params": params}, _video()) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    idle = not any(
        jnp.any(g) for g in jax.tree.leaves((grads["fc_norm"], grads["encoder"]["pool"]))
    )
    assert idle == (head == "cls_avg1")


def test_dropout_is_off_unless_training():
    config = _variant("plain", dropout=0.5)
    params, video = _random(config), _video()
    still = jax.jit(Classifier(config).apply)({"params": params}, video)
    train = jax.jit(partial(Classifier(config).apply, train=True))
    drawn = [
        train({"params": params}, video, rngs={"dropout": jax.random.key(i)}) for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3
    assert np.abs(drawn[0] - still).max() > 1e-3


def test_running_statistics_follow_pytorch():
    """Momentum 0.1, unbiased variance kept, biased variance used; checked by hand."""
    norm = RunningNorm(3, epsilon=1e-3)
    x = np.random.default_rng(0).normal(2.0, 3.0, (4, 5, 3)).astype(np.float32)
    params = meta.unbox(norm.init(jax.random.key(0), x)["params"])
    np.testing.assert_allclose(norm.apply({"params": params}, x), x / np.sqrt(1.001), rtol=1e-6)

    y, moved = norm.apply({"params": params}, x, train=True, mutable=["batch_stats"])
    rows = x.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(
        y, (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-3), rtol=1e-4, atol=1e-5
    )
    after = with_running_statistics(params, moved["batch_stats"])
    np.testing.assert_allclose(after["mean"], 0.1 * rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(after["var"], 0.9 + 0.1 * rows.var(0, ddof=1), rtol=1e-5)
    assert after["count"] == 1
    np.testing.assert_array_equal(after["scale"], params["scale"])


def test_running_statistics_of_a_classifier():
    config = _variant("cls_avgN_proj", "kaiming_BN")
    params, video = _random(config), _video()
    model = Classifier(config)

    def loss(params):
        logits, moved = model.apply({"params": params}, video, train=True, mutable=["batch_stats"])
        return jnp.sum(logits**2), moved

    grads, moved = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert not any(jnp.any(g) for g in jax.tree.leaves(grads["down_norm"]))
    assert any(jnp.any(g) for g in jax.tree.leaves(grads["down"]))
    after = with_running_statistics(params, moved["batch_stats"])
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert after["down_norm"]["count"] == 1
    assert jnp.any(after["down_norm"]["mean"] != 0)
    # Without the collection training runs all the same, and what is no parameter is refused.
    jax.eval_shape(partial(model.apply, train=True), {"params": params}, video)
    with pytest.raises(ConfigError, match="down_norm/other"):
        with_running_statistics(params, {"down_norm": {"other": 0}})


def test_optimizer_leaves_running_statistics_alone():
    params = zoo.abstract_params(_variant("cls_avg1", "BN"))
    statistics = {f"down_norm/{name}" for name in ("mean", "var", "count")}
    decay = optim.decay_multipliers(optim.OptimizerConfig(), params)
    train = optim.trainable(optim.OptimizerConfig(freeze=(RUNNING_STATISTICS,)), params)
    decay, train = (traverse_util.flatten_dict(tree, sep="/") for tree in (decay, train))
    assert {path for path, on in train.items() if not on} == statistics
    assert all(decay[path] == 0 for path in statistics)


def test_layer_norm_and_batch_norm_order_columns_differently():
    """Spec stage1 2.9: by token for LN, by feature for BN."""
    shapes = {}
    for norm in ("LN", "BN"):
        config = _variant("cls_avg1", norm)
        params = _random(config)
        params["head"]["bias"] = np.zeros(5, np.float32)
        kernel = np.zeros(params["head"]["kernel"].shape, np.float32)
        kernel[1, 0] = 1.0  # LN: feature 1 of the class token; BN: feature 0 of the mean token
        params["head"]["kernel"] = jnp.asarray(kernel)
        seen = partial(
            Classifier(config).apply, capture_intermediates=True, mutable=["intermediates"]
        )
        logits, state = jax.jit(seen)({"params": params}, _video())
        shapes[norm] = logits[:, 0], state["intermediates"]["down_norm"]["__call__"][0]
    logit, tokens = shapes["LN"]
    np.testing.assert_allclose(logit, tokens[:, 0, 1], rtol=1e-6)
    logit, tokens = shapes["BN"]
    np.testing.assert_allclose(logit, tokens[:, 1, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"head": "cls"}, "head='cls'"),
        ({"merge_norm": "IN"}, "merge_norm='IN'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"encoder": dataclasses.replace(TINY.encoder, pool=False)}, "pool"),
    ],
)
def test_misfits_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **fields)


def test_every_parameter_has_logical_axes():
    for head, norm in (("ap", "LN"), ("cls_avgN_proj", "BN")):
        config = _variant(head, norm)
        boxed = jax.eval_shape(Classifier(config).init, jax.random.key(0), _video())["params"]
        leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
        assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)


def test_named_models():
    assert isinstance(ZOO["internvideo2_1b_k710_f8"], ClassifierConfig)
    assert ZOO["internvideo2_6b_k400_f16"].encoder.num_frames == 16
    # The trunk of spec stage1 1, a norm and the last map.
    config, trunk = ZOO["internvideo2_1b_k710_f8"], zoo.get("internvideo2_1b")
    assert zoo.count_params(config) == zoo.count_params(trunk) + 2 * 768 + 769 * 710
