"""What is set for runs on the CPU platform: the one place for it.

Freed pages are kept (`keep_freed_pages`), and virtual devices have threads enough for their
collectives (`spare_threads`). `iv2 train`, `eval` and `chat` set this where JAX will run on the
CPU; on machines with accelerators nothing is changed. What was tried and left as JAX has it, with
the figures, is in docs/numerics.md, "Speed on CPU".
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re

logger = logging.getLogger(__name__)

VARIABLE = "IV2_KEEP_PAGES"  # 0 leaves malloc as it is
# The same for a child process, from its start; to be put into its environment.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
_SCHEDULER = "--xla_cpu_enable_concurrency_optimized_scheduler"
_ACCELERATORS = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")


def keep_freed_pages() -> bool:
    """Lets glibc keep freed memory; returns whether it agreed.

    XLA takes its temporary buffers afresh for every step. They are so large that glibc maps them
    and gives them back, so each step of an S/14 student touches 800 MB of new pages: a fifth of
    its CPU time. One heap without mappings keeps them. Must come before any thread starts, else
    threads keep heaps of their own, which are too small for these buffers.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # the names' values in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # no glibc
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1))
    return all(mallopt(name, value) == 1 for name, value in settings)


def spare_threads() -> None:
    """Keeps several virtual devices of this process from waiting for each other for ever.

    XLA runs all of them on one pool of threads, as many as devices or cores, and a collective holds
    a thread until its last member comes. Devices that are in two collectives at once take all
    threads, the last member finds none, and after 40 s XLA aborts (jax 0.10.2: the stage-2 gradient
    on a mesh of fsdp 4 x tensor 2). So there are more threads, and the scheduler looks less for
    what could run at once. What the user has set stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    devices = re.search(r"--xla_force_host_platform_device_count=(\d+)", flags)
    if devices is None:
        return
    os.environ.setdefault("NPROC", str(4 * int(devices[1])))  # XLA's name for the threads
    if _SCHEDULER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_SCHEDULER}=false"


def chosen() -> bool:
    """Whether JAX will run on the CPU, as far as can be told without starting it.

    `JAX_PLATFORMS` says so, or it says nothing and no accelerator's package is installed.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(importlib.util.find_spec(name) for name in _ACCELERATORS)


def set_up() -> bool:
    """Makes the settings where they apply; whether pages are kept. Comes before JAX starts."""
    if not chosen():
        return False
    spare_threads()
    if os.environ.get(VARIABLE, "1") == "0":
        return False
    kept = keep_freed_pages()
    logger.debug("freed pages are %s", "kept" if kept else "given back: this is not glibc")
    return kept
