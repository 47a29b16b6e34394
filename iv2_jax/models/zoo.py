"""Every named model in one table (spec stage1 section 1)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax.core import meta

from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models.student import AlignmentConfig, Student, StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder

_ENCODERS = {
    "internvideo2_small": EncoderConfig(width=384, depth=12, num_heads=6, mlp_width=1536),
    "internvideo2_base": EncoderConfig(width=768, depth=12, num_heads=12, mlp_width=3072),
    "internvideo2_large": EncoderConfig(width=1024, depth=24, num_heads=16, mlp_width=4096),
    "internvideo2_1b": EncoderConfig(width=1408, depth=40, num_heads=16, mlp_width=6144),
    "internvideo2_6b": EncoderConfig(width=3200, depth=48, num_heads=25, mlp_width=12800),
    # For tests: every part of the large ones, a second to compile.
    "test_tiny": EncoderConfig(
        width=32,
        depth=3,
        num_heads=2,
        mlp_width=64,
        image_size=56,
        num_frames=4,
        pool_heads=2,
        pool_width=24,
    ),
}


def _pretrain(name: str, drop_path_rate: float) -> StudentConfig:
    """Stage-1 student: InternVL's last six and VideoMAEv2-g's last four blocks (spec 3.1, 6.2)."""
    return StudentConfig(
        encoder=dataclasses.replace(_ENCODERS[name], drop_path_rate=drop_path_rate),
        clip=AlignmentConfig(3200, tuple(range(-6, 0)), "linear", has_cls=True),
        mae=AlignmentConfig(1408, tuple(range(-4, 0)), "mlp", has_cls=False),
        final_width=768,
        final_decoder="linear",
    )


def _distill(name: str) -> StudentConfig:
    """Student of the 1B model: six of its blocks, matched by the last six (spec 5, 6.2)."""
    return StudentConfig(
        encoder=dataclasses.replace(_ENCODERS[name], drop_path_rate=0.05),
        clip=AlignmentConfig(1408, tuple(range(-6, 0)), "mlp", has_cls=True),
        mae=None,
        final_width=768,
        final_decoder="mlp",
    )


_STUDENTS = {
    "internvideo2_1b_pretrain": _pretrain("internvideo2_1b", 0.25),
    "internvideo2_6b_pretrain": _pretrain("internvideo2_6b", 0.3),
    "internvideo2_small_distill": _distill("internvideo2_small"),
    "internvideo2_base_distill": _distill("internvideo2_base"),
    "internvideo2_large_distill": _distill("internvideo2_large"),
    "test_tiny_pretrain": StudentConfig(
        encoder=_ENCODERS["test_tiny"],
        clip=AlignmentConfig(40, (-2, -1), "linear", has_cls=True),
        mae=AlignmentConfig(36, (-1,), "mlp", has_cls=False),
        final_width=20,
        final_decoder="linear",
    ),
    "test_tiny_distill": StudentConfig(
        encoder=_ENCODERS["test_tiny"],
        clip=AlignmentConfig(40, (-2, -1), "mlp", has_cls=True),
        mae=None,
        final_width=20,
        final_decoder="mlp",
    ),
}

_MODELS: dict[str, EncoderConfig | StudentConfig] = {**_ENCODERS, **_STUDENTS}


def names() -> tuple[str, ...]:
    """Names that `get` knows, encoders first."""
    return tuple(_MODELS)


def get(name: str) -> EncoderConfig | StudentConfig:
    """Looks a model up by name.

    Names are `internvideo2_{small,base,large,1b,6b}` for encoders,
    `internvideo2_{1b,6b}_pretrain` and `internvideo2_{small,base,large}_distill` for students, and
    `test_tiny`, `test_tiny_pretrain`, `test_tiny_distill`. Use `dataclasses.replace` for another
    frame count, image size, precision or rematerialisation.

    Args:
        name: one of `names()`.

    Returns:
        The encoder's or the student's config.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest one.
    """
    if name not in _MODELS:
        raise ConfigError(f"no model is named {name!r}{nearest(name, _MODELS)}")
    return _MODELS[name]


def abstract_params(config: EncoderConfig | StudentConfig) -> dict:
    """Parameter tree of a model as `jax.ShapeDtypeStruct`s; nothing is allocated.

    Args:
        config: an encoder's or a student's config.

    Returns:
        Nested dict, logical axis names stripped.
    """
    is_student = isinstance(config, StudentConfig)
    encoder = config.encoder if is_student else config
    model = Student(config) if is_student else VideoEncoder(config)
    shape = (1, encoder.num_frames, encoder.image_size, encoder.image_size, 3)
    video = jax.ShapeDtypeStruct(shape, jnp.float32)
    visible = jax.ShapeDtypeStruct((1, encoder.num_tokens), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), video, visible)
    return meta.unbox(variables["params"])


def count_params(config: EncoderConfig | StudentConfig) -> int:
    """Number of parameters of a model, counted without allocating them."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
