from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.models.attention import AttentionPool, dot_product_attention


def _qkv(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, 3, 8))
    k, v = rng.normal(size=(2, 2, 7, 3, 8))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def test_agrees_with_jax_nn():
    q, k, v = _qkv()
    ours = dot_product_attention(q, k, v)
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(q, k, v), atol=1e-6)


def test_softmax_is_float32_and_survives_large_scores():
    q, k, v = _qkv(jnp.bfloat16)
    out = dot_product_attention(1e3 * q, 1e3 * k, v)
    assert out.dtype == jnp.bfloat16
    assert np.isfinite(out.astype(jnp.float32)).all()
    narrow = dot_product_attention(q, k, v).astype(jnp.float32)
    wide = dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(narrow, wide, atol=0.03)


def test_pool_attends_with_the_mean_token():
    """With one token, the pool gives that token's value and all the attention."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 16)), jnp.float32)
    pool = AttentionPool(width=16, num_heads=4, out_width=6)
    variables = jax.jit(pool.init)(jax.random.key(0), x)
    apply = jax.jit(pool.apply)
    pooled, attention = apply(variables, x)
    np.testing.assert_array_equal(attention, np.ones((2, 1)))
    several, spread = apply(variables, jnp.tile(x, (1, 5, 1)))
    np.testing.assert_allclose(spread, np.full((2, 5), 0.2), rtol=1e-6)
    np.testing.assert_allclose(several, pooled, atol=1e-6)


def _reference(q, k, v, bias=0.0, mask=True, scale=None):
    """Attention by the book, in float64 NumPy, keys and values repeated for each query head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * (scale or q.shape[-1] ** -0.5) + bias
    scores = np.where(mask, scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhd->bnhd", weights, v)


def test_bias_mask_scale_and_shared_key_heads():
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(2, 5, 6, 8)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 2, 7, 2, 8)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(1, 6, 5, 7)), jnp.float32)
    mask = rng.random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    out = dot_product_attention(q, k, v, bias=bias, mask=jnp.asarray(mask), scale=0.7)
    np.testing.assert_allclose(out, _reference(q, k, v, bias, mask, 0.7), atol=1e-5)


def test_causal_is_the_lower_triangle():
    rng = np.random.default_rng(2)
    q, k, v = jnp.asarray(rng.normal(size=(3, 2, 6, 2, 8)), jnp.float32)
    out = dot_product_attention(q, k, v, causal=True)
    np.testing.assert_allclose(out, _reference(q, k, v, mask=np.tri(6, dtype=bool)), atol=1e-5)


def test_a_row_without_keys_gives_zeros_and_finite_gradients():
    q, k, v = _qkv()
    mask = jnp.ones((2, 1, 5, 7), bool).at[1, :, 2].set(False)

    def loss(q, k, v):
        return jnp.sum(dot_product_attention(q, k, v, mask=mask) ** 2)

    out = dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(out[1, 2], np.zeros((3, 8)))
    assert np.abs(out[0]).min() > 0
    grads = jax.grad(loss, (0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_array_equal(grads[0][1, 2], np.zeros((3, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": (2, 5, 7)}, "bias of shape"),
        ({"mask": (2, 1, 5, 6)}, "mask of shape"),
        ({"causal": True}, "as many queries as keys"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    q, k, v = _qkv()
    change = {n: jnp.ones(x, bool) if isinstance(x, tuple) else x for n, x in change.items()}
    with pytest.raises(ValueError, match=message):
        dot_product_attention(q, k, v, **change)


def test_heads_that_do_not_divide_are_refused():
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="3 query heads"):
        dot_product_attention(q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="must be bool"):
        dot_product_attention(q, k, v, mask=jnp.ones((1, 1, 5, 7)))
