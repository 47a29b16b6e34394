"""BEATs' parts: relative buckets, positional convolution, gated attention and the layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from iv2_jax.models.attention import dot_product_attention
from iv2_jax.models.layers import Initializer, LayerNorm, Linear, boxed, kernel_init

if TYPE_CHECKING:
    from iv2_jax.models.audio.beats import BeatsConfig

_GATE_WIDTH = 8  # values that a query's gate is made of, in two groups
_CONV_AXES = ("conv", None, "embed")


def relative_buckets(num_tokens: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Rows of the bias table by query and key.

    Half of the rows are for keys behind the query. Of each half, the first half has one row for
    each distance; the rest is spaced logarithmically up to `max_distance` (spec stage2 5.2.4).

    Args:
        num_tokens: N.
        num_buckets: rows of the table.
        max_distance: distance from which on all fall into the last row.

    Returns:
        int32 `(N, N)`.
    """
    half = num_buckets // 2
    exact = half // 2
    offset = np.arange(num_tokens)[None, :] - np.arange(num_tokens)[:, None]
    distance = np.abs(offset)
    # float32 as in the original: at a bucket's very edge the rounding decides the row.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return (half * (offset > 0) + np.where(distance < exact, distance, far)).astype(np.int32)


class PositionConv(nn.Module):
    """Grouped convolution over tokens with weight normalisation by tap (spec stage2 5.2.2).

    Attributes:
        config: the encoder's.
    """

    config: BeatsConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, N, D)` to what is added to it, `(B, N, D)`."""
        c = self.config
        dtype, param_dtype = c.precision.compute_dtype, jnp.dtype(c.precision.param_dtype)
        shape = (c.conv_taps, c.width // c.conv_groups, c.width)
        direction = self.param(
            "weight_v",
            boxed(nn.initializers.normal((4.0 / (c.conv_taps * c.width)) ** 0.5), *_CONV_AXES),
            shape,
            param_dtype,
        )

        def norms(_: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            """Lengths that leave the drawn directions as they are."""
            del shape
            return _tap_norms(direction).astype(dtype)

        length = self.param(
            "weight_g", boxed(norms, "conv", None, None), (c.conv_taps, 1, 1), param_dtype
        )
        bias = self.param(
            "bias", boxed(nn.initializers.zeros_init(), "embed"), (c.width,), param_dtype
        )
        kernel = direction.astype(jnp.float32) / _tap_norms(direction)
        kernel = (kernel * length.astype(jnp.float32)).astype(dtype)
        # An even kernel has no middle: padded by half on both sides it gives a token too many,
        # and the original drops the last, which here is never computed.
        before = c.conv_taps // 2
        y = _grouped_conv(x.astype(dtype), kernel, c.conv_groups, before)
        return jax.nn.gelu(y + bias.astype(dtype), approximate=False)


def _grouped_conv(x: jax.Array, kernel: jax.Array, groups: int, before: int) -> jax.Array:
    """Convolves `(B, N, D)` with `(taps, D / groups, D)`, `before` of the taps on earlier tokens.

    A convolution a group: where the batch is split and another axis of the mesh is not, XLA (jax
    0.10.2) makes the kernel's gradient of a grouped one that axis' size times too large. On CPU
    the gradient is also 20 times faster like this.
    """
    parts = (
        jax.lax.conv_general_dilated(
            part,
            taps,
            window_strides=(1,),
            padding=[(before, kernel.shape[0] - 1 - before)],
            dimension_numbers=("NTC", "TIO", "NTC"),
        )
        for part, taps in zip(
            jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True
        )
    )
    return jnp.concatenate(list(parts), axis=-1)


def _tap_norms(direction: jax.Array) -> jax.Array:
    """Lengths `(taps, 1, 1)` of `(taps, in, out)`, float32."""
    wide = direction.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(wide * wide, axis=(1, 2), keepdims=True))


def xavier(fan_in: int, fan_out: int, gain: float = 1.0) -> Initializer:
    """Normal draws with Glorot's deviation; the fans are given, as kernels have heads as axes."""
    return nn.initializers.normal(gain * (2.0 / (fan_in + fan_out)) ** 0.5)


class GatedAttention(nn.Module):
    """Self-attention with relative biases, of which every query takes a share (spec 5.2.4).

    Attributes:
        config: the encoder's.
    """

    config: BeatsConfig

    @nn.compact
    def __call__(self, x: jax.Array, relative_bias: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `(B, N, D)` to `(B, N, D)`; `relative_bias` is `(h, N, N)` float32."""
        c = self.config
        heads = (c.num_heads, c.width // c.num_heads)
        gain = _deep_norm_gain(c)
        fan = xavier(c.width, c.width)
        narrow = xavier(c.width, c.width, gain)

        def project(name: str, init: Initializer) -> jax.Array:
            return Linear(
                (c.width,),
                heads,
                ("embed",),
                ("heads", "head_dim"),
                precision=c.precision,
                kernel_init=init,
                name=name,
            )(x)

        q, k, v = project("q", fan), project("k", fan), project("v", narrow)
        bias = self._gate(q) * relative_bias[None]
        drop = None
        if train and c.attention_dropout_rate:
            drop = nn.Dropout(c.attention_dropout_rate, deterministic=False, name="weights_dropout")
        mixed = dot_product_attention(q, k, v, bias=bias, dropout=drop)
        return Linear(
            heads,
            (c.width,),
            ("heads", "head_dim"),
            ("embed",),
            precision=c.precision,
            kernel_init=narrow,
            name="out",
        )(mixed)

    def _gate(self, q: jax.Array) -> jax.Array:
        """Shares of the bias `(B, h, N, 1)`, float32, of queries `(B, N, h, d)`."""
        c = self.config
        gate = Linear(
            (q.shape[-1],),
            (_GATE_WIDTH,),
            ("head_dim",),
            (None,),
            precision=c.precision,
            kernel_init=kernel_init,
            name="gate",
        )(q)
        scale = self.param(
            "gate_scale",
            boxed(nn.initializers.ones_init(), "heads"),
            (c.num_heads,),
            jnp.dtype(c.precision.param_dtype),
        )
        gate = gate.astype(jnp.float32).reshape(*gate.shape[:-1], 2, _GATE_WIDTH // 2)
        inner, outer = jnp.moveaxis(jax.nn.sigmoid(jnp.sum(gate, axis=-1)), -1, 0)
        share = inner * (outer * scale.astype(jnp.float32) - 1.0) + 2.0
        return share.swapaxes(1, 2)[..., None]


def _deep_norm_gain(config: BeatsConfig) -> float:
    """DeepNorm's beta, by which maps that write to the residual stream start smaller."""
    return (8.0 * config.depth) ** -0.25 if config.deep_norm else 1.0


class Layer(nn.Module):
    """Attention and MLP, each joined to a scaled residual stream and normalised after it.

    Attributes:
        config: the encoder's.
    """

    config: BeatsConfig

    @nn.compact
    def __call__(self, x: jax.Array, relative_bias: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `(B, N, D)` to `(B, N, D)`; `relative_bias` is `(h, N, N)`."""
        c = self.config
        branch = GatedAttention(c, name="attn")(x, relative_bias, train=train)
        x = self._join("attn", x, branch, train)
        init = xavier(c.width, c.mlp_width, _deep_norm_gain(c))
        inner, outer = ((c.width,), ("embed",)), ((c.mlp_width,), ("mlp",))
        common = {"precision": c.precision, "kernel_init": init}
        branch = Linear(inner[0], outer[0], inner[1], outer[1], name="fc1", **common)(x)
        branch = jax.nn.gelu(branch.astype(jnp.float32), approximate=False)
        branch = Linear(outer[0], inner[0], outer[1], inner[1], name="fc2", **common)(branch)
        return self._join("mlp", x, branch, train)

    def _join(self, name: str, x: jax.Array, branch: jax.Array, train: bool) -> jax.Array:
        """Adds a branch to the scaled residual stream and normalises."""
        c = self.config
        drop = nn.Dropout(c.dropout_rate, deterministic=not train, name=f"{name}_dropout")
        x = c.residual_scale * x + drop(branch)
        return LayerNorm(c.width, precision=c.precision, name=f"{name}_norm")(x)
