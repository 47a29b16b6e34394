"""Fits the position tables of weight files to another clip, before anything is read.

The counterpart of `fitting.resize_positions` for tensors under the original's names: shapes are
known at once, a table is interpolated when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from iv2_jax.errors import CheckpointError
from iv2_jax.interop.fitting import TABLE
from iv2_jax.interop.tensor_file import TensorRef
from iv2_jax.models import positions
from iv2_jax.models.video_encoder import EncoderConfig

Grid = tuple[int, int, int]


def file_grid(
    tensors: Mapping[str, Any], target: EncoderConfig, *, frames: int = 0, prefix: str = ""
) -> Grid | None:
    """The token grid that a file's positions were made for, by their shapes.

    Args:
        tensors: `{torch key: anything with a shape}`.
        target: the encoder that the file is for. Unless `frames` is given, its pictures have as
            many patches as the target's.
        frames: frames of the file's clips; 0 finds them.
        prefix: of the encoder's keys.

    Returns:
        `(T', H', W')`, or None if the file has no positions.

    Raises:
        CheckpointError: the rows of the table do not make such a grid.
    """
    if f"{prefix}pos_embed_temporal" in tensors:
        slots = np.shape(tensors[f"{prefix}pos_embed_temporal"])[1]
        cells = np.shape(tensors[f"{prefix}pos_embed_spatial"])[1]
        side = math.isqrt(cells)
        if side * side != cells:
            raise CheckpointError(f"{prefix}pos_embed_spatial has {cells} rows, which is no square")
        return slots, side, side
    key = f"{prefix}pos_embed"
    if key not in tensors:
        return None
    rows = np.shape(tensors[key])[1] - 1
    if frames:
        slots = max(frames // target.tubelet, 1)
        side = math.isqrt(max(rows, 0) // slots)
        wanted = f"vision_frames={frames} square frames cannot have"
    else:
        side = target.grid[1]
        slots = rows // (side * side)
        wanted = f"pictures of {side}x{side} patches cannot have; say of how many frames it is"
    if slots < 1 or slots * side * side != rows:
        raise CheckpointError(
            f"the model's {key} has {rows} rows beside the class token's, which {wanted}"
        )
    return slots, side, side


def fit_positions(
    tensors: Mapping[str, Any],
    target: EncoderConfig,
    *,
    frames: int = 0,
    prefix: str = "",
) -> Mapping[str, Any]:
    """A video encoder's tensors with every position table fitted to the target's clip, unread.

    Positions are interpolated as PyTorch does, linearly over time, then bicubically over space, the
    class token's row kept (spec stage1 6.6); 8 to 4 frames averages pairs.

    Args:
        tensors: `{torch key: tensor}`, the tables of alignment heads among them.
        target: the encoder that they are for.
        frames: frames of the file's clips; 0 finds them (`file_grid`).
        prefix: of the encoder's keys.

    Returns:
        The tensors, `tensors` itself where nothing changes.

    Raises:
        CheckpointError: a table does not fit the file's own grid.
    """
    grid = file_grid(tensors, target, frames=frames, prefix=prefix)
    if grid is None or grid == target.grid:
        return tensors  # without a table the check of the whole says that it is missing
    out = dict(tensors)
    for key, table in tensors.items():
        match = TABLE.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match is None or match[2] == "_cls":
            continue
        old, new = (_part(g, *match.groups()) for g in (grid, target.grid))
        if old != new:
            out[key] = _resized(table, old, new, key)
    return out


def _part(grid: Grid, image: str | None, part: str | None) -> Grid:
    """Grid of a table, by the parts of its name."""
    if part == "_temporal":
        return grid[0], 1, 1
    return (1 if image or part == "_spatial" else grid[0]), grid[1], grid[2]


def _resized(table: Any, old: Grid, new: Grid, key: str) -> Any:
    """A table `(1, N, D)` of another grid, read and interpolated when asked for."""
    rows = table.shape[1]
    has_cls = rows == math.prod(old) + 1
    if not has_cls and rows != math.prod(old):
        raise CheckpointError(f"{key} has {rows} rows, but the other positions are of {old}")
    shape = (1, int(has_cls) + math.prod(new), table.shape[2])
    if isinstance(table, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, table.dtype)

    def read() -> np.ndarray:
        values = np.asarray(table)
        resized = positions.resize_positions(values.astype(np.float32), old, new, has_cls=has_cls)
        return np.asarray(resized).astype(values.dtype)

    return TensorRef(shape, np.dtype(table.dtype), read)
