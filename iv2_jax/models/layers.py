"""Norms, linear maps, LayerScale, DropPath, MLP and patch embedding: the shared vocabulary.

Every parameter carries logical axis names (see `Linear`); callers strip them with
`flax.core.meta.unbox`. Norms, softmax and LayerScale compute in float32 whatever the compute
dtype is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.int8 import Int8Kernel, contract
from iv2_jax.models.lora import LoraConfig
from iv2_jax.parallel.mesh import keep_rows_split

Initializer = Callable[..., jax.Array]

# The released models cut their normal draws at +-2 absolute, a hundred deviations away: a plain
# normal distribution is the same thing (spec stage1 2.10).
kernel_init: Initializer = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Which dtypes a model keeps and computes in.

    Attributes:
        param_dtype: name of the dtype of the parameters.
        compute_dtype: name of the dtype of activations and matrix products. Norms, softmax,
            LayerScale and unit-length scaling stay in float32.
    """

    param_dtype: str = "float32"
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in ("param_dtype", "compute_dtype"):
            value = getattr(self, field)
            try:
                dtype = jnp.dtype(value)
            except TypeError as error:
                raise ConfigError(f"precision.{field}={value!r} is not a dtype") from error
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ConfigError(f"precision.{field}={value!r} is not a floating-point dtype")
            # Stored as a name, so that the config stays hashable and can be written as JSON.
            object.__setattr__(self, field, dtype.name)


def boxed(init: Initializer, *names: str | None) -> Initializer:
    """Returns `init` with one logical axis name for each axis of the array it makes."""
    return nn.with_logical_partitioning(init, names)


class Linear(nn.Module):
    """`y = x . kernel + bias`, contracting one or more trailing axes.

    Keeping heads and head_dim as axes of the kernel (instead of one flattened axis) lets the
    heads be sharded without reshaping a sharded axis.

    Attributes:
        in_shape: trailing shape of the input.
        out_shape: trailing shape of the output.
        in_axes: logical names of the input axes.
        out_axes: logical names of the output axes.
        use_bias: adds `bias` of shape `out_shape`, zero at the start.
        precision: dtypes.
        kernel_init: initializer of `kernel` (shape `in_shape + out_shape`).
        lora: adds a low-rank adapter, `lora_a` and `lora_b`, always kept and computed in float32
            (spec stage 3, 6.4); it starts as zero. None adds nothing.
        flat: takes and gives the trailing axes as one, `(..., prod(in_shape))` to
            `(..., prod(out_shape))`. Heads of 88 are no whole tiles of a TPU's memory, all heads
            side by side are.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str | None, ...]
    out_axes: tuple[str | None, ...]
    use_bias: bool = True
    precision: Precision = Precision()
    kernel_init: Initializer = kernel_init
    lora: LoraConfig | None = None
    flat: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, *, out_scale: jax.Array | None = None
    ) -> jax.Array:
        """Maps `(..., *in_shape)` to `(..., *out_shape)` in the compute dtype.

        `train` switches on the adapter's dropout, which draws from the rng stream `dropout`.
        `out_scale`, of the shape `out_shape`, multiplies the output by way of kernel and bias, in
        float32: nothing of the output's size is multiplied, forward or backward.
        """
        dtype = self.precision.compute_dtype
        rows = x.ndim > (1 if self.flat else len(self.in_shape))
        x = keep_rows_split(x) if rows else x
        kernel = self.param(
            "kernel",
            boxed(self.kernel_init, *self.in_axes, *self.out_axes),
            (*self.in_shape, *self.out_shape),
            jnp.dtype(self.precision.param_dtype),
        )
        if (self.flat or out_scale is not None) and self.lora is not None:
            raise ValueError("a map with an adapter is neither flat nor scaled")
        if out_scale is not None:
            kernel = _scaled(kernel, out_scale)
        y = self._product(x, kernel)
        if self.use_bias:
            bias = self.param(
                "bias",
                boxed(nn.initializers.zeros_init(), *self.out_axes),
                self.out_shape,
                jnp.dtype(self.precision.param_dtype),
            )
            if out_scale is not None:
                bias = _scaled(bias, out_scale)
            y = y + (bias.reshape(-1) if self.flat else bias).astype(dtype)
        if self.lora is not None:
            y = (y + self._adapter(x, self.lora, train)).astype(dtype)
        return keep_rows_split(y) if rows else y

    def _product(self, x: jax.Array, kernel: Any) -> jax.Array:
        """The product without bias; a flat one is of two-dimensional arrays."""
        dtype = self.precision.compute_dtype
        if not self.flat:
            return contract(x, kernel, len(self.in_shape), dtype)
        if isinstance(kernel, Int8Kernel):
            return contract(x, kernel.flat(len(self.in_shape)), 1, dtype)
        # Cast first: it is the narrower kernel that is laid out anew.
        kernel = kernel.astype(dtype).reshape(math.prod(self.in_shape), -1)
        return contract(x, kernel, 1, dtype)

    def _adapter(self, x: jax.Array, config: LoraConfig, train: bool) -> jax.Array:
        """The adapter's share of the output, float32."""
        fan_in = math.prod(self.in_shape)

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            """Kaiming's uniform draw with a = sqrt(5), as the original's adapters start."""
            return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

        a = self.param(
            "lora_a",
            boxed(uniform, *self.in_axes, "rank"),
            (*self.in_shape, config.rank),
            jnp.float32,
        )
        b = self.param(
            "lora_b",
            boxed(nn.initializers.zeros_init(), "rank", *self.out_axes),
            (config.rank, *self.out_shape),
            jnp.float32,
        )
        x = nn.Dropout(config.dropout)(x.astype(jnp.float32), deterministic=not train)
        x = jnp.tensordot(x, a, axes=len(self.in_shape))
        return jnp.tensordot(x, b, axes=1) * config.scale


