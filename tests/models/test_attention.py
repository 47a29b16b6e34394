from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

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
