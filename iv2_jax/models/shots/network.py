"""One network for both shot-boundary models: dilated convolutions, two similarity features, a head.

TransNetV2 and AutoShot differ only in the trunk's layers, so they are two configs of `ShotNet`
(spec stage3 13). Sliding it over a video and cutting scenes is NumPy: `iv2_jax.data.shots`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from iv2_jax.data import shots
from iv2_jax.errors import ConfigError
from iv2_jax.models.classifier import RunningNorm
from iv2_jax.models.layers import Linear, Precision, boxed, unit_length

# What PyTorch starts convolutions and linear maps with: U(+-1/sqrt(fan_in)).
_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_BINS_PER_COLOR = 8


@dataclasses.dataclass(frozen=True)
class ShotLayer:
    """One layer of the trunk: spatial 1x3x3, then dilated temporal 3x1x1 convolutions side by side.

    Attributes:
        inner: channels between the spatial and the temporal convolution.
        branches: output channels of each branch; the i-th is dilated by 2^i frames.
        shared: one spatial convolution for all branches instead of one each.
    """

    inner: int
    branches: tuple[int, ...]
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.branches or min(self.inner, *self.branches) < 1:
            raise ConfigError(
                f"layers: inner={self.inner}, branches={self.branches} need at least one branch, "
                "and channels of at least 1"
            )

    @property
    def width(self) -> int:
        """Channels that leave the layer."""
        return sum(self.branches)


@dataclasses.dataclass(frozen=True)
class ShotConfig:
    """Shape of a `ShotNet` (spec stage3 13.1 and 13.3).

    Attributes:
        layers: the trunk, two layers a stage; both of a stage have the same width.
        key_style: whose parameter names PyTorch files have: 'transnetv2' or 'autoshot'. An
            AutoShot file carries one more linear map, which nothing uses.
        frame_height: of a frame in pixels.
        frame_width: of a frame in pixels.
        lookup: frames whose similarity to a frame is looked at, the frame itself in the middle.
        similarity_width: features of each of the two similarities.
        hidden: features before the two outputs.
        dropout: probability of dropping one of those in training.
        precision: dtypes.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    layers: tuple[ShotLayer, ...]
    key_style: str = "transnetv2"
    frame_height: int = 27
    frame_width: int = 48
    lookup: int = 101
    similarity_width: int = 128
    hidden: int = 1024
    dropout: float = 0.5
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        for field in ("frame_height", "frame_width", "lookup", "similarity_width", "hidden"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)}: must be at least 1")
        if self.key_style not in ("transnetv2", "autoshot"):
            raise ConfigError(f"key_style={self.key_style!r}: choose 'transnetv2' or 'autoshot'")
        if self.lookup % 2 == 0:
            raise ConfigError(f"lookup={self.lookup}: must be odd, the frame stands in the middle")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout}: must be in [0, 1)")
        widths = [layer.width for layer in self.layers]
        if not widths or len(widths) % 2 or widths[::2] != widths[1::2]:
            raise ConfigError(f"layers: widths {widths} do not pair up, two equal ones a stage")
        if self.key_style == "autoshot" and len(widths) > 6:
            raise ConfigError(f"layers: AutoShot's key style names 6 layers, not {len(widths)}")
        if min(self.frame_height, self.frame_width) >> len(widths) // 2 < 1:
            raise ConfigError(
                f"frame_height={self.frame_height}, frame_width={self.frame_width}: "
                f"{len(widths) // 2} stages halve frames to nothing"
            )

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels that leave each stage."""
        return tuple(layer.width for layer in self.layers[1::2])

    @property
    def flat_width(self) -> int:
        """Features of a frame after the last stage."""
        stages = len(self.stage_widths)
        return (self.frame_height >> stages) * (self.frame_width >> stages) * self.stage_widths[-1]

    @property
    def head_width(self) -> int:
        """Features of a frame that the head reads: colours, similarity, trunk."""
        return 2 * self.similarity_width + self.flat_width


@flax.struct.dataclass
class ShotOutput:
    """What a `ShotNet` says of each frame; both are logits `(B, T)`, float32.

    Attributes:
        single: is the frame the middle of a transition? Scenes are cut by this one.
        all: is the frame anywhere in a transition?
    """

    single: jax.Array
    all: jax.Array


class SpatialConv(nn.Module):
    """3 x 3 convolution of each frame, without bias, as large as its input.

    Attributes:
        in_width: channels that come in.
        out_width: channels that go out.
        precision: dtypes.
    """

    in_width: int
    out_width: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, T, H, W, in_width)` to `(B, T, H, W, out_width)`."""
        kernel = _conv_kernel(self, (1, 3, 3, self.in_width, self.out_width))
        y = jax.lax.conv_general_dilated(
            x.astype(kernel.dtype).reshape(-1, *x.shape[2:]),
            kernel[0],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.reshape(*x.shape[:-1], self.out_width)


class TemporalConv(nn.Module):
    """Dilated convolution of three frames, without bias, as long as its input.

    Written as three matrix products of shifted frames: XLA on CPU has no fast form of a dilated
    convolution.

    Attributes:
        in_width: channels that come in.
        out_width: channels that go out.
        dilation: frames from one to the next of the three.
        precision: dtypes.
    """

    in_width: int
    out_width: int
    dilation: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, T, H, W, in_width)` to `(B, T, H, W, out_width)`."""
        kernel = _conv_kernel(self, (3, 1, 1, self.in_width, self.out_width))
        reach = ((0, 0), (self.dilation, self.dilation), (0, 0), (0, 0), (0, 0))
        padded = jnp.pad(x.astype(kernel.dtype), reach)
        length = x.shape[1]
        shifted = [padded[:, i * self.dilation : i * self.dilation + length] for i in range(3)]
        return sum(part @ kernel[i, 0, 0] for i, part in enumerate(shifted))


def _conv_kernel(module: SpatialConv | TemporalConv, shape: tuple[int, ...]) -> jax.Array:
    """Creates a kernel (time, height, width, in, out) on a module, in the compute dtype."""
    kernel = module.param(
        "kernel",
        boxed(_init, "conv", "conv", "conv", None, "mlp"),
        shape,
        jnp.dtype(module.precision.param_dtype),
    )
    return kernel.astype(module.precision.compute_dtype)


class TrunkLayer(nn.Module):
    """Branches of one layer, joined, batch-normalised and rectified.

    Attributes:
        in_width: channels that come in.
        layer: shape of the layer.
        precision: dtypes.
    """

    in_width: int
    layer: ShotLayer
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps `(B, T, H, W, in_width)` to `(B, T, H, W, layer.width)`."""
        inner, precision = self.layer.inner, self.precision

        def spatial(name: str) -> jax.Array:
            return SpatialConv(self.in_width, inner, precision, name=name)(x)

        shared = spatial("spatial") if self.layer.shared else None
        outputs = [
            TemporalConv(inner, width, 2**i, precision, name=f"temporal_{i}")(
                spatial(f"spatial_{i}") if shared is None else shared
            )
            for i, width in enumerate(self.layer.branches)
        ]
        y = jnp.concatenate(outputs, axis=-1)
        norm = RunningNorm(self.layer.width, epsilon=1e-3, precision=precision, name="norm")
        flat = y.reshape(y.shape[0], -1, y.shape[-1])
        return nn.relu(norm(flat, train=train)).reshape(y.shape)


class UnusedLinear(nn.Module):
    """A linear map that released files carry and nothing reads; kept so that they come back whole.

    Attributes:
        in_width: features that would come in.
        out_width: features that would go out.
        precision: dtypes.
    """

    in_width: int
    out_width: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self) -> None:
        """Creates the parameters."""
        dtype = jnp.dtype(self.precision.param_dtype)
        shape = (self.in_width, self.out_width)
        self.param("kernel", boxed(_init, "embed", "mlp"), shape, dtype)
        self.param("bias", boxed(nn.initializers.zeros_init(), "mlp"), (self.out_width,), dtype)


class ShotNet(nn.Module):
    """Shot-boundary network (spec stage3 13.1 and 13.3).

    Attributes:
        config: shape.
    """

    config: ShotConfig

    @nn.compact
    def __call__(self, frames: jax.Array, *, train: bool = False) -> ShotOutput:
        """Judges every frame of a window.

        Args:
            frames: `(B, T, frame_height, frame_width, 3)` RGB, uint8 or float in 0..255.
            train: batch statistics and dropout (rng stream `dropout`); the moved statistics are
                left in the collection `batch_stats`, see `classifier.with_running_statistics`.

        Returns:
            Logits of each frame.

        Raises:
            ValueError: the frames have another size.
        """
        config = self.config
        size = (config.frame_height, config.frame_width, 3)
        if frames.ndim != 5 or frames.shape[2:] != size:
            raise ValueError(f"frames {frames.shape} are not (B, T, {', '.join(map(str, size))})")
        precision = config.precision
        x = frames.astype(precision.compute_dtype) / 255
        width, means = 3, []
        for i, layer in enumerate(config.layers):
            y = TrunkLayer(width, layer, precision, name=f"layer_{i}")(x, train=train)
            width = layer.width
            if i % 2 == 0:
                x = y
                continue
            # Rectified before the sum in both originals; odd edges are cut by the pool.
            x = nn.avg_pool(x + y, window_shape=(1, 2, 2), strides=(1, 2, 2))
            means.append(jnp.mean(x.astype(jnp.float32), axis=(2, 3)))
        colors = unit_length(color_histogram(frames))
        similar = unit_length(
            self._linear("similarity_projection", sum(config.stage_widths), "embed")(
                jnp.concatenate(means, axis=-1)
            )
        )
        features = (
            nn.relu(self._linear("color", config.lookup, "embed")(self._looked_up(colors))),
            nn.relu(self._linear("similarity", config.lookup, "embed")(self._looked_up(similar))),
            x.reshape(*x.shape[:2], -1),
        )
        x = jnp.concatenate(features, axis=-1)
        x = nn.relu(self._linear("hidden", config.head_width, "embed", config.hidden)(x))
        x = nn.Dropout(config.dropout)(x, deterministic=not train)
        if config.key_style == "autoshot":
            unused_width = config.head_width + config.hidden
            UnusedLinear(unused_width, config.hidden, precision, name="unused")()
        single, every = (
            self._linear(name, config.hidden, "mlp", 1)(x)[..., 0].astype(jnp.float32)
            for name in ("single", "all")
        )
        return ShotOutput(single, every)

    def _linear(self, name: str, in_width: int, axis: str, out_width: int | None = None) -> Linear:
        """A linear map; `similarity_width` features come out unless said otherwise."""
        return Linear(
            (in_width,),
            (out_width or self.config.similarity_width,),
            (axis,),
            ("mlp" if axis == "embed" else "classes",),
            precision=self.config.precision,
            kernel_init=_init,
            name=name,
        )

    def _looked_up(self, x: jax.Array) -> jax.Array:
        """Products of each frame's vector with its neighbours', 0 beyond the window.

        (B, T, C) gives (B, T, lookup), column j for the frame j - lookup // 2 away.
        """
        reach = self.config.lookup // 2
        products = jnp.matmul(x, x.swapaxes(1, 2), preferred_element_type=jnp.float32)
        products = jnp.pad(products, ((0, 0), (0, 0), (reach, reach)))
        length = x.shape[1]
        index = jnp.arange(length)[:, None] + jnp.arange(self.config.lookup)[None]
        return jnp.take_along_axis(products, index[None], axis=2)


def make_predict(config: ShotConfig, params: Mapping[str, Any]) -> shots.Predict:
    """The compiled network as `data.shots.predict_video` takes it.

    Args:
        config: the network's config.
        params: its (unboxed) parameters.

    Returns:
        Takes frames `(B, T, H, W, 3)`, gives both logits `(B, T)`.
    """
    apply = jax.jit(ShotNet(config).apply)

    def predict(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = apply({"params": params}, frames)
        return np.asarray(out.single), np.asarray(out.all)

    return predict


def color_histogram(frames: jax.Array) -> jax.Array:
    """Pixels of each frame in 8 x 8 x 8 boxes of colour.

    Args:
        frames: `(B, T, H, W, 3)` RGB, uint8 or float in 0..255 (cut to whole numbers).

    Returns:
        `(B, T, 512)` float32 counts; red is the slowest.
    """
    batch, length = frames.shape[:2]
    color = frames.astype(jnp.int32) >> 5
    box = (color[..., 0] << 6) | (color[..., 1] << 3) | color[..., 2]
    box = box.reshape(batch * length, -1)
    row = jnp.arange(batch * length)[:, None]
    counts = jnp.zeros((batch * length, _BINS_PER_COLOR**3), jnp.float32).at[row, box].add(1.0)
    return counts.reshape(batch, length, -1)


def _transnetv2(width: int) -> tuple[ShotLayer, ...]:
    """Three stages of two equal layers, each twice as wide as the one before."""
    widths = (width, 2 * width, 4 * width)
    return tuple(ShotLayer(2 * w, (w,) * 4) for w in widths for _ in range(2))


ZOO: dict[str, ShotConfig] = {
    "transnetv2": ShotConfig(_transnetv2(16)),
    "autoshot": ShotConfig(
        (
            ShotLayer(16, (16,) * 4),
            ShotLayer(64, (12, 12, 12, 12, 16), shared=True),
            ShotLayer(128, (25, 25, 25, 25, 28), shared=True),
            ShotLayer(128, (25, 25, 25, 25, 28), shared=True),
            ShotLayer(192, (51, 51, 51, 51, 52)),
            ShotLayer(128, (51, 51, 51, 51, 52)),
        ),
        key_style="autoshot",
    ),
    "test_tiny_shots": ShotConfig(
        (ShotLayer(3, (2, 2)), ShotLayer(3, (1, 2, 1), shared=True)),
        key_style="autoshot",
        frame_height=5,
        frame_width=6,
        lookup=5,
        similarity_width=4,
        hidden=6,
    ),
}
