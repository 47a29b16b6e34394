"""VideoMAEv2 as teacher: a video model without class token (spec stage1 4.2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models.attention import dot_product_attention
from iv2_jax.models.block_stack import resolve_layers, scan_blocks
from iv2_jax.models.layers import (
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbed,
    Precision,
    boxed,
    unit_length,
)
from iv2_jax.models.positions import videomae_sinusoid
from iv2_jax.models.teachers.base import Teacher, TeacherOutput, resize_frames, weights_path
from iv2_jax.parallel.mesh import splits_heads
from iv2_jax.pixels import normalize

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class VideoMAEConfig:
    """Shape of the model; the defaults are VideoMAEv2-g.

    Attributes:
        width: features of a token.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_width: hidden size of a block's MLP.
        patch_size: height and width of a patch in pixels.
        tubelet: frames of a patch.
        image_size: height and width of a frame in pixels.
        num_frames: frames of a clip.
        table_grid: grid that the fixed position table is written for; it is resized to others.
        released_attention: attend among the heads of a token instead of among tokens, as the
            released code did by a transposed argument (spec stage1 trap 10.1).
        precision: dtypes.

    Raises:
        ConfigError: a size does not divide another.
    """

    width: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_width: int = 6144
    patch_size: int = 14
    tubelet: int = 2
    image_size: int = 224
    num_frames: int = 16
    table_grid: tuple[int, int, int] = (8, 16, 16)
    released_attention: bool = False
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        for field, divisor in (
            ("width", "num_heads"),
            ("image_size", "patch_size"),
            ("num_frames", "tubelet"),
        ):
            if getattr(self, divisor) < 1 or getattr(self, field) % getattr(self, divisor):
                raise ConfigError(
                    f"{field}={getattr(self, field)} is not a multiple of "
                    f"{divisor}={getattr(self, divisor)}"
                )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches of a clip along time, height and width."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet, side, side


ZOO = {
    "videomaev2_g": VideoMAEConfig(),
    "test_tiny_videomae": VideoMAEConfig(
        width=32, depth=2, num_heads=2, mlp_width=64, image_size=56, num_frames=4
    ),
}


class VideoMAEAttention(nn.Module):
    """Self-attention with biases on queries and values only.

    Attributes:
        width: size of a token.
        num_heads: number of heads.
        released: attend among heads, see `VideoMAEConfig.released_attention`.
        precision: dtypes.
    """

    width: int
    num_heads: int
    released: bool
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, N, width)` to `(B, N, width)`."""
        heads = (self.num_heads, self.width // self.num_heads)
        # As in `Attention`: heads side by side unless the mesh splits them.
        flat = not splits_heads()
        qkv = Linear(
            (self.width,),
            (3, *heads),
            ("embed",),
            (None, "heads", "head_dim"),
            use_bias=False,
            precision=self.precision,
            flat=flat,
            name="qkv",
        )(x)
        q, k, v = jnp.split(qkv, 3, axis=-1) if flat else (qkv[:, :, i] for i in range(3))
        zeros = boxed(nn.initializers.zeros_init(), "heads", "head_dim")
        dtype = jnp.dtype(self.precision.param_dtype)
        q = q + self.param("q_bias", zeros, heads, dtype).astype(q.dtype).reshape(q.shape[2:])
        v = v + self.param("v_bias", zeros, heads, dtype).astype(v.dtype).reshape(v.shape[2:])
        q, k, v = (part.reshape(*x.shape[:2], *heads) for part in (q, k, v))
        if self.released:
            # Heads stood where tokens should, and the result was never turned back.
            q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
        mixed = dot_product_attention(q, k, v).reshape(x.shape if flat else (*x.shape[:2], *heads))
        return Linear(
            heads,
            (self.width,),
            ("heads", "head_dim"),
            ("embed",),
            precision=self.precision,
            flat=flat,
            name="proj",
        )(mixed)


class VideoMAEBlock(nn.Module):
    """Pre-norm block: LayerNorm eps 1e-6, exact GELU, no LayerScale.

    Attributes:
        config: shape and options.
    """

    config: VideoMAEConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: jax.Array | int = 0, drop_rate: jax.Array | float | None = None
    ) -> jax.Array:
        """Maps `(B, N, width)` to `(B, N, width)`; `layer` and `drop_rate` are not used."""
        c = self.config
        norm = {"epsilon": _EPSILON, "precision": c.precision}
        attention = VideoMAEAttention(
            c.width, c.num_heads, c.released_attention, c.precision, name="attn"
        )
        x = x + attention(LayerNorm(c.width, name="norm1", **norm)(x))
        mlp = Mlp(c.width, c.mlp_width, tanh_gelu=False, precision=c.precision, name="mlp")
        return x + mlp(LayerNorm(c.width, name="norm2", **norm)(x))


