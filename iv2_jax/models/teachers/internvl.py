"""InternVL's CLIP vision tower as teacher: an image model, run on every frame (spec stage1 4.1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import zoo
from iv2_jax.models.block_stack import resolve_layers
from iv2_jax.models.layers import Precision, unit_length
from iv2_jax.models.teachers.base import Teacher, TeacherOutput, resize_frames, weights_path
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder
from iv2_jax.pixels import normalize

INTERNVL_6B = zoo.get("internvl_6b")


@dataclasses.dataclass(frozen=True)
class InternVLTeacher(Teacher):
    """The image teacher of stage 1.

    Each frame goes through the tower alone. The class tokens of a clip are averaged into one, the
    patches of all frames are put in a row; the pooled feature is the mean of the frames' pooled
    features. Averages come before the scaling to unit length.

    Attributes:
        weights: the released `internvl_c_13b_224px.pth` (its text side is left out).
        encoder: shape of the tower; one frame.
        layers: matched blocks, ascending; negative numbers count from the end.
        precision: dtypes instead of the encoder's; bfloat16 halves the 24 GB of parameters.

    Raises:
        ConfigError: `encoder` is not of one frame, or a layer does not exist.
    """

    weights: str | None = None
    encoder: EncoderConfig = INTERNVL_6B
    layers: tuple[int, ...] = (-6, -5, -4, -3, -2, -1)
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if (self.encoder.num_frames, self.encoder.tubelet) != (1, 1):
            raise ConfigError(
                f"encoder.num_frames={self.encoder.num_frames}, "
                f"encoder.tubelet={self.encoder.tubelet}: the image tower sees one frame at a time"
            )
        if self.precision is not None:
            encoder = dataclasses.replace(self.encoder, precision=self.precision)
            object.__setattr__(self, "encoder", encoder)
        resolve_layers(self.layers, self.encoder.depth, "layers")

    has_cls = True

    @property
    def weights_id(self) -> str:
        """Names the weights."""
        return f"internvl:{self.weights}"

    @property
    def width(self) -> int:
        """Size of a token."""
        return self.encoder.width

    @property
    def num_layers(self) -> int:
        """Matched layers."""
        return len(self.layers)

    @property
    def pooled_width(self) -> int:
        """Size of the pooled feature."""
        return self.encoder.pool_width

    def grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """One slot a frame; the tower has its own resolution, whatever `image_size` is."""
        return (num_frames, *self.encoder.grid[1:])

    def saliency_grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """The pool's attention is on the patches."""
        return self.grid(num_frames, image_size)

    def init(self, rng: jax.Array) -> Any:
        """Random parameters."""
        return meta.unbox(self.boxed_init(rng))

    def boxed_init(self, rng: jax.Array) -> Any:
        """Random parameters with logical axis names."""
        size = self.encoder.image_size
        video = jnp.zeros((1, 1, size, size, 3), jnp.float32)
        return VideoEncoder(self.encoder).init(rng, video)["params"]

    def load(self) -> Any:
        """Reads the released file: its 2-D patch kernel becomes one of one frame.

        Raises:
            UserError: no file given, or it does not fit.
        """
        from iv2_jax.interop import entries, load, torch_keys

        path = weights_path(self.weights, "internvl_6b")
        tensors = dict(load.open_tensors(path))
        kernel = tensors.get(_PATCH_KEY)
        if kernel is not None and len(kernel.shape) == 4:
            tensors[_PATCH_KEY] = np.asarray(kernel)[:, :, None]
        return entries.from_torch(
            tensors,
            torch_keys.encoder_map(self.encoder),
            ignore=_TEXT_SIDE,
            dtype=jnp.dtype(self.encoder.precision.param_dtype),
            source=path,
        )

    def __call__(self, params: Any, video: jax.Array) -> TeacherOutput:
        """Gives tokens (K, B, 1 + T*L, C), pooled (B, C') and saliency (B, T, L)."""
        batch, frames = video.shape[:2]
        video = resize_frames(normalize(video), self.encoder.image_size)
        images = video.reshape(batch * frames, 1, *video.shape[2:])
        out = VideoEncoder(self.encoder).apply(
            {"params": params}, images, return_layers=self.layers
        )
        features = out.features.reshape(len(self.layers), batch, frames, -1, self.width)
        patches = features[:, :, :, 1:].reshape(len(self.layers), batch, -1, self.width)
        cls = jnp.mean(features[:, :, :, 0].astype(jnp.float32), axis=2)[:, :, None]
        tokens = [unit_length(cls).astype(features.dtype), unit_length(patches)]
        pooled = jnp.mean(out.pooled.astype(jnp.float32).reshape(batch, frames, -1), axis=1)
        return TeacherOutput(
            tokens=jnp.concatenate(tokens, axis=2),
            pooled=unit_length(pooled),
            # Not renormalised: the class token's share stays missing, as in the original.
            saliency=out.pool_attention[:, 1:].reshape(batch, frames, -1),
        )


_PATCH_KEY = "patch_embed.proj.weight"
_TEXT_SIDE = {
    # Whatever is outside the tower's own modules; a misnamed key inside them is still an error.
    r"(?!(blocks|patch_embed|clip_projector)\.|cls_token|pos_embed).*": "InternVL's text side",
}
