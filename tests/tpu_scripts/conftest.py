from __future__ import annotations

from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import Cloud, make_repository


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def cloud(tmp_path: Path, repository: Path) -> Cloud:
    return Cloud(tmp_path, repository)
