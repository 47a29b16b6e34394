"""Fixture that finds golden cases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity import goldens

_TESTS = Path(__file__).resolve().parents[1]
_SHARED = _TESTS.parents[1] / "shared" / "goldens"


def goldens_folder(config: pytest.Config) -> Path:
    """Folder of the cases: `--goldens`, else the shared one, else the shipped subset."""
    asked = config.getoption("--goldens")
    return Path(asked) if asked else _SHARED if _SHARED.is_dir() else _TESTS / "goldens"


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Callable[[str], goldens.Golden]:
    """Gives a function from a case's name to the case.

    Cases come from `--goldens DIR`, else from the developers' shared folder, else from the subset
    shipped in `tests/goldens`. A case missing from a folder that was asked for is a failure; from
    the shipped subset, a skip.
    """
    asked = request.config.getoption("--goldens")
    folder = goldens_folder(request.config)

    @functools.cache
    def load(name: str) -> goldens.Golden:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            if asked:
                pytest.fail(f"--goldens {asked} has no case {name}")
            pytest.skip(f"case {name} is not in the shipped subset; pass --goldens DIR")
        return goldens.read(path)

    return load
