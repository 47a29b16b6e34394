"""Frozen teachers: anything that gives token features on a patch grid.

A new teacher is one file with a `Teacher` subclass and one line in `TEACHERS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from iv2_jax.errors import ConfigError, nearest

if TYPE_CHECKING:
    from iv2_jax.models.teachers.base import Teacher

# name -> module:class, or module:function that returns one
TEACHERS = {
    "internvl_6b": "iv2_jax.models.teachers.internvl:InternVLTeacher",
    "videomaev2_g": "iv2_jax.models.teachers.videomae:VideoMAETeacher",
    "internvideo2_1b": "iv2_jax.models.teachers.internvideo2:InternVideo2Teacher",
    "efficientnet_lite0": "iv2_jax.models.teachers.efficientnet:EfficientNetTeacher",
    "efficientnet_lite0_motion": "iv2_jax.models.teachers.efficientnet:EfficientNetMotionTeacher",
}


def get(name: str, options: Mapping[str, Any] | None = None) -> Teacher:
    """The teacher called `name`, built with the fields in `options`.

    Raises:
      ConfigError: Unknown teacher or option, with the nearest name.
    """
    from iv2_jax import config as config_lib

    if name not in TEACHERS:
        raise ConfigError(f"unknown teacher {name!r}{nearest(name, TEACHERS)}")
    module, _, attribute = TEACHERS[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    return config_lib.build(cls, dict(options or {}), path=f"teacher {name}")
