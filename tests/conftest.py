"""Shared fixtures. Eight virtual CPU devices and full float32 matmuls, set before JAX starts."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import pytest

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
