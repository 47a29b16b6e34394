"""One table from logical parameter axes to mesh axes, and what happens when sizes do not divide.

Every parameter of `models/` carries logical axis names. A dimension takes the first mesh axis of
its row that divides it and that no earlier dimension of the same parameter has taken; otherwise
the dimension stays whole. Where that leaves a large parameter without an `fsdp` shard, the largest
dimension that divides takes it: 3200 / 256 does not divide, 12800 / 256 does. What was done is in
the report, and a large parameter that nothing splits is an error: none is replicated silently.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv2_jax.errors import ConfigError
from iv2_jax.parallel.mesh import MeshConfig

logger = logging.getLogger(__name__)

# logical axis -> mesh axes to try, in order.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "embed": ("fsdp",),
    "mlp": ("tensor", "fsdp"),
    "heads": ("tensor",),
    "head_dim": (),
    "pool": ("fsdp",),
    "target": ("tensor", "fsdp"),
    "classes": ("tensor",),
    "vocab": ("tensor", "fsdp"),
    "patch": (),
    "pixel": (),
    "tokens": (),
    "rank": (),
    "conv": (),
}
# Below this a parameter may stay whole on every device: gathering it costs more than it saves.
SMALL_PARAMETER = 2**16


@dataclass(frozen=True)
class ShardedParameter:
    """One row of the sharding report."""

    path: str
    shape: tuple[int, ...]
    logical: tuple[str | None, ...]
    spec: PartitionSpec
    note: str  # empty, or what fell back to what
    bytes_per_device: int


def partition_spec(
    shape: tuple[int, ...], logical: tuple[str | None, ...], mesh: Mesh
) -> tuple[PartitionSpec, str]:
    """Mesh axes of each dimension, and a note when a rule could not be followed.

    Args:
      shape: Sizes of the dimensions.
      logical: Logical axis name of each dimension (None = never split).
      mesh: The mesh with axes data, fsdp and tensor.

    Returns:
      The spec, and "" or a sentence about what does not divide.
    """
    axes: list[str | None] = [None] * len(shape)
    misses = []
    for i, (size, name) in enumerate(zip(shape, logical, strict=True)):
        for axis in RULES.get(name, ()) if name else ():
            if mesh.shape[axis] == 1 or axis in axes:
                continue
            if size % mesh.shape[axis] == 0:
                axes[i] = axis
                break
            misses.append(f"{name} {size} does not divide by {axis} {mesh.shape[axis]}")
    if "fsdp" not in axes and mesh.shape["fsdp"] > 1 and math.prod(shape) > SMALL_PARAMETER:
        # Never the layer axis: a scan over a split axis gathers the whole stack at every layer.
        candidates = [
            i
            for i, size in enumerate(shape)
            if axes[i] is None and logical[i] != "layers" and size % mesh.shape["fsdp"] == 0
        ]
        if candidates:
            i = max(candidates, key=lambda i: shape[i])
            axes[i] = "fsdp"
            if misses:
                misses[-1] += f"; fsdp taken by dimension {i} ({shape[i]})"
        else:
            misses.append("replicated over fsdp")
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes), "; ".join(misses)


def path_name(path: tuple[Any, ...]) -> str:
    """`encoder/blocks/attn/qkv/kernel` from a JAX key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def shardings(
    abstract_boxed: Any, mesh: Mesh, config: MeshConfig | None = None
) -> tuple[Any, list[ShardedParameter]]:
    """Shardings of a tree of boxed abstract parameters (as `jax.eval_shape(model.init)` gives).

    Unboxed leaves have no logical names; their largest dimension that divides is split.

    Args:
      abstract_boxed: Shapes with logical names.
      mesh: The mesh.
      config: What may stay replicated; None for the defaults.

    Returns:
      A tree of `NamedSharding` in the structure of the unboxed tree, and the report's rows.

    Raises:
      ConfigError: A large parameter is whole on every device of a mesh that splits parameters, and
        `allow_replicated` does not name it.
    """
    unboxed = meta.unbox(abstract_boxed)
    specs = nn.get_partition_spec(abstract_boxed)
    rows: list[ShardedParameter] = []

    def one(path: Any, leaf: Any, logical_spec: PartitionSpec | None) -> NamedSharding:
        logical = tuple(logical_spec or ())
        logical += (None,) * (len(leaf.shape) - len(logical))
        spec, note = partition_spec(leaf.shape, logical, mesh)
        sharding = NamedSharding(mesh, spec)
        local = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rows.append(ShardedParameter(path_name(path), leaf.shape, logical, spec, note, local))
        return sharding

    tree = jax.tree_util.tree_map_with_path(
        one, unboxed, specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    _check_replicated(rows, mesh, config or MeshConfig())
    return tree, rows


def _check_replicated(rows: list[ShardedParameter], mesh: Mesh, config: MeshConfig) -> None:
    """Refuses large parameters that are whole everywhere; a mesh of replicas asks for just that."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    limit = config.max_replicated_mib * 2**20
    whole = [
        row
        for row in rows
        if not any(row.spec)
        and row.bytes_per_device > limit
        and not any(re.fullmatch(pattern, row.path) for pattern in config.allow_replicated)
    ]
    if whole:
        listed = "; ".join(
            f"{row.path} {row.shape}, {row.bytes_per_device / 2**20:.1f} MiB ({row.note})"
            for row in whole[:5]
        )
        raise ConfigError(
            f"{len(whole)} parameters above mesh.max_replicated_mib={config.max_replicated_mib:g} "
            f"would be whole on every device: {listed}. Choose mesh.fsdp so that it divides one of "
            f"their sizes, or name them in mesh.allow_replicated"
        )


def spread_over_data(tree: Any, abstract: Any) -> Any:
    """Shardings of the optimizer's copies of parameters, split over `data` as well (ZeRO).

    The largest dimension that nothing splits takes `data`; where none divides, the dimension that
    is split already is split further; where that does not divide either, it stays as it is.

    Args:
      tree: Parameter shardings.
      abstract: Arrays or shapes of the same structure.
    """

    def one(sharding: NamedSharding, leaf: Any) -> NamedSharding:
        mesh, size = sharding.mesh, sharding.mesh.shape["data"]
        if size == 1 or math.prod(leaf.shape) <= SMALL_PARAMETER:
            return sharding
        local = sharding.shard_shape(leaf.shape)
        axes = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
        candidates = [i for i, n in enumerate(local) if n % size == 0]
        if not candidates:
            return sharding
        i = max(candidates, key=lambda i: (axes[i] is None, local[i]))
        axes[i] = "data" if axes[i] is None else (axes[i], "data")
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(one, tree, abstract)


def table(rows: list[ShardedParameter]) -> str:
    """The sharding report: each parameter's shape, axes, bytes of a device and fallback."""
    cells = [
        (
            row.path,
            "x".join(map(str, row.shape)),
            " ".join(name or "-" for name in row.logical),
            str(tuple(row.spec)) if any(row.spec) else "whole",
            f"{row.bytes_per_device / 2**20:.2f}",
            row.note,
        )
        for row in sorted(rows, key=lambda r: -r.bytes_per_device)
    ]
    head = ("parameter", "shape", "logical axes", "split as", "MiB a device", "fallback")
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (head, *cells))
    return "\n".join(line.rstrip() for line in lines)


def describe(rows: list[ShardedParameter]) -> str:
    """The fallbacks of a sharding, one line each, and the bytes a device holds."""
    lines = [f"  {r.path} {r.shape}: {r.note}; sharded as {r.spec}" for r in rows if r.note]
    total = sum(r.bytes_per_device for r in rows)
    head = f"parameters per device: {total / 2**20:.1f} MiB in {len(rows)} arrays"
    return "\n".join([head, *lines])
