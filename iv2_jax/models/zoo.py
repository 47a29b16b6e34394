"""Every named model in one table.

The video models stand here (spec stage1 section 1). Other families keep a dict `ZOO` of their own
beside their config; their modules are imported when a name is not found before them.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models import kinds
from iv2_jax.models.student import AlignmentConfig, StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig

_ENCODERS = {
    "internvideo2_small": EncoderConfig(width=384, depth=12, num_heads=6, mlp_width=1536),
    "internvideo2_base": EncoderConfig(width=768, depth=12, num_heads=12, mlp_width=3072),
    "internvideo2_large": EncoderConfig(width=1024, depth=24, num_heads=16, mlp_width=4096),
    "internvideo2_1b": EncoderConfig(width=1408, depth=40, num_heads=16, mlp_width=6144),
    "internvideo2_6b": EncoderConfig(width=3200, depth=48, num_heads=25, mlp_width=12800),
    # The image teacher has the shape of the 6B, over one frame (spec stage1 4.1).
    "internvl_6b": EncoderConfig(width=3200, depth=48, num_heads=25, mlp_width=12800, num_frames=1),
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

_VIDEO: dict[str, Any] = {**_ENCODERS, **_STUDENTS}

# Modules with a dict `ZOO`, in the order they are asked and listed.
_MODULES = (
    "iv2_jax.models.teachers.videomae",
    "iv2_jax.models.classifier",
    "iv2_jax.models.text.bert",
    "iv2_jax.models.audio.beats",
    "iv2_jax.models.stage2",
    "iv2_jax.models.text.mobileclip",
    "iv2_jax.models.text.llama_clip",
    "iv2_jax.models.clip",
    "iv2_jax.models.llm",
    "iv2_jax.models.bridge",
    "iv2_jax.models.chat",
    "iv2_jax.models.shots.network",
)


def names() -> tuple[str, ...]:
    """Names that `get` knows: encoders, students, then the other families."""
    return tuple(name for table in _tables() for name in table)


def get(name: str) -> Any:
    """Looks a model up by name.

    Use `dataclasses.replace` on the result for another frame count, image size, precision or
    rematerialisation. Names that start with `test_` are tiny models for tests.

    Args:
        name: one of `names()`, such as `internvideo2_1b` or `internvideo2_large_distill`.

    Returns:
        The model's config; its class says which kind of model it is.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest one.
    """
    for table in _tables():
        if name in table:
            return table[name]
    raise ConfigError(f"no model is named {name!r}{nearest(name, names())}")


def family(name: str) -> str:
    """Name of the kind of a named model, such as `student` (see `models.kinds`).

    Raises:
        ConfigError: the name is unknown.
    """
    return kinds.of(get(name)).name


def abstract_params(config: Any) -> dict[str, Any]:
    """Parameter tree of a model as `jax.ShapeDtypeStruct`s; nothing is allocated.

    Args:
        config: a config of any kind of model.

    Returns:
        Nested dict, logical axis names stripped.

    Raises:
        ConfigError: `config` is no config of a model.
    """
    return kinds.of(config).abstract_params(config)


def count_params(config: Any) -> int:
    """Number of parameters of a model of any kind, counted without allocating them."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def _tables() -> Iterator[Mapping[str, Any]]:
    """The tables of all families, each module imported when its turn comes."""
    yield _VIDEO
    for module in _MODULES:
        yield importlib.import_module(module).ZOO
