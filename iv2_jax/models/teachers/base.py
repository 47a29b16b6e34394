"""What every frozen teacher gives and takes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.layers import Linear
from iv2_jax.models.positions import cubic_weights


@flax.struct.dataclass
class TeacherOutput:
    """Targets of a batch of clips.

    Attributes:
        tokens: (K, B, N, C) of unit length, layers ascending; N = has_cls + T'*H'*W', the class
            token first, patches time-major, then row, then column. Scaled in float32 and kept in
            the teacher's compute dtype: six layers of all tokens are the largest array of a step.
        pooled: (B, C') float32 of unit length, or None.
        saliency: (B, T', H'*W') float32, non-negative, on `saliency_grid`; which patches matter.
            Or None.
    """

    tokens: jax.Array
    pooled: jax.Array | None = None
    saliency: jax.Array | None = None


class Teacher(abc.ABC):
    """A frozen model that gives targets; subclasses are frozen dataclasses of their options.

    Attributes:
        weights_id: names the weights; teachers of the same id share one copy of the parameters.
        has_cls: whether the first token is a class token.
        width: size C of a token.
        num_layers: layers K that are matched.
        pooled_width: size C' of the pooled feature, 0 when there is none.
    """

    weights_id: str
    has_cls: bool
    width: int
    num_layers: int
    pooled_width: int

    @abc.abstractmethod
    def grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """Patches (T', H', W') that a clip of `num_frames` square frames becomes."""

    @abc.abstractmethod
    def saliency_grid(self, num_frames: int, image_size: int) -> tuple[int, int, int] | None:
        """Grid of `TeacherOutput.saliency`, or None when there is no saliency."""

    @abc.abstractmethod
    def init(self, rng: jax.Array) -> Any:
        """Random parameters (unboxed): for shapes, plans and tests."""

    def boxed_init(self, rng: jax.Array) -> Any:
        """`init` with logical axis names, which the sharding table goes by.

        A teacher without names is split by the sizes of its parameters alone.
        """
        return self.init(rng)

    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """Paths of the kernels that may be int8, with their numbers of input and output axes.

        Further axes in front are stacked layers. By default those of every `Linear` in the models
        that `boxed_init` makes; a model without such layers names its own, and reads them by
        `models.int8.contract`.
        """
        found: dict[str, tuple[int, int]] = {}

        def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            layer = context.module
            if isinstance(layer, Linear) and context.method_name == "__call__":
                axes = (len(layer.in_shape), len(layer.out_shape))
                found["/".join((*layer.path, "kernel"))] = axes
            return call(*args, **kwargs)

        with nn.intercept_methods(record):
            jax.eval_shape(self.boxed_init, jax.random.key(0))
        return found

    @abc.abstractmethod
    def load(self) -> Any:
        """The trained parameters as host arrays, of the structure of `init`.

        Raises:
            UserError: the weight file is not given, missing or does not fit.
        """

    @abc.abstractmethod
    def __call__(self, params: Any, video: jax.Array) -> TeacherOutput:
        """Runs the teacher; pure and jit-able.

        Args:
            params: from `load` or `init`.
            video: (B, T, H, W, 3) uint8, or float in 0..255; RGB, square frames.
        """


def weights_path(weights: str | None, teacher: str) -> str:
    """The weight file that a teacher was given.

    Raises:
        ConfigError: none was.
    """
    if not weights:
        raise ConfigError(
            f"teacher {teacher} needs its weights: set options.weights to the released file"
        )
    return weights


def resize_frames(video: jax.Array, size: int) -> jax.Array:
    """Resizes frames to a teacher's resolution as the original does (spec stage1 3.4).

    Bicubic with a = -0.75, half-pixel centres, no antialiasing, borders clamped.

    Args:
        video: (B, T, H, W, 3) float.
        size: height and width wanted.

    Returns:
        (B, T, size, size, 3), `video` itself when it has that size.
    """
    rows, columns = video.shape[2:4]
    if (rows, columns) == (size, size):
        return video
    by_row = jnp.asarray(cubic_weights(rows, size), video.dtype)
    by_column = jnp.asarray(cubic_weights(columns, size), video.dtype)
    return jnp.einsum("yh,xw,bthwc->btyxc", by_row, by_column, video)
