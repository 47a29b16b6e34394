"""Video classifiers: the encoder with the fine-tuning and probing heads (spec stage1 2.7-2.9)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from iv2_jax.errors import ConfigError
from iv2_jax.models import zoo
from iv2_jax.models.layers import LayerNorm, Linear, Mlp, Precision, boxed
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder

HEADS = ("plain", "ap", "cls_avg1", "cls_avgN", "cls_avg1_proj", "cls_avgN_proj")
MERGE_NORMS = ("LN", "BN", "kaiming_BN")

# Parameters that training follows but no gradient moves; for `OptimizerConfig.freeze`.
RUNNING_STATISTICS = r"(.*/)?down_norm/(mean|var|count)"


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """A video encoder with a classification head.

    Attributes:
        encoder: the video encoder, with its attentive pool.
        num_classes: classes.
        head: what the linear map to the classes reads: 'plain' the pooled vector; 'ap' the pooled
            vector after a residual MLP; 'cls_avg1' the class token and the mean patch token;
            'cls_avgN' the class token and the mean of each frame, each narrowed to the pooled size;
            '..._proj' the same with the pooled vector beside them.
        merge_norm: norm of the tokens of a `cls_` head: 'LN', 'BN' or 'kaiming_BN' (no affine
            parameters, epsilon 1e-6). The order of the head's columns depends on it (spec 2.9).
        dropout: probability of dropping a feature in front of the last map.
        head_init_scale: factor on the initial kernel of the last map.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    encoder: EncoderConfig
    num_classes: int
    head: str = "plain"
    merge_norm: str = "LN"
    dropout: float = 0.0
    head_init_scale: float = 0.001

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ConfigError(f"num_classes={self.num_classes}: at least 1 is needed")
        for field, choices in (("head", HEADS), ("merge_norm", MERGE_NORMS)):
            if getattr(self, field) not in choices:
                raise ConfigError(
                    f"{field}={getattr(self, field)!r}: choose one of {', '.join(choices)}"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout}: must be in [0, 1)")
        if not self.encoder.pool:
            raise ConfigError("encoder.pool=False: a classifier needs the pool")

    @property
    def merges_tokens(self) -> bool:
        """The head reads tokens (a `cls_` head)."""
        return self.head.startswith("cls_")

    @property
    def by_frame(self) -> bool:
        """The head reads a mean token of each frame, narrowed to the pooled size."""
        return self.head.startswith("cls_avgN")

    @property
    def merge_width(self) -> int:
        """Size of a token when it is normalised for a `cls_` head."""
        return self.encoder.pool_width if self.by_frame else self.encoder.width

    @property
    def head_width(self) -> int:
        """Features that the last map reads."""
        pooled = self.encoder.pool_width
        if not self.merges_tokens:
            return pooled
        tokens = 1 + (self.encoder.grid[0] if self.by_frame else 1)
        return tokens * self.merge_width + (pooled if self.head.endswith("_proj") else 0)