def _scaled(weights: Any, factors: jax.Array) -> Any:
    """Weights `(..., *out)` times float factors of the shape `out`, in float32."""
    factors = factors.astype(jnp.float32)
    if isinstance(weights, Int8Kernel):
        return weights.replace(scale=weights.scale * factors)
    return weights.astype(jnp.float32) * factors


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the trailing axes (spec stage1 2.4).

    Attributes:
        width: number of normalised features; the trailing axes of the input must multiply to it
            (queries and keys come as (heads, head_dim) and are normalised over both).
        epsilon: added to the mean square.
        axis_name: logical name of `scale`'s axis.
        precision: dtypes; statistics and scaling are float32.
    """

    width: int
    epsilon: float = 1e-6
    axis_name: str | None = "embed"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, num_axes: int = 1) -> jax.Array:
        """Normalises the last `num_axes` axes of `x`; returns the compute dtype."""
        scale = self.param(
            "scale",
            boxed(nn.initializers.ones_init(), self.axis_name),
            (self.width,),
            jnp.dtype(self.precision.param_dtype),
        )
        axes = tuple(range(-num_axes, 0))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + self.epsilon)
        x = x * scale.astype(jnp.float32).reshape(x.shape[-num_axes:])
        return x.astype(self.precision.compute_dtype)


class LayerNorm(nn.Module):
    """Mean and variance normalisation over the last axis, with `scale` and `bias`.

    Attributes:
        width: size of the last axis.
        epsilon: added to the variance (1e-5 in pools and decoders, spec stage1 2.5 and 3.2).
        axis_name: logical name of the parameters' axis.
        precision: dtypes; statistics and scaling are float32.
    """

    width: int
    epsilon: float = 1e-5
    axis_name: str | None = "embed"
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `(..., width)`; returns the compute dtype."""
        dtype = jnp.dtype(self.precision.param_dtype)
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        scale = self.param("scale", boxed(ones, self.axis_name), (self.width,), dtype)
        bias = self.param("bias", boxed(zeros, self.axis_name), (self.width,), dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        x = x * scale.astype(jnp.float32) + bias.astype(jnp.float32)
        return x.astype(self.precision.compute_dtype)


class LayerScale(nn.Module):
    """A learned factor for each feature of a residual branch, applied in float32.

    Attributes:
        width: size of the last axis.
        init: starting value of `gamma`.
        precision: dtypes.
    """

    width: int
    init: float = 1e-5
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array | None) -> jax.Array:
        """Scales `(..., width)`; returns the compute dtype. None gives the factors `(width,)`."""
        gamma = self.param(
            "gamma",
            boxed(nn.initializers.constant(self.init), "embed"),
            (self.width,),
            jnp.dtype(self.precision.param_dtype),
        )
        if x is None:
            return gamma
        scaled = x.astype(jnp.float32) * gamma.astype(jnp.float32)
        return scaled.astype(self.precision.compute_dtype)


class DropPath(nn.Module):
    """Drops the residual branch of whole samples and rescales the kept ones (stochastic depth)."""

    @nn.compact
    def __call__(self, x: jax.Array, rate: jax.Array | float | None) -> jax.Array:
        """Zeroes `x[i]` with probability `rate`, else divides it by `1 - rate`.

        Args:
            x: `(B, ...)` output of a residual branch.
            rate: probability in [0, 1), may be traced (one value for each scanned block);
                None returns `x` and draws nothing.

        Returns:
            `(B, ...)`; needs the rng stream `droppath` unless `rate` is None.
        """
        if rate is None:
            return x
        keep = 1.0 - jnp.asarray(rate, jnp.float32)
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.bernoulli(self.make_rng("droppath"), keep, shape)
        return x * jnp.where(kept, 1.0 / keep, 0.0).astype(x.dtype)


