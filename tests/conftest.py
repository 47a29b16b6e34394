"""Shared fixtures; eight virtual CPU devices and full float32 products, set before JAX starts."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# The suite is one long process with threads of its own: malloc stays as it is.
os.environ.setdefault("IV2_KEEP_PAGES", "0")
# Tests compile much and run little: without LLVM's optimisations the suite takes a third of the
# time (one tiny training step compiled in 5 s instead of 26 on a busy 2-core machine).
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"{name}={value}" for name, value in _FLAGS.items() if name not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()

import psutil  # noqa: E402 (after the environment is set)
import pytest  # noqa: E402

from iv2_jax.parallel import cpu  # noqa: E402

cpu.spare_threads()

MOST_BYTES = 3e9  # of a worker, before it drops what it has compiled
# Tracing makes many objects and little garbage: looking for it as often as Python does by itself
# takes a fourteenth of the suite's time.
gc.set_threshold(200_000, 20, 50)

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        default=None,
        help="folder of golden .safetensors files (default: ../shared/goldens, else tests/goldens)",
    )


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The developers' shared folder; tests that need it skip elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("needs the developers' ../shared folder, which is not here")
    return SHARED


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_do_not_pile_up():
    """Drops them after a file that leaves much memory taken: kept, the whole suite's take 7 GB."""
    yield
    if "jax" in sys.modules and psutil.Process().memory_info().rss > MOST_BYTES:
        sys.modules["jax"].clear_caches()
