"""What recipes of towers share: what they give back, comparing configs, reading by a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from iv2_jax.errors import ConfigError
from iv2_jax.interop import entries
from iv2_jax.interop.entries import Entry
from iv2_jax.interop.sources import WeightSource
from iv2_jax.models.video_encoder import EncoderConfig

ENCODER_FIELDS = (
    "width",
    "depth",
    "num_heads",
    "mlp_width",
    "patch_size",
    "tubelet",
    "pool_heads",
    "pool_width",
    "qkv_bias",
    "qk_norm",
    "separable_positions",
    "tanh_gelu",
    "pixel_mean",
    "pixel_std",
)


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a model takes from a source.

    Attributes:
        params: `{path in the model: array}`.
        fresh: `{path: why it stays fresh}` of the tower's other parameters.
        notes: what was fitted or left out, for people.
    """

    params: dict[str, np.ndarray]
    fresh: dict[str, str]
    notes: tuple[str, ...] = ()


def encoder_of(config: Any) -> EncoderConfig | None:
    """The video encoder's config within a config of any kind."""
    for name in ("vision", "encoder"):
        config = getattr(config, name, config)
    return config if isinstance(config, EncoderConfig) else None


def check_same(
    theirs: Any, ours: Any, fields: Iterable[str], name: str, source: WeightSource
) -> None:
    """Refuses a tower that is built otherwise, naming the fields."""
    differ = [f for f in fields if getattr(theirs, f) != getattr(ours, f)]
    if differ:
        text = ", ".join(f"{f} {getattr(theirs, f)} and {getattr(ours, f)}" for f in differ)
        raise ConfigError(
            f"the {name} towers of {source.path} and of this model differ in what cannot be "
            f"fitted: {text}"
        )


def tower_of(source: WeightSource, name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A tower's tensors, and a note on what stands beside them."""
    tensors, others = source.under(f"{name}.")
    return tensors, (f"{others} keys outside of {name}. left out",) if others else ()


def read_table(
    tensors: Mapping[str, Any],
    table: list[Entry],
    ignore: Mapping[str, str],
    source: WeightSource,
) -> dict[str, np.ndarray]:
    """`{path: array}` of the entries, in the file's dtypes."""
    params = entries.from_torch(tensors, table, ignore=ignore, source=str(source.path))
    return traverse_util.flatten_dict(params, sep="/")


def under(tower: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Paths of a tower as paths of the model."""
    return {f"{tower}/{path}": value for path, value in flat.items()}


def by(grid: tuple[int, int, int]) -> str:
    """A grid as people write it."""
    return "x".join(map(str, grid))
