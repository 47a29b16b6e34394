"""Files of installed packages by name."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from iv2_jax.data.package_files import resolve
from iv2_jax.errors import DataError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with two vocabularies and weights."""
    files = ["toy_model/__init__.py", "toy_model/a/vocab.txt", "toy_model/b/vocab.txt"]
    files += ["toy_model/a/weights.bin"]
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    info = tmp_path / "toy_model-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-model\nVersion: 1.2\n")
    (info / "RECORD").write_text("".join(f"{n},,\n" for n in [*files, "../bin/toy", info.name]))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path / "toy_model"


def test_files_and_folders(package):
    for name, found in {
        "toy-model/a/vocab.txt": "a/vocab.txt",
        "toy-model/toy_model/b/vocab.txt": "b/vocab.txt",
        "toy-model/weights.bin": "a/weights.bin",
        "toy_model/b/": "b",
        "toy-model": "",
    }.items():
        assert Path(resolve(f"package:{name}")) == package / found
    assert resolve("a/b.txt") == "a/b.txt"
    assert resolve(Path("a")) == "a"


def test_what_cannot_be_found(package):
    with pytest.raises(DataError, match="not installed; pip install 'nothing-such'"):
        resolve("package:nothing-such/vocab.txt")
    with pytest.raises(DataError, match=r"several fit: toy_model/a/vocab\.txt, toy_model/b"):
        resolve("package:toy-model/vocab.txt")
    with pytest.raises(DataError, match=r"no file fits in package toy-model 1\.2; did you mean"):
        resolve("package:toy-model/a/vocab.text")
    (package / "a" / "weights.bin").unlink()
    with pytest.raises(DataError, match="is missing; pip install --force-reinstall toy-model"):
        resolve("package:toy-model/weights.bin")
