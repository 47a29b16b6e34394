"""The InternVideo2 video encoder: a ViT over space-time patches with an attentive pool."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models import positions
from iv2_jax.models.attention import AttentionPool
from iv2_jax.models.block_stack import Block, resolve_layers, scan_blocks
from iv2_jax.models.checks import require_rates, require_remat, require_sizes
from iv2_jax.models.layers import PatchEmbed, Precision, boxed, kernel_init
from iv2_jax.pixels import IMAGENET_MEAN, IMAGENET_STD, normalize


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and options of a `VideoEncoder` (spec stage1 sections 1 and 2).

    Attributes:
        width: features of a token.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_width: hidden size of a block's MLP.
        patch_size: height and width of a patch in pixels.
        tubelet: frames of a patch.
        image_size: height and width of a frame in pixels.
        num_frames: frames of a clip.
        pixel_mean: of red, green and blue in 0..1, taken from the pixels.
        pixel_std: what the pixels are divided by after that.
        pool_heads: heads of the attentive pool.
        pool_width: size of the pooled vector.
        qkv_bias: bias on queries, keys and values.
        qk_norm: RMS-normalise queries and keys over the width.
        layer_scale_init: starting value of LayerScale.
        drop_path_rate: DropPath probability of the last block, growing linearly from 0.
        separable_positions: spatial + temporal tables instead of one joint table.
        image_positions: how a clip of one frame is placed when `num_frames` is another: 'none'
            refuses it; 'shared' takes the mean of the joint table over time, or the spatial table
            alone; 'own' learns a table for images, `img_pos_embed` (spec stage2 2).
        pool: has the attentive pool; without it (the chat models) `pooled` is None.
        tanh_gelu: tanh form of GELU in the blocks; the released weights need it (spec 2.6).
        remat: what the backward pass recomputes: 'none', 'named', 'dots' or 'full' (see
            `scan_blocks`). 'named' keeps as much as 'dots', other tensors: LayerScale is multiplied
            into the weights, so that its input need not be kept.
        scan_unroll: blocks in one iteration of the scan over depth.
        precision: dtypes.

    Raises:
        ConfigError: a value is out of range or does not fit another; the message names both.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int = 14
    tubelet: int = 1
    image_size: int = 224
    num_frames: int = 8
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    pool_heads: int = 16
    pool_width: int = 768
    qkv_bias: bool = False
    qk_norm: bool = True
    layer_scale_init: float = 1e-5
    drop_path_rate: float = 0.0
    separable_positions: bool = False
    image_positions: str = "none"
    pool: bool = True
    tanh_gelu: bool = True
    remat: str = "none"
    scan_unroll: int = 1
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        require_sizes(self, _SIZES)
        for field, divisor in _MULTIPLES:
            if getattr(self, field) % getattr(self, divisor):
                raise ConfigError(
                    f"{field}={getattr(self, field)} is not a multiple of "
                    f"{divisor}={getattr(self, divisor)}"
                )
        step = 4 if self.separable_positions else 16
        if self.width % step:
            raise ConfigError(
                f"width={self.width}: sine-cosine positions need a multiple of {step} "
                f"with separable_positions={self.separable_positions}"
            )
        require_rates(self, ("drop_path_rate",))
        require_remat(self)
        if min(self.pixel_std) <= 0:
            raise ConfigError(f"pixel_std={self.pixel_std}: must be positive")
        self._check_images()

    def _check_images(self) -> None:
        """Refuses image positions that do not go with the other fields."""
        kind = self.image_positions
        if kind not in IMAGE_POSITIONS:
            raise ConfigError(
                f"image_positions={kind!r}: choose one of {', '.join(IMAGE_POSITIONS)}"
            )
        if kind != "none" and self.tubelet != 1:
            raise ConfigError(
                f"image_positions={kind!r}: an image is one frame, but tubelet={self.tubelet}"
            )
        if kind == "own" and self.separable_positions:
            raise ConfigError(
                "image_positions='own' needs separable_positions=False: with separable tables an "
                "image is placed by the spatial one (image_positions='shared')"
            )

    def normalize(self, video: jax.Array) -> jax.Array:
        """What the encoder takes, float32, of pixels (..., 3) in 0..255."""
        return normalize(video, self.pixel_mean, self.pixel_std)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches of a clip along time, height and width."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet, side, side

    @property
    def image_grid(self) -> tuple[int, int, int]:
        """Patches of a clip of one frame along time, height and width."""
        return 1, *self.grid[1:]

    def is_image(self, num_frames: int) -> bool:
        """Whether a clip of so many frames is placed as an image."""
        return num_frames == 1 and self.image_positions != "none"

    @property
    def num_patches(self) -> int:
        """Patches of a clip."""
        return math.prod(self.grid)

    @property
    def num_tokens(self) -> int:
        """Patches and the class token."""
        return 1 + self.num_patches


IMAGE_POSITIONS = ("none", "shared", "own")
_SIZES = (
    "width",
    "depth",
    "num_heads",
    "mlp_width",
    "patch_size",
    "tubelet",
    "image_size",
    "num_frames",
    "pool_heads",
    "pool_width",
    "scan_unroll",
)
_MULTIPLES = (
    ("width", "num_heads"),
    ("width", "pool_heads"),
    ("image_size", "patch_size"),
    ("num_frames", "tubelet"),
)


@flax.struct.dataclass
class EncoderOutput:
    """What the encoder gives; N tokens are the visible ones, class token first.

    Attributes:
        tokens: `(B, N, D)` residual stream after the last block (there is no final norm).
        pooled: `(B, pool_width)`, or None without a pool.
        pool_attention: `(B, N)` float32, the pool's attention averaged over heads, or None.
        features: `(K, B, N, D)` residual stream after each asked-for block, ascending, or None.
    """

    tokens: jax.Array
    pooled: jax.Array | None
    pool_attention: jax.Array | None
    features: jax.Array | None = None


class PositionTables(NamedTuple):
    """Positions by which tokens are placed.

    Attributes:
        clip: `(N, D)`, N = has_cls + T*H*W.
        image: `(M, D)`, M = has_cls + H*W, or None where images are refused.
    """

    clip: jax.Array
    image: jax.Array | None

    def rows(self, index: jax.Array | None, *, is_image: bool, dtype: str) -> jax.Array:
        """Positions of the tokens int `(B, M)`: `(B, M, D)`, or `(1, N, D)` of all for None."""
        table = (self.image if is_image else self.clip).astype(dtype)
        if index is None:
            return table[None]
        return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)


def position_params(
    module: nn.Module, name: str, config: EncoderConfig, *, has_cls: bool
) -> PositionTables:
    """Creates learnable positions, sine-cosine at the start, on `module` (spec stage1 2.2).

    Joint positions are one parameter `name` `(1, N, D)`; separable ones are `name_spatial`
    `(1, H*W, D)`, `name_temporal` `(1, T, D)` and, with a class token, `name_cls` `(1, 1, D)`.
    A table for images has `img_` before the last `pos_embed` of `name` (spec stage2 2).

    Args:
        module: owner of the parameters, within its `setup`.
        name: name of the parameter, or its prefix; ends with `pos_embed`.
        config: shape of the token grid.
        has_cls: puts a row for the class token in front.

    Returns:
        Positions of clips and of images.
    """
    frames, height, columns = config.grid
    dtype = jnp.dtype(config.precision.param_dtype)

    def table(name: str, value: np.ndarray) -> jax.Array:
        init = boxed(
            lambda _, shape, dtype: jnp.asarray(value[None], dtype), None, "tokens", "embed"
        )
        return module.param(name, init, (1, *value.shape), dtype)[0]

    def joint(name: str, grid: tuple[int, int, int]) -> jax.Array:
        return table(name, positions.sincos_3d(config.width, grid, has_cls=has_cls))

    shared = config.image_positions == "shared"
    if not config.separable_positions:
        clip = joint(name, config.grid)
        if config.image_positions == "own":
            image_name = name.removesuffix("pos_embed") + "img_pos_embed"
            return PositionTables(clip, joint(image_name, config.image_grid))
        return PositionTables(clip, _mean_over_time(clip, frames, has_cls) if shared else None)
    spatial = table(f"{name}_spatial", positions.sincos_2d(config.width, (height, columns)))
    temporal = table(f"{name}_temporal", positions.sincos_1d(config.width, frames))
    clip, image = (temporal[:, None] + spatial).reshape(-1, config.width), spatial
    if has_cls:
        cls = table(f"{name}_cls", np.zeros((1, config.width), np.float32))
        clip, image = jnp.concatenate([cls, clip]), jnp.concatenate([cls, image])
    return PositionTables(clip, image if shared else None)


def _mean_over_time(table: jax.Array, frames: int, has_cls: bool) -> jax.Array:
    """Positions `(has_cls + H*W, D)` of an image: the mean over frames, the class row kept."""
    cls, patches = table[: int(has_cls)], table[int(has_cls) :]
    mean = patches.reshape(frames, -1, table.shape[-1]).mean(axis=0)
    return jnp.concatenate([cls, mean])


class VideoEncoder(nn.Module):
    """Patch embedding, blocks and attentive pool over all or some tokens of a clip.

    Attributes:
        config: shape and options.
    """

    config: EncoderConfig

    def setup(self) -> None:
        """Makes the layers; `blocks` is one block whose parameters the scan stacks."""
        c = self.config
        self.patch_embed = PatchEmbed(c.width, c.patch_size, c.tubelet, c.precision)
        self.cls_token = self.param(
            "cls_token",
            boxed(kernel_init, None, None, "embed"),
            (1, 1, c.width),
            jnp.dtype(c.precision.param_dtype),
        )
        self.positions = position_params(self, "pos_embed", c, has_cls=True)
        self.blocks = Block(
            c.width,
            c.num_heads,
            c.mlp_width,
            qkv_bias=c.qkv_bias,
            qk_norm=c.qk_norm,
            layer_scale_init=c.layer_scale_init,
            tanh_gelu=c.tanh_gelu,
            precision=c.precision,
            fold_layer_scale=c.remat == "named",
        )
        if c.pool:
            self.pool = AttentionPool(c.width, c.pool_heads, c.pool_width, c.precision)

    def embed_patches(self, video: jax.Array) -> jax.Array:
        """Embeds every patch of a clip, without class token and positions.

        Args:
            video: `(B, T, H, W, 3)` normalised pixels.

        Returns:
            `(B, T' * H' * W', D)`.
        """
        return self.patch_embed(self._checked(video))

    def embed(self, video: jax.Array, visible: jax.Array | None = None) -> jax.Array:
        """Makes the tokens that enter the first block.

        Only the pixels of visible patches are embedded; the result equals embedding all patches
        and dropping the hidden ones.

        Args:
            video: `(B, T, H, W, 3)` normalised pixels.
            visible: int `(B, N)` token numbers, class token (0) first; None for all tokens.

        Returns:
            `(B, N, D)`.

        Raises:
            ConfigError: the video does not have the size the config says.
        """
        video, c = self._checked(video), self.config
        tokens = self.patch_embed(video, None if visible is None else visible[:, 1:] - 1)
        table = self.positions.rows(
            visible, is_image=c.is_image(video.shape[1]), dtype=c.precision.compute_dtype
        )
        cls = jnp.broadcast_to(
            self.cls_token.astype(tokens.dtype), (len(video), 1, tokens.shape[2])
        )
        return jnp.concatenate([cls, tokens], axis=1) + table

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None = None,
        *,
        return_layers: tuple[int, ...] = (),
        train: bool = False,
    ) -> EncoderOutput:
        """Encodes a clip, or an image: a clip of one frame (see `image_positions`).

        Args:
            video: `(B, T, H, W, 3)` normalised pixels.
            visible: int `(B, N)` sorted token numbers, the class token (0) always among them;
                None for all tokens.
            return_layers: blocks whose outputs are returned, ascending; negative numbers count
                from the end.
            train: turns DropPath on (rng stream `droppath`).

        Returns:
            `EncoderOutput`.

        Raises:
            ConfigError: the video does not have the size the config says, or a layer is unknown.
        """
        tokens, features = self.run_blocks(
            self.embed(video, visible), return_layers=return_layers, train=train
        )
        pooled, attention = self.pool(tokens) if self.config.pool else (None, None)
        return EncoderOutput(tokens, pooled, attention, features)

    def run_blocks(
        self, tokens: jax.Array, *, return_layers: tuple[int, ...] = (), train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs the blocks on `(B, N, D)`: tokens of the last, features `(K, B, N, D)` or None."""
        c = self.config
        return scan_blocks(
            self.blocks,
            tokens,
            depth=c.depth,
            return_layers=resolve_layers(return_layers, c.depth, "return_layers"),
            drop_path_rate=c.drop_path_rate,
            remat=c.remat,
            unroll=c.scan_unroll,
            train=train,
        )

    def _checked(self, video: jax.Array) -> jax.Array:
        """Refuses a video of another size than the config's."""
        c = self.config
        side = (c.image_size, c.image_size, 3)
        frames = video.shape[1] if video.ndim == 5 else None
        if video.ndim != 5 or video.shape[2:] != side or frames not in (c.num_frames, 1):
            raise ConfigError(self._misfit(video))
        if frames != c.num_frames and not c.is_image(frames):
            raise ConfigError(
                self._misfit(video) + "; set image_positions to 'shared' or 'own' to take images"
            )
        return video

    def _misfit(self, video: jax.Array) -> str:
        c = self.config
        expected = (c.num_frames, c.image_size, c.image_size, 3)
        return (
            f"video has shape {tuple(video.shape)}; num_frames={c.num_frames} and "
            f"image_size={c.image_size} need (B, {', '.join(map(str, expected))})"
        )
