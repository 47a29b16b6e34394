"""cuDNN's fused attention against plain XLA; runs where a GPU is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.models.attention import dot_product_attention


@pytest.mark.parametrize("case", ["full", "causal", "mask", "shared_keys"])
@pytest.mark.parametrize("head_dim", [88, 200])
def test_agrees_with_plain(case, head_dim):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU: cuDNN has no CPU form")
    if head_dim > 128 and float(jax.devices()[0].compute_capability) < 9.0:
        pytest.skip("heads of more than 128 need compute capability 9.0")
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 64, 4, head_dim))
    k, v = rng.normal(size=(2, 2, 64, 2 if case == "shared_keys" else 4, head_dim))
    inputs = tuple(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    mask = jnp.asarray(rng.random((2, 1, 64, 64)) < 0.7) if case == "mask" else None

    def loss(q, k, v, backend):
        out = dot_product_attention(q, k, v, mask=mask, causal=case == "causal", backend=backend)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    for a, b in zip(
        jax.tree.leaves(run(*inputs, "xla")), jax.tree.leaves(run(*inputs, "cudnn")), strict=True
    ):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05, rtol=0.02
        )
