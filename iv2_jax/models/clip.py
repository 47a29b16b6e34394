"""InternVideo2-CLIP: a video encoder and a text tower that meet in one space.

The large models (1B, 6B) pair the encoder with the 7B LLaMA-style text tower; the small ones (S, B,
L) with MobileCLIP-B's and a learned map from the attentive pool to the text's width.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models import zoo
from iv2_jax.models.layers import LayerNorm, Linear, boxed
from iv2_jax.models.text import llama_clip, mobileclip
from iv2_jax.models.text.llama_clip import LlamaClipConfig, LlamaClipText
from iv2_jax.models.text.mobileclip import MobileClipConfig, MobileClipText
from iv2_jax.models.text.output import TextOutput
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder
from iv2_jax.objectives.contrastive import clamp_temperature


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The large models: pooled video and projected text are compared as they are (spec stage2 7).

    Attributes:
        vision: the video encoder; its `pool_width` is the width of the common space.
        text: the text tower.
        temp_init: starting temperature; similarities are divided by it.
        temp_min: the temperature never counts as less than this.

    Raises:
        ConfigError: the towers end in different widths, the encoder has no pool, or a temperature
            is not positive.
    """

    vision: EncoderConfig
    text: LlamaClipConfig = dataclasses.field(default_factory=LlamaClipConfig)
    temp_init: float = 0.01
    temp_min: float = 0.01

    def __post_init__(self) -> None:
        _check(self)
        if self.vision.pool_width != self.text.out_width:
            raise ConfigError(
                f"vision.pool_width={self.vision.pool_width} must be "
                f"text.out_width={self.text.out_width}: the features are compared as they are"
            )


@dataclasses.dataclass(frozen=True)
class SmallClipConfig:
    """The small models: LayerNorm and a linear map bring the pooled video to the text's width.

    Attributes:
        vision: the video encoder.
        text: the text tower.
        temp_init: starting temperature; similarities are divided by it.
        temp_min: the temperature never counts as less than this.

    Raises:
        ConfigError: the encoder has no pool, or a temperature is not positive.
    """

    vision: EncoderConfig
    text: MobileClipConfig = dataclasses.field(default_factory=MobileClipConfig)
    temp_init: float = 0.01
    temp_min: float = 0.01

    def __post_init__(self) -> None:
        _check(self)


def _check(config: ClipConfig | SmallClipConfig) -> None:
    """Refuses an encoder without a pool and temperatures that are not positive."""
    if not config.vision.pool:
        raise ConfigError("vision.pool=False: the pooled video is what CLIP compares with texts")
    for field in ("temp_init", "temp_min"):
        if getattr(config, field) <= 0:
            raise ConfigError(f"{field}={getattr(config, field)}: must be positive")


@flax.struct.dataclass
class ClipOutput:
    """Features of a batch of pairs, and the temperature of their similarities.

    Attributes:
        vision: `(B, C)`, no unit length yet (the loss scales).
        text: `(B, C)`, no unit length yet.
        temperature: scalar, at least `temp_min`.
    """

    vision: jax.Array
    text: jax.Array
    temperature: jax.Array


class VisionAlign(nn.Module):
    """LayerNorm and linear map from the attentive pool to the text's width (spec stage2 7.3).

    Attributes:
        config: the model's config.
    """

    config: SmallClipConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, pool_width)` to `(B, text.out_width)`."""
        width, out_width = self.config.vision.pool_width, self.config.text.out_width
        precision = self.config.vision.precision
        x = LayerNorm(width, axis_name="pool", precision=precision, name="norm")(x)
        return Linear((width,), (out_width,), ("pool",), (None,), precision=precision, name="proj")(
            x
        )


class Clip(nn.Module):
    """Video and text towers with a learned temperature.

    Attributes:
        config: of a large or a small model.
    """

    config: ClipConfig | SmallClipConfig

    def setup(self) -> None:
        """Makes the towers and the temperature."""
        c = self.config
        self.vision_encoder = VideoEncoder(c.vision)
        if isinstance(c, SmallClipConfig):
            self.vision_align = VisionAlign(c)
            self.text_encoder = MobileClipText(c.text)
        else:
            self.text_encoder = LlamaClipText(c.text)
        # Kept in float32: bfloat16 would round the floor of 0.01 up (spec stage2 11.5 and 11.27).
        init = boxed(nn.initializers.constant(c.temp_init))
        self.temp = self.param("temp", init, (), jnp.float32)

    def __call__(self, video: jax.Array, ids: jax.Array, *, train: bool = False) -> ClipOutput:
        """Encodes videos and texts.

        Args:
            video: `(B, T, H, W, 3)` normalised pixels.
            ids: int `(B', N)` token ids, padded with 0 on the right.
            train: turns DropPath and dropout on (rng streams `droppath`, `dropout`).

        Returns:
            `ClipOutput`.
        """
        vision = self.encode_vision(video, train=train)
        text = self.encode_text(ids, train=train).pooled
        return ClipOutput(vision, text, self.temperature())

    def encode_vision(self, video: jax.Array, *, train: bool = False) -> jax.Array:
        """Encodes videos, or images as videos of one frame.

        Args:
            video: `(B, T, H, W, 3)` normalised pixels; T = 1 for images, whose positions are the
                mean over time of the video's (joint) or the spatial table (separable).
            train: turns DropPath on.

        Returns:
            `(B, C)`.
        """
        pooled = self.vision_encoder(video, train=train).pooled
        return self.vision_align(pooled) if isinstance(self.config, SmallClipConfig) else pooled

    def encode_text(
        self, ids: jax.Array, *, return_layers: tuple[int, ...] = (), train: bool = False
    ) -> TextOutput:
        """Encodes texts.

        Args:
            ids: int `(B, N)` token ids, padded with 0 on the right.
            return_layers: blocks whose outputs are returned, ascending.
            train: turns the dropout of LoRA on.

        Returns:
            `TextOutput`, C as in `encode_vision`.
        """
        return self.text_encoder(ids, return_layers=return_layers, train=train)

    def temperature(self) -> jax.Array:
        """The temperature, raised to `temp_min` where it is lower; its gradient passes by."""
        return clamp_temperature(self.temp, self.config.temp_min, None)


def _vision(name: str, drop_path_rate: float) -> EncoderConfig:
    """A named encoder as the CLIP configs have it (spec stage2 7.1)."""
    return dataclasses.replace(
        zoo.get(f"internvideo2_{name}"),
        drop_path_rate=drop_path_rate,
        layer_scale_init=0.1,
        image_positions="shared",
    )


ZOO = {
    "internvideo2_clip_1b": ClipConfig(_vision("1b", 0.3)),
    "internvideo2_clip_6b": ClipConfig(_vision("6b", 0.35)),
    "internvideo2_clip_small": SmallClipConfig(_vision("small", 0.0)),
    "internvideo2_clip_base": SmallClipConfig(_vision("base", 0.0)),
    "internvideo2_clip_large": SmallClipConfig(_vision("large", 0.0)),
    "test_tiny_clip": ClipConfig(
        dataclasses.replace(zoo.get("test_tiny"), image_positions="shared"),
        llama_clip.ZOO["test_tiny_llama_clip"],
    ),
    "test_tiny_clip_small": SmallClipConfig(
        dataclasses.replace(zoo.get("test_tiny"), image_positions="shared"),
        mobileclip.ZOO["test_tiny_mobileclip"],
    ),
}
