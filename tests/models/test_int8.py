"""Products with int8 kernels: what they compute, and what is kept."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models import int8
from iv2_jax.models.layers import Linear, Precision

pytest.importorskip("qwix", reason="needs the int8 extra")


def _rounded(x, axes):
    """int8 values and scales of an array whose `axes` share a scale, in NumPy."""
    scale = np.abs(x).max(axes, keepdims=True) / np.float32(127.5)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.round(x / scale).clip(-128, 127).astype(np.int64), scale


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_product_is_of_rounded_tokens_and_channels():
    x, kernel = _draw(3, 5, 4, 6), _draw(4, 6, 7, seed=1)
    # The largest of each are positive: 127.5 steps are 127, on the other side either neighbour.
    x[..., 0, 0], kernel[0, 0] = 5.0, 5.0
    x[0, 1] = 0.0  # a token of zeros has no scale of its own
    stored = int8.quantize_host(kernel, 2, 1, products=True)
    assert stored.values.dtype == np.int8
    assert stored.scale.shape == (1, 1, 7)
    tokens, token_scale = _rounded(x, (2, 3))
    channels, channel_scale = _rounded(kernel, (0, 1))
    np.testing.assert_array_equal(stored.values, channels)
    whole = np.tensordot(tokens, channels, axes=2)
    expected = whole * token_scale[:, :, 0] * channel_scale[0, 0]
    found = int8.contract(jnp.asarray(x), stored, 2, "float32")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[0, 1], np.zeros(7))
    exact = np.tensordot(x, kernel, axes=2)
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_weights_alone_leave_the_input_as_it_is():
    x, kernel = _draw(5, 8), _draw(8, 3, 4, seed=1)
    stored = int8.quantize_host(kernel, 1, 2, products=False)
    found = int8.contract(jnp.asarray(x), stored, 1, "float32")
    np.testing.assert_allclose(found, np.tensordot(x, stored.values * stored.scale, 1), atol=1e-5)
    assert int8.contract(jnp.asarray(x), stored, 1, "bfloat16").dtype == jnp.bfloat16


def test_a_stack_is_rounded_layer_by_layer_to_the_same():
    kernel = _draw(3, 8, 4).astype(jnp.bfloat16)
    by_layer = int8.quantize_host(kernel, 1, 1, products=True)
    at_once = jax.jit(lambda k: int8.quantize(k, 1, 1, products=True))(kernel)
    jax.tree.map(np.testing.assert_array_equal, by_layer, at_once)
    assert by_layer.scale.shape == (3, 1, 4)


def test_names_stay_but_an_axis_of_one_has_none():
    kernel = nn.LogicallyPartitioned(jnp.asarray(_draw(3, 8, 4)), ("layers", "embed", "mlp"))
    stored = int8.quantize_boxed(kernel, 1, 1, products=True)
    assert stored.values.names == ("layers", "embed", "mlp")
    assert stored.scale.names == ("layers", None, "mlp")


def test_a_linear_layer_reads_one_in_its_place():
    layer = Linear((8,), (2, 3), (None,), (None, None), precision=Precision("float32", "bfloat16"))
    x = jnp.asarray(_draw(4, 8))
    params = nn.meta.unbox(layer.init(jax.random.key(0), x)["params"])
    stored = params | {"kernel": int8.quantize(params["kernel"], 1, 2, products=True)}
    plain, rounded = (layer.apply({"params": p}, x) for p in (params, stored))
    assert rounded.dtype == plain.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        rounded.astype(jnp.float32), plain.astype(jnp.float32), atol=2e-3, rtol=0.02
    )


def test_a_flat_layer_gives_the_same():
    x = jnp.asarray(_draw(4, 6))
    kernel = int8.quantize_host(_draw(2, 3, 2, 4), 2, 2, products=True)
    shapes = ((2, 3), (2, 4), (None, None), (None, None), False)
    flat = Linear(*shapes, flat=True).apply({"params": {"kernel": kernel}}, x)
    apart = Linear(*shapes).apply({"params": {"kernel": kernel}}, x.reshape(4, 2, 3))
    np.testing.assert_allclose(flat, apart.reshape(4, 8), rtol=1e-6)


def test_without_the_library_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "qwix" else find(name)
    )
    with pytest.raises(ConfigError, match=r"clip_teacher.*iv2_jax\[int8\]"):
        int8.require_library("clip_teacher.int8")
