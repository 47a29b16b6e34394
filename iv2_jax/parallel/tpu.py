"""What the TPU compiler is told for training steps: the one place for it.

`iv2 train` and `iv2 plan` compile with the same options, so a plan is of the program that runs.
`IV2_TPU_OPTIONS="name=value,name=value"` changes or adds some; an empty value takes one out, and
the compiler refuses names that it does not know. Nothing here has been run on hardware.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from jax.sharding import Mesh

from iv2_jax.errors import ConfigError
from iv2_jax.kernels import short_plan

VARIABLE = "IV2_TPU_OPTIONS"

COMPILER_OPTIONS: Mapping[str, str | bool | int] = {
    # Where it expects links to be slow, as on v5e, the compiler gathers a split weight piece by
    # piece around the product that needs it (a windowed einsum). Our pieces are so thin (1408 / 16
    # = 88 rows) that the sums between them are read and written 16 times: see docs/plan.md.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    # Weights are gathered while the layer before is computed, gradients reduced while the next is:
    # the options that published TPU recipes set for FSDP (MaxText's).
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    # Between slices: one replica's gradients are sent while others are still computed.
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}

# On-chip memory that one operation may take, on chips that have more of it: of itself the compiler
# gives 16 MiB, and products read their operands more often than they need to. 48 MiB brought a
# little more and took up to twice the time to compile (docs/plan.md).
_VMEM = "xla_tpu_scoped_vmem_limit_kib"
_VMEM_BYTES = 32 << 20


def compiler_options(mesh: Mesh) -> dict[str, str | bool | int] | None:
    """Options for `jax.jit` of a step on a mesh; None where its devices are no TPUs.

    Raises:
      ConfigError: `IV2_TPU_OPTIONS` is not of the form `name=value,name=value`.
    """
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    options = dict(COMPILER_OPTIONS)
    if short_plan.vmem_bytes(device.device_kind) > _VMEM_BYTES:
        options[_VMEM] = _VMEM_BYTES >> 10
    for item in filter(None, os.environ.get(VARIABLE, "").split(",")):
        name, equals, value = item.strip().partition("=")
        if not (name and equals):
            raise ConfigError(f"{VARIABLE}: {item!r} is not name=value")
        options[name] = value
    return {name: value for name, value in options.items() if value != ""}
