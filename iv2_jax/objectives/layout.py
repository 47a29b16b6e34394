"""How the rows of a batch lie on the devices, for losses that compute by hand where they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, PartitionSpec

from iv2_jax.errors import ConfigError
from iv2_jax.parallel.mesh import BATCH_AXES


@dataclass(frozen=True)
class RowLayout:
    """The mesh that a loss is traced under, and how it splits a batch.

    Attributes:
        mesh: the mesh; None without one, or where nothing splits the rows.
        axes: its axes that split the rows, outermost first.
    """

    mesh: jax.sharding.AbstractMesh | None = None
    axes: tuple[str, ...] = ()

    @property
    def shards(self) -> int:
        """Number of parts that the rows are split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes) if self.mesh else 1

    @property
    def rows(self) -> PartitionSpec:
        """Of an array whose first dimension is the batch."""
        return PartitionSpec(self.axes)


def row_layout(rows: int, needed_by: str = "") -> RowLayout:
    """The layout of a batch under the mesh of `jax.set_mesh` or `use_abstract_mesh`.

    Args:
        rows: of the global batch.
        needed_by: who cannot do without, for the error; empty for one that can.

    Returns:
        The layout; one without a mesh where there is none, and where the rows do not divide or
        are a device's own already (inside a `shard_map`) if nobody needs it.

    Raises:
        ConfigError: the latter two, if somebody does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return RowLayout()
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)
    if not axes:
        return RowLayout()
    layout = RowLayout(mesh, axes)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    inside = any(types[axis] == AxisType.Manual for axis in axes)
    if not needed_by:
        return RowLayout() if inside or rows % layout.shards else layout
    if inside:
        raise ConfigError(
            f"{needed_by} splits the batch itself: call it with global arrays, outside of a "
            f"shard_map over {axes}"
        )
    if rows % layout.shards:
        raise ConfigError(
            f"{needed_by}: a batch of {rows} rows does not divide over {layout.shards} devices "
            f"(mesh axes {axes})"
        )
    return layout