class RunningNorm(nn.Module):
    """Batch normalisation whose running statistics are parameters (PyTorch's BatchNorm1d).

    `mean`, `var` and `count` stand in the parameter tree, so that a checkpoint is one tree; they
    have no gradient. In training the batch's own statistics are used, and the moved running ones
    are left in the collection `batch_stats` if it is mutable; `with_running_statistics` puts them
    into the parameters. Statistics are those of the global batch, however it is sharded.

    Attributes:
        width: size of the last axis.
        epsilon: added to the variance.
        affine: has `scale` and `bias`.
        momentum: share of the batch in the moved statistics.
        precision: dtypes; statistics are kept and computed in float32.
    """

    width: int
    epsilon: float = 1e-5
    affine: bool = True
    momentum: float = 0.1
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Normalises `(B, N, width)` over all but the last axis; returns the compute dtype."""
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        shape = (self.width,)
        mean = self.param("mean", boxed(zeros, "pool"), shape, jnp.float32)
        var = self.param("var", boxed(ones, "pool"), shape, jnp.float32)
        count = self.param("count", boxed(zeros), (), jnp.float32)
        mean, var, count = jax.lax.stop_gradient((mean, var, count))
        x = x.astype(jnp.float32)
        if train:
            running = mean, var, count
            mean = jnp.mean(x, axis=(0, 1))
            var = jnp.mean(jnp.square(x - mean), axis=(0, 1))
            self._move(running, mean, var, x.shape[0] * x.shape[1])
        x = (x - mean) * jax.lax.rsqrt(var + self.epsilon)
        if self.affine:
            dtype = jnp.dtype(self.precision.param_dtype)
            scale = self.param("scale", boxed(ones, "pool"), shape, dtype)
            bias = self.param("bias", boxed(zeros, "pool"), shape, dtype)
            x = x * scale.astype(jnp.float32) + bias.astype(jnp.float32)
        return x.astype(self.precision.compute_dtype)

    def _move(self, running: tuple, mean: jax.Array, var: jax.Array, size: int) -> None:
        """Leaves the moved statistics in `batch_stats`; the variance there is the unbiased one."""
        if self.is_initializing() or not self.is_mutable_collection("batch_stats"):
            return
        unbiased = var * (size / max(size - 1, 1))
        old_mean, old_var, count = running
        moved = {
            "mean": old_mean + self.momentum * (mean - old_mean),
            "var": old_var + self.momentum * (unbiased - old_var),
            "count": count + 1,
        }
        for name, value in moved.items():
            self.put_variable("batch_stats", name, jax.lax.stop_gradient(value))


def with_running_statistics(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> Any:
    """Parameters with the running statistics that a training step moved.

    Args:
        params: the classifier's (unboxed) parameters.
        batch_stats: the collection `batch_stats` that `apply(..., mutable=["batch_stats"])` gave.

    Returns:
        The parameters, those of the collection replaced.

    Raises:
        ConfigError: the collection holds something that is no parameter.
    """
    flat = traverse_util.flatten_dict(dict(params))
    moved = traverse_util.flatten_dict(dict(batch_stats))
    unknown = ["/".join(path) for path in moved if path not in flat]
    if unknown:
        raise ConfigError(f"batch_stats holds {unknown}, which are no parameters")
    return traverse_util.unflatten_dict(flat | moved)


class Classifier(nn.Module):
    """Video encoder and classification head.

    Attributes:
        config: encoder and head.
    """

    config: ClassifierConfig

    def setup(self) -> None:
        """Makes the encoder and the parts of the head that the config names."""
        c, e = self.config, self.config.encoder
        common = {"precision": e.precision}
        self.encoder = VideoEncoder(e)
        self.fc_norm = LayerNorm(e.pool_width, axis_name="pool", **common)
        if c.head == "ap":
            self.extra_norm = LayerNorm(e.pool_width, axis_name="pool", **common)
            # The residual branch starts at zero, whatever its input.
            zero = nn.initializers.zeros_init()
            self.extra_mlp = Mlp(
                e.pool_width, 4 * e.pool_width, tanh_gelu=False, out_init=zero, **common
            )
        if c.by_frame:
            self.down = Linear((e.width,), (e.pool_width,), ("embed",), ("pool",), **common)
        if c.merges_tokens:
            self.down_norm = _merge_norm(c)
        self.dropout = nn.Dropout(c.dropout)
        self.head = Linear(
            (c.head_width,),
            (c.num_classes,),
            ("pool",),
            ("classes",),
            kernel_init=nn.initializers.normal(0.02 * c.head_init_scale),
            **common,
        )

    def __call__(self, video: jax.Array, *, train: bool = False) -> jax.Array:
        """Classifies clips.

        Args:
            video: `(B, T, H, W, 3)` normalised pixels.
            train: turns DropPath (rng stream `droppath`) and dropout (`dropout`) on, and lets
                batch norms use the batch (see `RunningNorm`).

        Returns:
            Logits `(B, num_classes)`, float32.
        """
        c = self.config
        encoded = self.encoder(video, train=train)
        pooled = encoded.pooled
        if c.head == "ap":
            pooled = pooled + self.extra_mlp(self.extra_norm(pooled))
        features = self.fc_norm(pooled)
        if c.merges_tokens:
            merged = self._merge(encoded.tokens, train)
            if c.head.endswith("_proj"):
                merged = jnp.concatenate([merged, features], axis=-1)
            features = merged
        features = self.dropout(features, deterministic=not train)
        return self.head(features).astype(jnp.float32)

    def _merge(self, tokens: jax.Array, train: bool) -> jax.Array:
        """Class token and mean patch tokens of `(B, N, D)`, normalised and flattened."""
        c, e = self.config, self.config.encoder
        batch, _, width = tokens.shape
        patches = tokens[:, 1:].astype(jnp.float32)
        cells = e.grid[1] * e.grid[2] if c.by_frame else patches.shape[1]
        means = patches.reshape(batch, -1, cells, width).mean(axis=2)
        x = jnp.concatenate([tokens[:, :1], means.astype(tokens.dtype)], axis=1)
        if c.by_frame:
            x = jax.nn.gelu(self.down(x), approximate=False)
        if c.merge_norm == "LN":
            return self.down_norm(x).reshape(batch, -1)
        # The original normalises (B, features, tokens) here, and flattens it so.
        return self.down_norm(x, train=train).swapaxes(1, 2).reshape(batch, -1)


def _merge_norm(config: ClassifierConfig) -> nn.Module:
    """The norm of a `cls_` head's tokens."""
    common = {"precision": config.encoder.precision}
    if config.merge_norm == "LN":
        return LayerNorm(config.merge_width, axis_name="pool", **common)
    if config.merge_norm == "BN":
        return RunningNorm(config.merge_width, **common)
    return RunningNorm(config.merge_width, epsilon=1e-6, affine=False, **common)


