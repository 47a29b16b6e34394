"""Kernels on several devices: the partitioner cannot split them, so each device runs its own."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from iv2_jax.parallel.mesh import BATCH_AXES

Arrays = tuple[jax.Array, ...]


def on_each_device(
    local: Callable[..., jax.Array], batch: int, groups: int
) -> Callable[[Arrays, Arrays], jax.Array]:
    """Has an attention run on each device's samples and heads.

    Under a mesh set with `jax.set_mesh` it runs in a `shard_map`: samples over the batch axes,
    heads over `tensor`, where they divide. Without one it runs as it is.

    Args:
        local: takes arrays `(B, N, h, d)` and then arrays `(B, N)`, of one device, and returns
            `(B, N, h, d)`.
        batch: samples of all devices.
        groups: key heads of all devices.

    Returns:
        A function of the arrays of the first kind and those of the second.
    """

    def run(by_head: Arrays, by_token: Arrays) -> jax.Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or all(t == AxisType.Manual for t in mesh.axis_types):
            return local(*by_head, *by_token)
        rows, heads = shard_axes(mesh, batch, groups)
        spec, row_spec = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
        return jax.shard_map(
            local,
            in_specs=(*(spec for _ in by_head), *(row_spec for _ in by_token)),
            out_specs=spec,
            check_vma=False,  # the kernel does not say what its outputs vary over
        )(*by_head, *by_token)

    return run


def shard_axes(
    mesh: jax.sharding.AbstractMesh, batch: int, groups: int
) -> tuple[tuple[str, ...] | None, str | None]:
    """Mesh axes of samples and of heads; an axis that does not divide is left whole."""
    rows: tuple[str, ...] = ()
    shards = 1
    for axis in BATCH_AXES:
        if axis in mesh.axis_names and batch % (shards * mesh.shape[axis]) == 0:
            rows, shards = (*rows, axis), shards * mesh.shape[axis]
    tensor = mesh.shape.get("tensor", 1)
    return rows or None, "tensor" if tensor > 1 and groups % tensor == 0 else None