class Mlp(nn.Module):
    """Linear, GELU, linear.

    Attributes:
        width: size of the last axis of input and output.
        hidden: size between the two maps.
        tanh_gelu: tanh approximation of GELU (the fused kernels the released weights were trained
            with) instead of the exact erf form (spec stage1 2.6).
        precision: dtypes.
        out_init: initializer of the second kernel.
    """

    width: int
    hidden: int
    tanh_gelu: bool = True
    precision: Precision = Precision()
    out_init: Initializer = kernel_init

    @nn.compact
    def __call__(self, x: jax.Array, *, out_scale: jax.Array | None = None) -> jax.Array:
        """Maps `(..., width)` to `(..., width)`, times `out_scale` `(width,)` if given."""
        inner, outer = ((self.width,), ("embed",)), ((self.hidden,), ("mlp",))
        x = Linear(inner[0], outer[0], inner[1], outer[1], precision=self.precision, name="fc1")(x)
        x = jax.nn.gelu(x, approximate=self.tanh_gelu)
        return Linear(
            outer[0],
            inner[0],
            outer[1],
            inner[1],
            precision=self.precision,
            kernel_init=self.out_init,
            name="fc2",
        )(x, out_scale=out_scale)


def unit_length(x: jax.Array) -> jax.Array:
    """Divides each vector of the last axis by its l2 norm, in float32.

    The original has no epsilon and gives NaN at zero (spec stage1 trap 10.16). Here a vector
    shorter than 1e-12 is returned as it is, with a finite gradient; every longer one is treated
    exactly as the original does.

    Args:
        x: `(..., C)`.

    Returns:
        `(..., C)` in the dtype of `x`.
    """
    wide = x.astype(jnp.float32)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    # Selected before the root, not after it: the gradient of the branch not taken stays finite.
    safe = jnp.where(square > 1e-24, square, 1.0)
    return (wide * jax.lax.rsqrt(safe)).astype(x.dtype)


def gather_tokens(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """Picks tokens by sample: `(B, N, ...)` and int `(B, M)` give `(B, M, ...)`.

    An index out of range gives NaN, never another token.
    """
    index = index.reshape(index.shape + (1,) * (tokens.ndim - 2))
    return jnp.take_along_axis(tokens, index, axis=1)


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping video patches (spec stage1 2.1).

    A convolution whose stride is its kernel is one matrix product over flattened patches; written
    so, hidden patches can be left out before the product, which at 80 % masking saves four
    fifths of its cost.

    Attributes:
        width: features of a token.
        patch_size: height and width of a patch in pixels.
        tubelet: frames of a patch.
        precision: dtypes.
    """

    width: int
    patch_size: int
    tubelet: int = 1
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, video: jax.Array, patches: jax.Array | None = None) -> jax.Array:
        """Embeds all patches, or the listed ones.

        Args:
            video: `(B, T, H, W, 3)`, normalised pixels.
            patches: int `(B, M)` patch numbers, time-major, then row, then column; None for all.

        Returns:
            `(B, M, width)`, M = T/tubelet * H/patch * W/patch when `patches` is None.
        """
        channels = video.shape[-1]
        kernel_shape = (self.tubelet, self.patch_size, self.patch_size, channels)
        fan_in = math.prod(kernel_shape)

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            """PyTorch's default for convolutions: U(+-1/sqrt(fan_in)), kernel and bias alike."""
            return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

        x = extract_patches(keep_rows_split(video), self.patch_size, self.tubelet)
        if patches is not None:
            x = gather_tokens(x, patches)
        dtype, param_dtype = self.precision.compute_dtype, jnp.dtype(self.precision.param_dtype)
        kernel_axes = ("patch", "pixel", None, None, "embed")
        kernel = self.param(
            "kernel", boxed(uniform, *kernel_axes), (*kernel_shape, self.width), param_dtype
        )
        bias = self.param("bias", boxed(uniform, "embed"), (self.width,), param_dtype)
        kernel = kernel.reshape(fan_in, self.width)
        return keep_rows_split(x.astype(dtype) @ kernel.astype(dtype) + bias.astype(dtype))


def extract_patches(video: jax.Array, patch_size: int, tubelet: int) -> jax.Array:
    """Cuts a video into flattened patches.

    Args:
        video: `(B, T, H, W, C)`.
        patch_size: height and width of a patch in pixels.
        tubelet: frames of a patch.

    Returns:
        `(B, T/tubelet * H/patch * W/patch, tubelet * patch * patch * C)`; patches time-major, then
        row, then column; values of a patch in (frame, row, column, channel) order.
    """
    batch, frames, height, width, channels = video.shape
    t, h, w = frames // tubelet, height // patch_size, width // patch_size
    x = video.reshape(batch, t, tubelet, h, patch_size, w, patch_size, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, t * h * w, tubelet * patch_size * patch_size * channels)
