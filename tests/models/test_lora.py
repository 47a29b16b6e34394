"""Adapters: what a fresh one does, merging into plain and stacked kernels, and its dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import layers, lora

CONFIG = lora.LoraConfig(rank=3, alpha=6.0)


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _linear(**kwargs):
    return layers.Linear((2, 4), (3, 5), ("heads", "head_dim"), ("heads", None), **kwargs)


def _random(params, seed=1):
    """Random numbers in the place of every parameter."""
    leaves, tree = jax.tree.flatten(meta.unbox(params))
    drawn = [_normal(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)


def test_a_fresh_adapter_changes_nothing():
    x = _normal(7, 2, 4)
    params = _linear(lora=CONFIG).init(jax.random.key(0), x)["params"]
    assert params["lora_a"].names == ("heads", "head_dim", "rank")
    assert params["lora_b"].names == ("rank", "heads", None)
    params = meta.unbox(params)
    assert np.abs(params["lora_a"]).max() <= 8**-0.5
    assert np.abs(params["lora_a"]).max() > 0.8 * 8**-0.5
    base, adapters = lora.split(params)
    assert base.keys() == {"kernel", "bias"}
    assert adapters.keys() == {"lora_a", "lora_b"}
    with_adapter = _linear(lora=CONFIG).apply({"params": params}, x)
    np.testing.assert_array_equal(with_adapter, _linear().apply({"params": base}, x))


def test_adapter_is_the_scaled_product():
    x = _normal(7, 2, 4)
    params = _random(_linear(lora=CONFIG).init(jax.random.key(0), x)["params"])
    y = _linear(lora=CONFIG).apply({"params": params}, x)
    base = _linear().apply({"params": lora.split(params)[0]}, x)
    delta = x.reshape(7, 8) @ params["lora_a"].reshape(8, 3) @ params["lora_b"].reshape(3, 15)
    np.testing.assert_allclose(y, base + 2.0 * delta.reshape(7, 3, 5), rtol=1e-5, atol=1e-5)
    merged = lora.merge(params, CONFIG)
    assert merged.keys() == {"kernel", "bias"}
    np.testing.assert_allclose(_linear().apply({"params": merged}, x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_merge_and_unmerge_of_stacked_kernels(convert):
    layer = {"kernel": _normal(6, 2, 4, 5), "lora_a": _normal(6, 2, 4, 3), "other": _normal(2)}
    layer["lora_b"] = _normal(6, 3, 5)
    params = jax.tree.map(convert, {"blocks": {"q": layer}, "norm": {"scale": _normal(4)}})
    merged = lora.merge(params, CONFIG)
    assert merged["blocks"]["q"].keys() == {"kernel", "other"}
    assert isinstance(merged["blocks"]["q"]["kernel"], type(params["blocks"]["q"]["kernel"]))
    wanted = layer["kernel"] + 2.0 * np.einsum("lhdr,lro->lhdo", layer["lora_a"], layer["lora_b"])
    np.testing.assert_allclose(merged["blocks"]["q"]["kernel"], wanted, rtol=1e-5, atol=1e-5)
    back = lora.unmerge(merged, lora.split(params)[1], CONFIG)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), back, params)


def test_merge_keeps_the_kernels_dtype():
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    params |= {"lora_a": jnp.ones((4, 3)), "lora_b": jnp.full((3, 4), 1e-3)}
    assert lora.merge({"q": params}, CONFIG)["q"]["kernel"].dtype == jnp.bfloat16


def test_mask_marks_adapters_only():
    x = _normal(1, 2, 4)
    boxed = {"q": _linear(lora=CONFIG).init(jax.random.key(0), x)["params"]}
    marks = lora.mask(boxed)
    assert marks == {"q": {"kernel": False, "bias": False, "lora_a": True, "lora_b": True}}


@pytest.mark.parametrize("missing", ["kernel", "lora_a", "lora_b"])
def test_merge_refuses_half_an_adapter(missing):
    params = {"kernel": _normal(4, 5), "lora_a": _normal(4, 3), "lora_b": _normal(3, 5)}
    del params[missing]
    with pytest.raises(ConfigError, match="blocks/q: an adapter needs kernel"):
        lora.merge({"blocks": {"q": params}}, CONFIG)


def test_merge_refuses_another_rank():
    params = {"kernel": _normal(4, 5), "lora_a": _normal(4, 2), "lora_b": _normal(2, 5)}
    with pytest.raises(ConfigError, match=r"rank is 2, lora\.rank says 3"):
        lora.merge({"q": params}, CONFIG)


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_config_names_the_field(field, value):
    with pytest.raises(ConfigError, match=f"lora.{field}={value}"):
        lora.LoraConfig(**({"rank": 2, "alpha": 4.0} | {field: value}))


def test_adapter_stays_float32_in_a_bfloat16_layer():
    precision = layers.Precision("bfloat16", "bfloat16")
    x = _normal(7, 2, 4)
    params = _linear(lora=CONFIG, precision=precision).init(jax.random.key(0), x)["params"]
    dtypes = {name: value.dtype for name, value in meta.unbox(params).items()}
    assert dtypes["kernel"] == dtypes["bias"] == jnp.bfloat16
    assert dtypes["lora_a"] == dtypes["lora_b"] == jnp.float32
    assert (
        _linear(lora=CONFIG, precision=precision).apply({"params": params}, x).dtype == "bfloat16"
    )


def test_dropout_is_active_in_training_only_and_keeps_the_mean():
    linear = _linear(lora=lora.LoraConfig(rank=3, alpha=6.0, dropout=0.4))
    x = _normal(1, 2, 4)
    params = {"params": _random(linear.init(jax.random.key(0), x)["params"])}
    quiet = linear.apply(params, x)
    many = jnp.broadcast_to(x, (20_000, 2, 4))
    noisy = linear.apply(params, many, train=True, rngs={"dropout": jax.random.key(1)})
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3
    spread = np.asarray(noisy).std(axis=0) / 20_000**0.5
    assert (np.abs(np.asarray(noisy).mean(axis=0) - quiet[0]) < 6 * spread).all()
