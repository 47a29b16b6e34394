"""Softmax attention, the block's self-attention and the attentive pool."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from iv2_jax.kernels import plain
from iv2_jax.kernels.choice import choose_backend
from iv2_jax.models.layers import (
    Initializer,
    LayerNorm,
    Linear,
    Precision,
    RMSNorm,
    kernel_init,
)
from iv2_jax.parallel.mesh import splits_heads

# Name of the output before the last map, for rematerialisation policies.
ATTENTION_OUTPUT = "attention"


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention: the one front of every attention in this package.

    Args:
        q: `(B, N, h, d)` queries.
        k: `(B, M, g, d)` keys; g divides h, and query head i reads key head `i // (h / g)`
            (grouped-query attention; g == h is the ordinary case).
        v: `(B, M, g, d)` values.
        bias: added to the scaled scores in float32, broadcastable to `(B, h, N, M)`. To hide
            keys use `mask`: a row of nothing but minus infinity gives NaN.
        mask: bool, True = attend, broadcastable to `(B, h, N, M)`.
        segments: int `(B, N)`, N == M: tokens of different numbers do not see each other. The same
            as a mask, but kernels need no array of N x N for it.
        scale: factor of the scores; None for `d ** -0.5`.
        causal: query i attends to keys 0..i only; needs N == M (with a cache, pass `mask`).
        dropout: applied to the weights `(B, h, N, M)`; plain XLA alone can do that.
        backend: 'auto', or one of `kernels.choice.BACKENDS` or `ALIASES` to force it.

    Returns:
        `(B, N, h, d)` in the dtype of `v`; the softmax is float32. A query whose keys are all
        hidden gives zeros, and gradients of zero.

    Raises:
        ValueError: the shapes do not fit each other, or the forced backend cannot do it; the
            message gives them.
        ConfigError: the backend is not known.
    """
    _check_shapes(q, k, v, bias, mask, segments, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    problem = "weights with dropout exist in plain XLA only" if dropout is not None else None
    chosen = choose_backend(q, k, bias=bias, mask=mask, backend=backend, problem=problem)
    common = {"scale": scale, "causal": causal}
    if chosen not in ("xla", "cudnn"):
        # Imported here: most machines never use them, and Pallas takes a while to import.
        from iv2_jax.kernels import flash_tpu, short_tpu

        kernel = short_tpu if chosen.startswith("short") else flash_tpu
        common |= {"mask": mask, "segments": segments}
        return kernel.attend(q, k, v, interpret=chosen.endswith("_interpret"), **common)
    if segments is not None:
        same = (segments[:, :, None] == segments[:, None, :])[:, None]
        mask = same if mask is None else mask & same
    common["mask"] = mask
    if chosen == "xla":
        return plain.attend(q, k, v, bias=bias, dropout=dropout, **common)
    from iv2_jax.kernels import cudnn

    return cudnn.attend(q, k, v, **common)


def _check_shapes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    segments: jax.Array | None,
    causal: bool,
) -> None:
    """Raises ValueError where the arguments of `dot_product_attention` do not fit each other."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            f"attention takes q (B, N, h, d), k and v (B, M, g, d); got q {q.shape}, "
            f"k {k.shape}, v {v.shape}"
        )
    (batch, length, heads, _), (_, keys, groups, _) = q.shape, k.shape
    if heads % groups:
        raise ValueError(f"{heads} query heads do not divide into {groups} key heads")
    if causal and length != keys:
        raise ValueError(
            f"causal attention needs as many queries as keys, got {length} and {keys}; "
            "with a key cache pass a mask"
        )
    if segments is not None and (segments.shape != (batch, length) or length != keys):
        raise ValueError(
            f"segments of shape {segments.shape} must be (B, N) = {(batch, length)}, with as many "
            f"keys as queries (there are {keys})"
        )
    full = (batch, heads, length, keys)
    for name, array in (("bias", bias), ("mask", mask)):
        if array is None:
            continue
        fits = array.ndim == 4 and all(a in (1, b) for a, b in zip(array.shape, full, strict=True))
        if not fits:
            raise ValueError(f"{name} of shape {array.shape} does not broadcast to {full}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be bool (True = attend), got {mask.dtype}")


class Attention(nn.Module):
    """Multi-head self-attention with optional normalisation of queries and keys (spec 2.4).

    Queries and keys are RMS-normalised over the whole width, all heads together, before they are
    used by head.

    Attributes:
        width: size of a token; must be a multiple of `num_heads`.
        num_heads: number of heads.
        qkv_bias: bias on queries, keys and values.
        qk_norm: normalise queries and keys.
        precision: dtypes.
        out_init: initializer of the output kernel.
    """

    width: int
    num_heads: int
    qkv_bias: bool = False
    qk_norm: bool = True
    precision: Precision = Precision()
    out_init: Initializer = kernel_init

    @nn.compact
    def __call__(self, x: jax.Array, *, out_scale: jax.Array | None = None) -> jax.Array:
        """Maps `(B, N, width)` to `(B, N, width)`, times `out_scale` `(width,)` if given."""
        heads = (self.num_heads, self.width // self.num_heads)
        # Split heads stay an axis of their own; whole ones lie side by side, without padding.
        flat = not splits_heads()
        qkv = Linear(
            (self.width,),
            (3, *heads),
            ("embed",),
            (None, "heads", "head_dim"),
            use_bias=self.qkv_bias,
            precision=self.precision,
            flat=flat,
            name="qkv",
        )(x)
        q, k, v = jnp.split(qkv, 3, axis=-1) if flat else (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            axes = 1 if flat else 2
            q = RMSNorm(self.width, precision=self.precision, name="q_norm")(q, num_axes=axes)
            k = RMSNorm(self.width, precision=self.precision, name="k_norm")(k, num_axes=axes)
        q, k, v = (part.reshape(*x.shape[:2], *heads) for part in (q, k, v))
        mixed = dot_product_attention(q, k, v)
        mixed = mixed.reshape(x.shape) if flat else mixed
        mixed = checkpoint_name(mixed, ATTENTION_OUTPUT)
        return Linear(
            heads,
            (self.width,),
            ("heads", "head_dim"),
            ("embed",),
            precision=self.precision,
            kernel_init=self.out_init,
            flat=flat,
            name="proj",
        )(mixed, out_scale=out_scale)


class AttentionPool(nn.Module):
    """One learned reading of all tokens: the mean token attends to them (spec stage1 2.5).

    Attributes:
        width: size of a token.
        num_heads: heads; must divide `width`.
        out_width: size of the pooled vector.
        precision: dtypes.
    """

    width: int
    num_heads: int
    out_width: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pools tokens.

        Args:
            tokens: `(B, N, width)`, the residual stream, class token included.

        Returns:
            The pooled vector `(B, out_width)` in the compute dtype and the attention averaged over
            heads `(B, N)`, float32, each row summing to one.
        """
        head_dim = self.width // self.num_heads
        mean = jnp.mean(tokens.astype(jnp.float32), axis=1, keepdims=True)

        def project(name: str, x: jax.Array) -> jax.Array:
            """Normalises and projects `(B, M, width)` to heads `(B, h, M, d)`."""
            x = LayerNorm(self.width, precision=self.precision, name=f"norm_{name}")(x)
            x = Linear(
                (self.width,),
                (self.num_heads, head_dim),
                ("embed",),
                ("heads", "head_dim"),
                precision=self.precision,
                name=name,
            )(x)
            return x.swapaxes(1, 2)

        q, k, v = project("q", mean), project("k", tokens), project("v", tokens)
        scores = jnp.matmul(
            q * head_dim**-0.5, k.swapaxes(-1, -2), preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores, axis=-1)
        pooled = jnp.matmul(weights.astype(v.dtype), v).swapaxes(1, 2)
        pooled = Linear(
            (self.num_heads, head_dim),
            (self.out_width,),
            ("heads", "head_dim"),
            ("pool",),
            precision=self.precision,
            name="proj",
        )(pooled)
        return pooled[:, 0], jnp.mean(weights, axis=1)[:, 0]
