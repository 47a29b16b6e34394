"""Frozen teachers: anything that gives token features on a patch grid.

A new teacher is one file with a `Teacher` subclass and one line in `TEACHERS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from iv2_jax.errors import ConfigError, nearest

if TYPE_CHECKING:
    from iv2_jax.models.int8 import Int8
    from iv2_jax.models.teachers.base import Teacher

# name -> module:class, or module:function that returns one
TEACHERS = {
    "internvl_6b": "iv2_jax.models.teachers.internvl:InternVLTeacher",
    "videomaev2_g": "iv2_jax.models.teachers.videomae:VideoMAETeacher",
    "internvideo2_1b": "iv2_jax.models.teachers.internvideo2:InternVideo2Teacher",
    "efficientnet_lite0": "iv2_jax.models.teachers.efficientnet:EfficientNetTeacher",
    "efficientnet_lite0_motion": "iv2_jax.models.teachers.efficientnet:EfficientNetMotionTeacher",
}


def get(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    int8: Int8 = "none",
    int8_keep: tuple[str, ...] = (),
) -> Teacher:
    """The teacher called `name`, built with the fields in `options`.

    Args:
      name: one of `TEACHERS`.
      options: fields of its class.
      int8: what of it is int8, see `models.int8.Int8`.
      int8_keep: patterns of paths of kernels that are not.

    Raises:
      ConfigError: Unknown teacher or option, with the nearest name; or see `int8.Int8Teacher`.
    """
    from iv2_jax import config as config_lib

    if name not in TEACHERS:
        raise ConfigError(f"unknown teacher {name!r}{nearest(name, TEACHERS)}")
    module, _, attribute = TEACHERS[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    teacher = config_lib.build(cls, dict(options or {}), path=f"teacher {name}")
    if int8 == "none":
        if int8_keep:
            raise ConfigError(f"teacher {name}: int8_keep is given, but int8='none'")
        return teacher
    from iv2_jax.models.teachers.int8 import Int8Teacher

    return Int8Teacher(teacher, products=int8 == "products", keep=tuple(int8_keep))