class VideoMAE(nn.Module):
    """The encoder of VideoMAEv2.

    Attributes:
        config: shape and options.
    """

    config: VideoMAEConfig

    def setup(self) -> None:
        """Makes the layers; `blocks` is one block whose parameters the scan stacks."""
        c = self.config
        self.patch_embed = PatchEmbed(c.width, c.patch_size, c.tubelet, c.precision)
        self.blocks = VideoMAEBlock(c)
        self.norm = LayerNorm(c.width, epsilon=_EPSILON, precision=c.precision)

    def __call__(self, video: jax.Array, return_layers: tuple[int, ...]) -> jax.Array:
        """Gives the features of some blocks; the last block's are normalised.

        Args:
            video: `(B, T, H, W, 3)` normalised pixels.
            return_layers: blocks, ascending; negative numbers count from the end.

        Returns:
            `(K, B, N, width)`.
        """
        c = self.config
        table = jnp.asarray(videomae_sinusoid(c.width, c.grid, c.table_grid))
        x = self.patch_embed(video)
        layers = resolve_layers(return_layers, c.depth, "return_layers")
        tokens, features = self.run_blocks(x + table.astype(x.dtype), return_layers=layers)
        normed = self.norm(tokens)
        if layers[-1] == c.depth - 1:
            features = features.at[-1].set(normed)
        return features

    def run_blocks(
        self, tokens: jax.Array, *, return_layers: tuple[int, ...] = ()
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs the blocks on `(B, N, D)`: tokens of the last, features `(K, B, N, D)` or None."""
        c = self.config
        layers = resolve_layers(return_layers, c.depth, "return_layers")
        return scan_blocks(self.blocks, tokens, depth=c.depth, return_layers=layers)


@dataclasses.dataclass(frozen=True)
class VideoMAETeacher(Teacher):
    """The video teacher of stage 1.

    Attributes:
        weights: the released `vit_g_hybrid_1200e_pre.pth`.
        model: shape and options.
        layers: matched blocks, ascending; negative numbers count from the end.
        precision: dtypes instead of the model's.

    Raises:
        ConfigError: no layer, or one that does not exist.
    """

    weights: str | None = None
    model: VideoMAEConfig = dataclasses.field(default_factory=VideoMAEConfig)
    layers: tuple[int, ...] = (-4, -3, -2, -1)
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if self.precision is not None:
            model = dataclasses.replace(self.model, precision=self.precision)
            object.__setattr__(self, "model", model)
        if not resolve_layers(self.layers, self.model.depth, "layers"):
            raise ConfigError("layers=(): name at least one block")

    has_cls = False
    pooled_width = 0

    @property
    def weights_id(self) -> str:
        """Names the weights."""
        return f"videomae:{self.weights}"

    @property
    def width(self) -> int:
        """Size of a token."""
        return self.model.width

    @property
    def num_layers(self) -> int:
        """Matched layers."""
        return len(self.layers)

    def grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """The model's grid.

        Raises:
            ConfigError: `num_frames` is not the model's.
        """
        if num_frames != self.model.num_frames:
            raise ConfigError(
                f"the teacher's model.num_frames={self.model.num_frames}, but it is shown "
                f"{num_frames} frames"
            )
        return self.model.grid

    def saliency_grid(self, num_frames: int, image_size: int) -> None:
        """There is no pool, hence no saliency."""
        return

    def init(self, rng: jax.Array) -> Any:
        """Random parameters."""
        return meta.unbox(self.boxed_init(rng))

    def boxed_init(self, rng: jax.Array) -> Any:
        """Random parameters with logical axis names."""
        c = self.model
        video = jnp.zeros((1, c.num_frames, c.image_size, c.image_size, 3), jnp.float32)
        return VideoMAE(c).init(rng, video, self.layers)["params"]

    def load(self) -> Any:
        """Reads the released file: the keys under `encoder.`.

        Raises:
            UserError: no file given, or it does not fit.
        """
        from iv2_jax.interop import load, torch_keys

        return load.load_params(
            weights_path(self.weights, "videomaev2_g"),
            torch_keys.videomae_map(self.model),
            prefix="encoder.",
            dtype=jnp.dtype(self.model.precision.param_dtype),
        )

    def __call__(self, params: Any, video: jax.Array) -> TeacherOutput:
        """Gives tokens (K, B, T'*L, C)."""
        video = resize_frames(normalize(video), self.model.image_size)
        features = VideoMAE(self.model).apply({"params": params}, video, self.layers)
        return TeacherOutput(tokens=unit_length(features))
