"""BEATs: a transformer over patches of a log-mel spectrogram (spec stage2 5.2).

Positions come in two ways: a wide convolution over the tokens, added to them, and a table of
biases by relative distance, made once and shared by all layers, of which every query takes a
learned share.
"""

from __future__ import annotations

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.audio.beats_layers import Layer, PositionConv, relative_buckets, xavier
from iv2_jax.models.block_stack import resolve_layers, scan_blocks
from iv2_jax.models.checks import require_rates, require_remat, require_sizes
from iv2_jax.models.layers import LayerNorm, Linear, Precision, boxed


@dataclasses.dataclass(frozen=True)
class BeatsConfig:
    """Shape and options of a `Beats`; the defaults are the released audio tower's (BEATs iter3).

    Attributes:
        width: features of a token.
        depth: number of layers.
        num_heads: attention heads.
        mlp_width: hidden size of a layer's MLP.
        patch_width: size of a patch's embedding before it is mapped to `width`; where both are
            equal there is no such map.
        patch_size: frames and mel bins of a patch.
        patch_bias: bias on the patch embedding.
        num_mels: mel bins of the spectrogram.
        num_frames: frames of a clip, for those who need a shape; others are taken too.
        conv_taps: tokens that the positional convolution spans.
        conv_groups: groups of its channels.
        num_buckets: rows of the table of relative biases, half for each direction.
        max_distance: distance in tokens from which on all fall into the last bucket.
        deep_norm: scale the residual stream by (2 depth)^(1/4) before it is joined (DeepNorm).
        gradient_decay: gradients are multiplied by it in front of every layer, so that lower
            layers move less; outputs do not change. 0.6 in the released tower.
        dropout_rate: dropout after the position norm, after attention and after the MLP.
        attention_dropout_rate: dropout of the attention's weights.
        layer_drop: probability that training skips a layer, for the whole batch.
        remat: what the backward pass recomputes: 'none', 'dots' or 'full'.
        scan_unroll: layers in one iteration of the scan over depth.
        precision: dtypes.

    Raises:
        ConfigError: a value is out of range or does not fit another; the message names both.
    """

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    patch_width: int = 512
    patch_size: int = 16
    patch_bias: bool = False
    num_mels: int = 64
    num_frames: int = 998
    conv_taps: int = 128
    conv_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    deep_norm: bool = True
    gradient_decay: float = 0.6
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    layer_drop: float = 0.0
    remat: str = "none"
    scan_unroll: int = 1
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        require_sizes(self, _SIZES)
        for divisor in ("num_heads", "conv_groups"):
            if self.width % getattr(self, divisor):
                raise ConfigError(
                    f"width={self.width} is not a multiple of {divisor}={getattr(self, divisor)}"
                )
        for field in ("num_mels", "num_frames"):
            if getattr(self, field) < self.patch_size:
                raise ConfigError(
                    f"{field}={getattr(self, field)} is smaller than patch_size={self.patch_size}"
                )
        if self.num_buckets % 2 or self.num_buckets < 4:
            raise ConfigError(f"num_buckets={self.num_buckets}: an even number from 4 on is needed")
        if self.max_distance <= self.num_buckets // 4:
            raise ConfigError(
                f"max_distance={self.max_distance} must exceed num_buckets / 4 = "
                f"{self.num_buckets // 4}, up to which every distance has a bucket of its own"
            )
        require_rates(self, ("dropout_rate", "attention_dropout_rate", "layer_drop"))
        if not 0.0 < self.gradient_decay <= 1.0:
            raise ConfigError(f"gradient_decay={self.gradient_decay}: must be in (0, 1]")
        require_remat(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a clip along time and frequency; a rest smaller than a patch is dropped."""
        return self.num_frames // self.patch_size, self.num_mels // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of a clip."""
        return math.prod(self.grid)

    @property
    def residual_scale(self) -> float:
        """DeepNorm's alpha."""
        return (2.0 * self.depth) ** 0.25 if self.deep_norm else 1.0


_SIZES = (
    "width",
    "depth",
    "num_heads",
    "mlp_width",
    "patch_width",
    "patch_size",
    "num_mels",
    "num_frames",
    "conv_taps",
    "conv_groups",
    "num_buckets",
    "max_distance",
    "scan_unroll",
)


@flax.struct.dataclass
class BeatsOutput:
    """What `Beats` gives.

    Attributes:
        tokens: `(B, N, D)` after the last layer, which ends in a norm.
        pooled: `(B, D)` mean over the tokens.
        features: `(K, B, N, D)` after each asked-for layer, ascending, or None.
    """

    tokens: jax.Array
    pooled: jax.Array
    features: jax.Array | None = None


class Beats(nn.Module):
    """Log-mel spectrogram to tokens.

    Attributes:
        config: shape and options.
    """

    config: BeatsConfig

    def setup(self) -> None:
        """Makes the parts; `layers` is one layer whose parameters the scan stacks."""
        c = self.config
        self.patch_embed = Linear(
            (c.patch_size, c.patch_size),
            (c.patch_width,),
            ("pixel", None),
            ("patch",),
            use_bias=c.patch_bias,
            precision=c.precision,
            kernel_init=xavier(c.patch_size**2, c.patch_width),
        )
        self.patch_norm = LayerNorm(c.patch_width, axis_name="patch", precision=c.precision)
        if c.patch_width != c.width:
            self.patch_proj = Linear(
                (c.patch_width,), (c.width,), ("patch",), ("embed",), precision=c.precision
            )
        self.pos_conv = PositionConv(c)
        self.norm = LayerNorm(c.width, precision=c.precision)
        self.dropout = nn.Dropout(c.dropout_rate)
        self.bias_table = self.param(
            "relative_bias",
            boxed(xavier(c.num_buckets, c.num_heads), None, "heads"),
            (c.num_buckets, c.num_heads),
            jnp.dtype(c.precision.param_dtype),
        )
        self.layers = Layer(c)

    def embed_patches(self, fbank: jax.Array) -> jax.Array:
        """Embeds the patches of `(B, frames, mels)`, leaving out the rest at the ends.

        Returns:
            `(B, N, patch_width)`; token = time * (patches along frequency) + frequency.

        Raises:
            ConfigError: the spectrogram is smaller than one patch.
        """
        size = self.config.patch_size
        if fbank.ndim != 3 or min(fbank.shape[1:]) < size:
            raise ConfigError(
                f"fbank has shape {tuple(fbank.shape)}; (B, frames, mels) with at least "
                f"patch_size={size} frames and mel bins is needed"
            )
        time, freq = fbank.shape[1] // size, fbank.shape[2] // size
        x = fbank[:, : time * size, : freq * size].reshape(-1, time, size, freq, size)
        return self.patch_embed(x.swapaxes(2, 3).reshape(-1, time * freq, size, size))

    def embed(self, fbank: jax.Array) -> jax.Array:
        """What the positional convolution reads, `(B, N, D)`: patches, normed and mapped."""
        x = self.patch_norm(self.embed_patches(fbank))
        return x if self.config.patch_width == self.config.width else self.patch_proj(x)

    def relative_bias(self, num_tokens: int) -> jax.Array:
        """The biases `(h, N, N)`, float32, by query and key, that all layers share."""
        c = self.config
        rows = relative_buckets(num_tokens, c.num_buckets, c.max_distance)
        return jnp.moveaxis(self.bias_table.astype(jnp.float32)[rows], -1, 0)

    def __call__(
        self, fbank: jax.Array, *, return_layers: tuple[int, ...] = (), train: bool = False
    ) -> BeatsOutput:
        """Encodes spectrograms.

        Args:
            fbank: `(B, frames, mels)`, normalised log-mel energies (`data.fbank`); any number of
                frames and bins of at least one patch.
            return_layers: layers whose outputs are returned, ascending; negative numbers count
                from the end.
            train: turns dropout and layer drop on (rng stream `dropout`).

        Returns:
            `BeatsOutput`.

        Raises:
            ConfigError: the spectrogram is smaller than one patch, or a layer is unknown.
        """
        c = self.config
        x = self.embed(fbank)
        x = self.norm(x + self.pos_conv(x))
        x = self.dropout(x, deterministic=not train)
        bias = self.relative_bias(x.shape[1])

        def call(layer: Layer, x: jax.Array, index: jax.Array, rate: None) -> jax.Array:
            del index, rate
            x = _scale_gradient(x, c.gradient_decay)
            y = layer(x, bias, train=train)
            if not (train and c.layer_drop):
                return y
            kept = jax.random.bernoulli(layer.make_rng("dropout"), 1.0 - c.layer_drop)
            return jnp.where(kept, y, x)

        tokens, features = scan_blocks(
            self.layers,
            x,
            depth=c.depth,
            return_layers=resolve_layers(return_layers, c.depth, "return_layers"),
            remat=c.remat,
            unroll=c.scan_unroll,
            train=train,
            call=call,
        )
        pooled = jnp.mean(tokens.astype(jnp.float32), axis=1).astype(tokens.dtype)
        return BeatsOutput(tokens, pooled, features)


def _scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """`x`, with its gradient multiplied by `factor`."""
    if factor == 1.0:
        return x
    fixed = jax.lax.stop_gradient(x)
    return fixed + factor * (x - fixed)  # the difference is an exact zero


ZOO: dict[str, BeatsConfig] = {
    "beats_iter3": BeatsConfig(),
    # For tests: every part of the large one, a second to compile.
    "test_tiny_beats": BeatsConfig(
        width=24,
        depth=2,
        num_heads=2,
        mlp_width=32,
        patch_width=16,
        patch_size=4,
        num_mels=8,
        num_frames=24,
        conv_taps=4,
        conv_groups=2,
        num_buckets=8,
        max_distance=20,
    ),
}
