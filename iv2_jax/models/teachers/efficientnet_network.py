"""The network EfficientNet-lite0: shapes, features, and its weights from PyTorch.

Inverted residual blocks without squeeze-and-excitation, ReLU6 everywhere, TensorFlow's SAME
padding. Frozen and in evaluation mode: batch norms are folded into the convolutions at load, so a
layer is a kernel and a bias.

Parameters: `{stem, head, blocks: {00 … 15: {[expand], depthwise, project}}}`, each with `kernel`
(H, W, in, out for the stem; H, W, C for depthwise; in, out for the 1x1 ones) and `bias` (out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.kernels.choice import target_platform
from iv2_jax.models.int8 import contract
from iv2_jax.pixels import normalize

FEATURE_WIDTH = 1280
EARLY_WIDTH = 40  # channels of the last block at an eighth of the resolution
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
_LAST_EARLY_BLOCK = 4  # block 5 halves the resolution to a 16th
_LAST_MIDDLE_BLOCK = 10  # block 11 halves the resolution to a 32nd


class Features(NamedTuple):
    """What a frame becomes.

    Attributes:
        early: (N, H/8, W/8, 40).
        middle: (N, H/16, W/16, 112).
        final: (N, H/32, W/32, 1280).
    """

    early: jax.Array
    middle: jax.Array
    final: jax.Array


Depthwise = Literal["auto", "shift", "conv"]


def extract_features(params: Params, frames: jax.Array, depthwise: Depthwise = "auto") -> Features:
    """Runs the network without its classifier.

    Args:
        params: folded parameters.
        frames: (N, H, W, 3) uint8, or float in 0..255; RGB, H and W multiples of 32.
        depthwise: how depthwise convolutions are computed: "conv" by XLA's convolution, "shift" as
            a sum of shifted products, "auto" takes what is faster on the platform.

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
    shift = depthwise == "shift" or (depthwise == "auto" and target_platform() == "cpu")
    apply_depthwise = _depthwise_shift if shift else _depthwise_conv
    x = normalize(frames, _PIXEL_MEAN, _PIXEL_STD)
    x = _relu6(_conv(x, params["stem"]["kernel"], stride=2) + params["stem"]["bias"])
    early = middle = x
    for i, block in enumerate(_BLOCKS):
        layers = params["blocks"][f"{i:02d}"]
        y = _relu6(_dense(x, layers["expand"])) if block.expansion > 1 else x
        y = apply_depthwise(y, layers["depthwise"]["kernel"], block.stride)
        y = _dense(_relu6(y + layers["depthwise"]["bias"]), layers["project"])
        x = x + y if block.residual else y
        if i == _LAST_EARLY_BLOCK:
            early = x
        if i == _LAST_MIDDLE_BLOCK:
            middle = x
    return Features(early, middle, _relu6(_dense(x, params["head"])))


def _relu6(x: jax.Array) -> jax.Array:
    """Clips to 0..6."""
    return jnp.clip(x, 0.0, 6.0)


def _dense(x: jax.Array, layer: Params) -> jax.Array:
    """A 1x1 convolution."""
    return contract(x, layer["kernel"], 1, "float32") + layer["bias"]


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


def _layers() -> dict[str, Any]:
    """Kernel shape and the PyTorch names of convolution and batch norm of every layer."""
    blocks = {}
    for i, block in enumerate(_BLOCKS):
        key, size = f"_blocks.{i}.", block.kernel
        layers = {
            "depthwise": _Layer((size, size, block.middle), f"{key}_depthwise_conv", f"{key}_bn1"),
            "project": _Layer((block.middle, block.outputs), f"{key}_project_conv", f"{key}_bn2"),
        }
        if block.expansion > 1:
            shape = (block.inputs, block.middle)
            layers["expand"] = _Layer(shape, f"{key}_expand_conv", f"{key}_bn0")
        blocks[f"{i:02d}"] = layers
    return {
        "stem": _Layer((3, 3, 3, _STEM_WIDTH), "_conv_stem", "_bn0"),
        "blocks": blocks,
        "head": _Layer((_BLOCKS[-1].outputs, FEATURE_WIDTH), "_conv_head", "_bn1"),
    }


def dense_kernels() -> list[str]:
    """Paths of the kernels of 1x1 convolutions, (in, out)."""
    paths = jax.tree_util.tree_leaves_with_path(_layers(), is_leaf=_is_layer)
    return [
        "/".join((*(key.key for key in path), "kernel"))
        for path, layer in paths
        if len(layer.shape) == 2
    ]


class _Layer(NamedTuple):
    """One convolution with its batch norm."""

    shape: tuple[int, ...]
    conv: str
    norm: str


def _is_layer(node: Any) -> bool:
    """Whether a node of `_layers()` is a layer."""
    return isinstance(node, _Layer)


def init_params(rng: jax.Array) -> dict[str, Any]:
    """Random parameters of the right shapes (He initialisation): for shapes and tests."""
    layers, structure = jax.tree.flatten(_layers(), is_leaf=_is_layer)
    sizes = [int(np.prod(layer.shape)) for layer in layers]
    # One draw for all: fifty of them take fifteen seconds to compile.
    noise = jnp.split(jax.random.normal(rng, (sum(sizes),)), np.cumsum(sizes)[:-1])
    params = [
        {
            "kernel": values.reshape(layer.shape) * np.sqrt(2 / np.prod(layer.shape[:-1])),
            "bias": jnp.zeros(layer.shape[-1:]),
        }
        for values, layer in zip(noise, layers, strict=True)
    ]
    return jax.tree.unflatten(structure, params)


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
    return jax.tree.map(lambda layer: fold(tensors, layer, source), _layers(), is_leaf=_is_layer)


def fold(tensors: Mapping[str, np.ndarray], layer: _Layer, source: str) -> dict[str, np.ndarray]:
    """Reads a convolution and the batch norm behind it as one kernel and bias."""

    def get(key: str, shape: tuple[int, ...]) -> np.ndarray:
        if key not in tensors:
            raise CheckpointError(f"{source} has no tensor {key}; is it EfficientNet-lite0?")
        if tensors[key].shape != shape:
            raise CheckpointError(
                f"{source}: {key} has shape {tensors[key].shape}, EfficientNet-lite0 needs {shape}"
            )
        return tensors[key]

    # As (H, W, in, out): a 1x1 kernel is stored without H and W, a depthwise one without `in`.
    shape = layer.shape
    full = (*shape[:2], 1, shape[2]) if len(shape) == 3 else (1, 1, *shape)[-4:]
    height, width, inputs, outputs = full
    kernel = get(f"{layer.conv}.weight", (outputs, inputs, height, width))
    scale, shift, mean, variance = (
        get(f"{layer.norm}.{name}", (outputs,)).astype(np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / np.sqrt(variance + _BATCH_NORM_EPS)
    return {
        "kernel": (kernel.transpose(2, 3, 1, 0) * scale).reshape(shape).astype(np.float32),
        "bias": (shift - mean * scale).astype(np.float32),
    }
