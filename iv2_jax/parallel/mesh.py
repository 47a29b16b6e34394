"""The device mesh: axes `data` (outermost, across slices), `fsdp` and `tensor`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    max_devices: int = 0

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if sum(s == -1 for s in sizes) > 1:
            raise ConfigError(f"only one mesh axis may be -1, got data, fsdp, tensor = {sizes}")
        for name, size in zip(AXES, sizes, strict=True):
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{name} must be positive or -1, not {size}")
        if self.max_devices < 0:
            raise ConfigError(f"mesh.max_devices must be >= 0, not {self.max_devices}")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh `(data, fsdp, tensor)` over `devices` (default: all of the run's devices).

    Raises:
      ConfigError: The axis sizes do not multiply to the number of devices.
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
        from jax.experimental import mesh_utils

        # An axis need not be an edge of the slice: 8 x 8 x 8 chips have no edge of 16.
        grid = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over the data and fsdp axes; other dimensions whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Refuses a global batch that the mesh or the processes cannot split evenly.

    Raises:
      ConfigError: With the next batch size that would do.
    """
    shards = math.prod(mesh.shape[a] for a in BATCH_AXES)
    shards = math.lcm(shards, jax.process_count())
    if batch_size % shards:
        raise ConfigError(
            f"batch_size {batch_size} does not divide over {shards} batch shards "
            f"(data x fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']}, "
            f"{jax.process_count()} processes); use a multiple of {shards}, "
            f"such as {math.ceil(batch_size / shards) * shards}"
        )
