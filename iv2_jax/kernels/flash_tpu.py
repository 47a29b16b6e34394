"""Flash attention on TPU: JAX's Pallas splash kernel behind our layout, lengths and head sizes.

The scores never reach the memory of the chip, so memory grows with the number of tokens instead
of its square. The kernel wants lengths that are multiples of its blocks: queries, keys and values
are padded with zeros up to them, padded keys are hidden and the rest is cut off. Heads are of any
size (88 and 200 in the 1B and 6B encoders).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from iv2_jax.kernels.mesh import on_each_device

# Edges of a tile of scores, largest first; 512 x 512 in float32 is 1 MB of on-chip memory.
_BLOCKS = (512, 384, 256, 128)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None,
    scale: float,
    causal: bool,
    segments: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention by the splash kernel; differentiable.

    Under a mesh set with `jax.set_mesh` it runs in a `shard_map` (`kernels/mesh.py`).

    Args:
        q: `(B, N, h, d)`.
        k: `(B, M, g, d)`, g dividing h.
        v: `(B, M, g, d)`.
        mask: bool `(B or 1, 1, 1, M)`, True = attend; the same for all queries and heads.
        scale: factor of the scores.
        causal: hide later keys (N == M).
        segments: int `(B, N)`, N == M, from 0 on: those of another number are hidden; None for
            one.
        interpret: run the kernel step by step in XLA, on any platform (tests).

    Returns:
        `(B, N, h, d)` in the dtype of `v`; zeros for a sample all of whose keys are hidden.
    """
    batch, keys = k.shape[:2]
    visible = jnp.ones((batch, keys), jnp.bool_)
    if mask is not None:
        visible = jnp.broadcast_to(mask[:, 0, 0], visible.shape)
    has_mask, has_segments = mask is not None, segments is not None
    if segments is None:
        segments = jnp.zeros((batch, q.shape[1]), jnp.int32)

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, segments: jax.Array
    ) -> jax.Array:
        own = segments if has_segments else None
        return _attend_local(q * scale, k, v, visible, own, has_mask, causal, interpret)

    return on_each_device(local, batch, k.shape[2])((q, k, v), (visible, segments))


def block_size(length: int) -> int:
    """Largest block whose padding stays within a tenth of what the smallest block needs."""
    least = _round_up(length, _BLOCKS[-1])
    return next(b for b in _BLOCKS if _round_up(length, b) <= 1.1 * least)


def _round_up(length: int, block: int) -> int:
    """Smallest multiple of `block` that is at least `length`."""
    return -(-length // block) * block


def _kernel(heads: int, queries: int, keys: int, causal: bool, interpret: bool) -> splash:
    """Splash kernel of one sample, for padded lengths."""
    mask_type = splash.CausalMask if causal else splash.FullMask
    block_q, block_kv = block_size(queries), block_size(keys)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask_type((queries, keys))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _attend_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    segments: jax.Array | None,
    has_mask: bool,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """The rows and heads of one device; `q` is scaled, `visible` is bool (B, M)."""
    (_, queries, heads, _), keys = q.shape, k.shape[1]
    full_q, full_k = (_round_up(n, block_size(n)) for n in (queries, keys))

    def padded(x: jax.Array, length: int) -> jax.Array:
        """(B, n, h, d) as (B, h, length, d), zeros where there was nothing."""
        rest = ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))
        return jnp.pad(x, rest).swapaxes(1, 2)

    kernel = _kernel(heads, full_q, full_k, causal, interpret)
    arrays = (padded(q, full_q), padded(k, full_k), padded(v, full_k))
    if segments is not None or has_mask or (full_k > keys and not causal):
        # Different numbers do not meet: hidden and padded keys have one that no query has.
        own = jnp.zeros((q.shape[0], queries), jnp.int32) if segments is None else segments
        theirs = jnp.where(visible, own if segments is not None else 0, -1)
        ids = splash.SegmentIds(
            q=jnp.pad(own.astype(jnp.int32), ((0, 0), (0, full_q - queries))),
            kv=jnp.pad(theirs.astype(jnp.int32), ((0, 0), (0, full_k - keys)), constant_values=-1),
        )
        out = jax.vmap(kernel)(*arrays, ids)
    else:
        out = jax.vmap(kernel)(*arrays)
    out = out.swapaxes(1, 2)[:, :queries]
    if has_mask:
        # Under a causal mask a query is empty when all keys up to it are hidden.
        seen = jnp.cumsum(visible, axis=1) > 0 if causal else jnp.any(visible, 1, keepdims=True)
        if segments is not None:
            # Whether a query's own segment has a visible key, which its position alone says not.
            same = (segments[:, :, None] == segments[:, None, :]) & visible[:, None]
            seen = jnp.any(jnp.tril(same) if causal else same, axis=-1)
        out = jnp.where(seen[:, :, None, None], out, 0)
    return out.astype(v.dtype)