_CLASSES = {"k400": 400, "k600": 600, "k700": 700, "k710": 710, "ssv2": 174}
_DROP_PATH = {"small": 0.1, "base": 0.1, "large": 0.1, "1b": 0.3, "6b": 0.35}


def _finetuned(size: str, task: str, frames: int) -> ClassifierConfig:
    """A fully fine-tuned model of the recipes (spec stage1 6.3)."""
    rate = 0.4 if (size, task) == ("6b", "ssv2") else _DROP_PATH[size]
    return ClassifierConfig(_encoder(size, frames, rate), _CLASSES[task])


def _probe(size: str, head: str, merge_norm: str = "LN") -> ClassifierConfig:
    """A probe on a frozen backbone, Something-Something v2, 16 frames (spec stage1 6.4)."""
    return ClassifierConfig(_encoder(size, 16, 0.0), _CLASSES["ssv2"], head, merge_norm)


def _encoder(size: str, frames: int, drop_path_rate: float) -> EncoderConfig:
    return dataclasses.replace(
        zoo.get(f"internvideo2_{size}"), num_frames=frames, drop_path_rate=drop_path_rate
    )


_TINY = ClassifierConfig(zoo.get("test_tiny"), 11)

ZOO: dict[str, ClassifierConfig] = {
    **{
        f"internvideo2_{size}_{task}_f8": _finetuned(size, task, 8)
        for size in _DROP_PATH
        for task in _CLASSES
    },
    **{
        f"internvideo2_{size}_{task}_f16": _finetuned(size, task, 16)
        for size in ("1b", "6b")
        for task in ("k400", "k600", "k700")
    },
    **{f"internvideo2_{size}_ap_ssv2_f16": _probe(size, "ap") for size in ("1b", "6b")},
    **{f"internvideo2_{size}_cat_ssv2_f16": _probe(size, "cls_avgN_proj") for size in ("1b", "6b")},
    "test_tiny_classifier": _TINY,
    "test_tiny_classifier_ap": dataclasses.replace(_TINY, head="ap"),
    "test_tiny_classifier_cat": dataclasses.replace(_TINY, head="cls_avgN_proj", merge_norm="BN"),
}
