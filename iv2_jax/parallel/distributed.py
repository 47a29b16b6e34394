"""Process start-up: multi-host when the environment says so, and the settings every run shares."""

from __future__ import annotations

import os
from pathlib import Path

import jax

CACHE_VARIABLE = "IV2_COMPILE_CACHE"


def start() -> None:
    """Joins the other processes of the run, if any, and turns the compilation cache on.

    Multi-host runs set `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`
    (Cloud TPU slices need none of them: `IV2_MULTIHOST=1` lets JAX ask the slice). Must be called
    before any other use of JAX.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        jax.distributed.initialize(
            address,
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
    elif os.environ.get("IV2_MULTIHOST") == "1":
        jax.distributed.initialize()
    cache = os.environ.get(CACHE_VARIABLE, str(Path.home() / ".cache" / "iv2_jax" / "xla"))
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    # Random bits do not depend on how an array is laid out over devices.
    jax.config.update("jax_threefry_partitionable", True)
