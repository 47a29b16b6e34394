"""A trained InternVideo2 encoder as teacher of the small models (spec stage1 4.3)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import zoo
from iv2_jax.models.block_stack import resolve_layers
from iv2_jax.models.layers import Precision, unit_length
from iv2_jax.models.positions import resize_positions
from iv2_jax.models.teachers.base import Teacher, TeacherOutput, resize_frames, weights_path
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder

INTERNVIDEO2_1B = zoo.get("internvideo2_1b")


@dataclasses.dataclass(frozen=True)
class InternVideo2Teacher(Teacher):
    """The teacher of the distilled S, B and L: sees the student's whole clip.

    DropPath is off. The released scripts forgot `eval()` and so ran it at up to 0.25
    (spec stage1 trap 10.2); a stochastic teacher is not offered.

    Attributes:
        weights: a stage-1 or stage-2 checkpoint file of the original.
        encoder: shape of the encoder, `num_frames` as the student sees them.
        layers: matched blocks, ascending; negative numbers count from the end.
        stage: which kind of checkpoint `weights` is; of stage 2, the keys under `vision_encoder.`
            are taken.
        weights_frames: frames of the clips that `weights` was trained on, if they differ from
            `encoder.num_frames` (4 for the released stage-2 file): its positions are then
            interpolated over time.
        precision: dtypes instead of the encoder's.

    Raises:
        ConfigError: a layer does not exist, or `weights_frames` does not fit the tubelet.
    """

    weights: str | None = None
    encoder: EncoderConfig = INTERNVIDEO2_1B
    layers: tuple[int, ...] = (23, 26, 29, 33, 36, 39)
    stage: Literal["stage1", "stage2"] = "stage1"
    weights_frames: int | None = None
    precision: Precision | None = None

    def __post_init__(self) -> None:
        if self.precision is not None:
            encoder = dataclasses.replace(self.encoder, precision=self.precision)
            object.__setattr__(self, "encoder", encoder)
        resolve_layers(self.layers, self.encoder.depth, "layers")
        if self.weights_frames is not None and self.weights_frames % self.encoder.tubelet:
            raise ConfigError(
                f"weights_frames={self.weights_frames} is not a multiple of "
                f"encoder.tubelet={self.encoder.tubelet}"
            )

    has_cls = True

    @property
    def weights_id(self) -> str:
        """Names the weights."""
        return f"internvideo2:{self.weights}"

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
        """The encoder's grid.

        Raises:
            ConfigError: `num_frames` is not the encoder's.
        """
        if num_frames != self.encoder.num_frames:
            raise ConfigError(
                f"the teacher's encoder.num_frames={self.encoder.num_frames}, but it is shown "
                f"{num_frames} frames"
            )
        return self.encoder.grid

    def saliency_grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """The pool's attention is on the patches."""
        return self.grid(num_frames, image_size)

    def init(self, rng: jax.Array) -> Any:
        """Random parameters."""
        return meta.unbox(self.boxed_init(rng))

    def boxed_init(self, rng: jax.Array) -> Any:
        """Random parameters with logical axis names."""
        c = self.encoder
        video = jnp.zeros((1, c.num_frames, c.image_size, c.image_size, 3), jnp.float32)
        return VideoEncoder(c).init(rng, video)["params"]

    def load(self) -> Any:
        """Reads the checkpoint; alignment decoders in it are left out.

        Raises:
            UserError: no file given, or it does not fit.
        """
        from iv2_jax.interop import entries, load, torch_keys

        path = weights_path(self.weights, "internvideo2_1b")
        tensors = load.open_tensors(path)
        if self.stage == "stage2":
            tensors = tensors.select("vision_encoder.")
        tensors = dict(tensors)
        if self.weights_frames is not None:
            tensors = self._over_frames(tensors)
        return entries.from_torch(
            tensors,
            torch_keys.encoder_map(self.encoder),
            ignore=torch_keys.HEADS,
            dtype=jnp.dtype(self.encoder.precision.param_dtype),
            source=path,
        )

    def _over_frames(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Interpolates the positions of `weights_frames` frames to the encoder's."""
        slots = self.weights_frames // self.encoder.tubelet
        new_slots = self.encoder.grid[0]
        space = self.encoder.grid[1:]
        resized = dict(tensors)
        for name, cls, cells in (("pos_embed", True, space), ("pos_embed_temporal", False, (1, 1))):
            if name in tensors:
                table = np.asarray(tensors[name]).astype(np.float32)
                resized[name] = resize_positions(
                    table, (slots, *cells), (new_slots, *cells), has_cls=cls
                )
        return resized

    def __call__(self, params: Any, video: jax.Array) -> TeacherOutput:
        """Gives tokens (K, B, 1 + T*L, C), pooled (B, C') and saliency (B, T, L)."""
        video = resize_frames(self.encoder.normalize(video), self.encoder.image_size)
        out = VideoEncoder(self.encoder).apply({"params": params}, video, return_layers=self.layers)
        return TeacherOutput(
            tokens=unit_length(out.features),
            pooled=unit_length(out.pooled.astype(jnp.float32)),
            saliency=out.pool_attention[:, 1:].reshape(len(video), self.encoder.grid[0], -1),
        )
