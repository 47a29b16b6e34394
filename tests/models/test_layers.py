from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import layers


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_precision_keeps_names():
    precision = layers.Precision(param_dtype=jnp.float32, compute_dtype="bfloat16")
    assert precision == layers.Precision("float32", "bfloat16")
    assert hash(precision) == hash(layers.Precision("float32", jnp.bfloat16))


@pytest.mark.parametrize("value", ["float31", "int32"])
def test_precision_refuses_other_dtypes(value):
    with pytest.raises(ConfigError, match=f"compute_dtype='{value}'"):
        layers.Precision(compute_dtype=value)


@pytest.mark.parametrize("make", [layers.RMSNorm, layers.LayerNorm])
def test_norm_statistics_are_float32(make):
    """A mean far from zero is lost in bfloat16 statistics."""
    precision = layers.Precision(compute_dtype="bfloat16")
    x = jnp.asarray(100.0 + _normal(2, 64), jnp.bfloat16)
    reference = make(64)
    params = meta.unbox(reference.init(jax.random.key(0), x))
    wide = reference.apply(params, x.astype(jnp.float32))
    narrow = make(64, precision=precision).apply(params, x)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_rms_norm_over_two_axes_is_that_over_the_flat_one():
    x = _normal(2, 5, 3, 8)
    params = {"params": {"scale": 1 + _normal(24, seed=1)}}
    flat = layers.RMSNorm(24).apply(params, x.reshape(2, 5, 24))
    split = layers.RMSNorm(24).apply(params, x, num_axes=2)
    np.testing.assert_allclose(split.reshape(2, 5, 24), flat, rtol=1e-6)


def test_layer_scale_is_applied_in_float32():
    gamma = np.full(4, 1 / 3, np.float32)
    precision = layers.Precision(compute_dtype="bfloat16")
    x = jnp.full((1, 4), 3.0, jnp.bfloat16)
    y = layers.LayerScale(4, precision=precision).apply({"params": {"gamma": gamma}}, x)
    np.testing.assert_array_equal(y, np.ones((1, 4)))  # bfloat16 of 1/3 would give 1.0039


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = jnp.ones((4096, 3, 2))
    y = layers.DropPath().apply({}, x, 0.25, rngs={"droppath": jax.random.key(0)})
    first = np.asarray(y[:, 0, 0])
    np.testing.assert_array_equal(y, np.broadcast_to(first[:, None, None], y.shape))
    np.testing.assert_allclose(np.unique(first), [0.0, 1 / 0.75], rtol=1e-6)
    assert abs((first == 0).mean() - 0.25) < 0.03


def test_drop_path_of_rate_zero_or_none_changes_nothing():
    x = _normal(8, 2)
    y = layers.DropPath().apply({}, x, 0.0, rngs={"droppath": jax.random.key(0)})
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(layers.DropPath().apply({}, x, None), x)


def test_unit_length_is_exact_and_safe_at_zero():
    x = _normal(5, 7)
    norm = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(layers.unit_length(x), x / norm, rtol=3e-7)
    tiny = 1e-11 * x  # far below usual epsilons, still scaled to length one
    np.testing.assert_allclose(layers.unit_length(tiny), x / norm, rtol=3e-6)
    gradient = jax.grad(lambda v: layers.unit_length(v)[0, 0])(jnp.zeros((1, 7)))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(layers.unit_length(jnp.zeros((1, 7))), 0.0)


def test_gather_tokens_gives_nan_out_of_range():
    tokens = _normal(2, 4, 3)
    out = layers.gather_tokens(tokens, jnp.array([[3, 0], [1, 4]]))
    np.testing.assert_array_equal(out[0], tokens[0, [3, 0]])
    np.testing.assert_array_equal(out[1, 0], tokens[1, 1])
    assert np.isnan(out[1, 1]).all()


@pytest.mark.parametrize("tubelet", [1, 2])
def test_patch_embed_is_a_strided_convolution(tubelet):
    video = _normal(2, 4, 12, 8, 3)
    embed = layers.PatchEmbed(width=5, patch_size=4, tubelet=tubelet)
    params = meta.unbox(embed.init(jax.random.key(0), video))
    reference = jax.lax.conv_general_dilated(
        video,
        params["params"]["kernel"],
        window_strides=(tubelet, 4, 4),
        padding="VALID",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    reference = reference.reshape(2, -1, 5) + params["params"]["bias"]
    every = embed.apply(params, video)
    np.testing.assert_allclose(every, reference, atol=1e-6)
    wanted = jnp.array([[0, 3, 5], [2, 4, 7]])
    some = embed.apply(params, video, wanted)
    np.testing.assert_allclose(some, layers.gather_tokens(every, wanted), atol=1e-6)


def test_patch_embed_starts_like_pytorch_convolutions():
    video = jnp.zeros((1, 2, 8, 8, 3))
    embed = layers.PatchEmbed(width=64, patch_size=4, tubelet=2)
    params = meta.unbox(embed.init(jax.random.key(0), video))["params"]
    bound = (3 * 2 * 4 * 4) ** -0.5
    for value in params.values():
        assert np.abs(value).max() <= bound
        assert np.abs(value).max() > 0.9 * bound
    assert abs(params["kernel"].std() - bound / np.sqrt(3)) < 0.02 * bound


def test_linear_contracts_several_axes():
    linear = layers.Linear((2, 3), (5,), ("heads", "head_dim"), ("embed",))
    x = _normal(4, 2, 3)
    boxed = linear.init(jax.random.key(0), x)["params"]
    assert boxed["kernel"].names == ("heads", "head_dim", "embed")
    assert boxed["bias"].names == ("embed",)
    params = meta.unbox(boxed)
    y = linear.apply({"params": params}, x)
    kernel = np.asarray(params["kernel"]).reshape(6, 5)
    np.testing.assert_allclose(y, x.reshape(4, 6) @ kernel, rtol=1e-5, atol=1e-7)


def test_flat_and_scaled_linear_is_the_same_map():
    axes = ((2, 3), (5, 2), ("heads", "head_dim"), ("embed", None))
    linear, flat = layers.Linear(*axes), layers.Linear(*axes, flat=True)
    x, scale = _normal(4, 2, 3), _normal(5, 2)
    params = meta.unbox(linear.init(jax.random.key(0), x)["params"])
    params = {**params, "bias": _normal(5, 2)}
    y = linear.apply({"params": params}, x) * scale
    same = flat.apply({"params": params}, x.reshape(4, 6), out_scale=scale)
    np.testing.assert_allclose(same, y.reshape(4, 10), rtol=1e-5, atol=1e-6)
    adapted = layers.Linear(*axes, lora=layers.LoraConfig(rank=2, alpha=2.0), flat=True)
    with pytest.raises(ValueError, match="adapter"):
        adapted.init(jax.random.key(0), x.reshape(4, 6))
