"""Fused attention of cuDNN on NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from iv2_jax.kernels.plain import causal_mask


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None,
    scale: float,
    causal: bool,
) -> jax.Array:
    """Attention by cuDNN's fused kernel; differentiable.

    Args:
        q: `(B, N, h, d)`, float16 or bfloat16, d a multiple of 8.
        k: `(B, M, g, d)`, g dividing h.
        v: `(B, M, g, d)`.
        mask: bool, True = attend, broadcastable to `(B, h, N, M)`, or None.
        scale: factor of the scores.
        causal: hide later keys (N == M).

    Returns:
        `(B, N, h, d)` in the dtype of `v`; zeros for a query all of whose keys are hidden.
    """
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=causal, implementation="cudnn"
    )
    if mask is None:
        return out
    seen = mask & causal_mask(q.shape[1]) if causal else mask
    return jnp.where(jnp.any(seen, axis=-1).swapaxes(1, 2)[..., None], out, 0)
