"""The device mesh: axes `data` (outermost, across slices), `fsdp` and `tensor`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from iv2_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
# A batch is split over both axes: fsdp shards parameters *and* data (ZeRO-3 style).
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class MeshConfig:
    """Axis sizes; one of them may be -1, which takes the devices that are left.

    Attributes:
      data: Replicas of the parameters, each with its part of the batch.
      fsdp: Devices that share one copy of the parameters and optimizer state.
      tensor: Devices that share the heads and the MLP width of each layer.
      max_devices: Use only the first so many devices (0 = all); for tests and ablations.
      shard_optimizer: Split moments and moving average over `data` too (ZeRO): each replica updates
        its part of the parameters, and the all-reduce of gradients over `data` becomes a
        reduce-scatter and a gather of what was updated.
      allow_replicated: Patterns of parameter paths that may be whole on every device although the
        mesh would split parameters and they are large.
      max_replicated_mib: What is large.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    max_devices: int = 0
    shard_optimizer: bool = False
    allow_replicated: tuple[str, ...] = ()
    max_replicated_mib: float = 4.0

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if sum(s == -1 for s in sizes) > 1:
            raise ConfigError(f"only one mesh axis may be -1, got data, fsdp, tensor = {sizes}")
        for name, size in zip(AXES, sizes, strict=True):
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{name} must be positive or -1, not {size}")
        for name in ("max_devices", "max_replicated_mib"):
            if getattr(self, name) < 0:
                raise ConfigError(f"mesh.{name} must be >= 0, not {getattr(self, name)}")
        for pattern in self.allow_replicated:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"mesh.allow_replicated: {pattern!r}: {error}") from None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh `(data, fsdp, tensor)` over `devices` (default: all of the run's devices).

    Over several slices `data` is outermost: only gradients of replicas cross between slices.

    Raises:
      ConfigError: The axis sizes do not multiply to the number of devices, or `data` does not
        divide over the slices.
    """
    devices = list(devices if devices is not None else jax.devices())
    if config.max_devices:
        devices = devices[: config.max_devices]
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh data x fsdp x tensor = {config.data} x {config.fsdp} x {config.tensor} does "
            f"not fit {len(devices)} devices; set one axis to -1 or make the product equal"
        )
    if devices[0].platform == "tpu":
        grid = _tpu_grid(sizes, devices)
    else:
        grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES)


def _tpu_grid(sizes: list[int], devices: list[jax.Device]) -> np.ndarray:
    """Devices in an order in which the mesh's axes follow the links between chips."""
    from jax.experimental import mesh_utils

    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if sizes[0] % slices:
        raise ConfigError(
            f"mesh.data {sizes[0]} does not divide over {slices} slices; only whole replicas may "
            "lie in different slices, so data must be a multiple of their number"
        )
    # An axis need not be an edge of the slice: 8 x 8 x 8 chips have no edge of 16.
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        [sizes[0] // slices, *sizes[1:]],
        [slices] + [1] * (len(sizes) - 1),
        devices=devices,
        allow_split_physical_axes=True,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over the data and fsdp axes; other dimensions whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def keep_rows_split(x: jax.Array) -> jax.Array:
    """Has the partitioner split the first axis of an activation as the batch is split.

    Left to itself it may split activations along their width instead, as the parameters are split
    over `fsdp`, and then moves activations between devices at every layer where moving parameters
    would do: for 1B students on 256 chips five times the memory. Does nothing outside a mesh
    (`jax.sharding.use_abstract_mesh`), inside a `shard_map`, and where the axis does not divide.

    Args:
      x: (B, ...), B the batch or the batch times something.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(mesh.shape.get(axis) is None for axis in BATCH_AXES):
        return x
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    free = all(types[axis] == AxisType.Auto for axis in BATCH_AXES)
    if shards == 1 or not free or x.shape[0] % shards:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, *others))


def splits_heads() -> bool:
    """Whether the mesh in the context splits heads (its axis `tensor` is longer than 1)."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get("tensor", 1) > 1


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, parts: int = 1) -> None:
    """Refuses a global batch that the mesh or the processes cannot split evenly.

    Args:
      batch_size: Rows of the batch.
      mesh: The mesh.
      parts: Micro-batches that the batch is worked through in.

    Raises:
      ConfigError: With the next batch size that would do.
    """
    shards = math.prod(mesh.shape[a] for a in BATCH_AXES)
    shards = math.lcm(shards, jax.process_count()) * parts
    if batch_size % shards:
        split = f", {parts} parts" if parts > 1 else ""
        fewer = ", or a smaller accumulate" if parts > 1 else ""
        raise ConfigError(
            f"batch_size {batch_size} does not divide over {shards} batch shards "
            f"(data x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']}, "
            f"{jax.process_count()} processes{split}); use a multiple of {shards}, "
            f"such as {math.ceil(batch_size / shards) * shards}{fewer}"
        )
