"""Checksums of a checkpoint's files, written with it and looked at before it is read.

Orbax stores arrays compressed and unchecked: a flipped bit would come back as other weights.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "checksums.json"
# Orbax changes these when it commits a checkpoint, after the checksums are taken.
_LEFT_OUT = (FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 8 << 20  # bytes read at a time
_THREADS = 8  # reading and crc32 run without Python's lock


def write(folder: Path) -> None:
    """Writes the size and CRC-32 of every file in a checkpoint's step folder into it.

    Raises:
      OSError: A file cannot be read, or the disk is full.
    """
    names = sorted(_names(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _measure(folder / name), names)
        files = {name: list(sums) for name, sums in zip(names, found, strict=True)}
    (folder / FILE).write_text(json.dumps({"crc32": files}, indent=1) + "\n")


def damage(folder: Path, *, under: str = "", process: int = 0, processes: int = 1) -> str | None:
    """Compares a step folder's files with their checksums.

    Args:
      folder: The step folder.
      under: Only files of this item, such as "params".
      process: Looks at every `processes`-th file, from this one on.
      processes: How many share the work.

    Returns:
      What is wrong with the first damaged file; None when all are as written, or when the
      checkpoint has no checksums (they are newer than it, or it was saved without).
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        wanted = json.loads(path.read_text())["crc32"]
        names = sorted(name for name in wanted if name.startswith(f"{under}/" if under else ""))
    except (ValueError, KeyError, TypeError) as error:
        return f"{FILE} is damaged: {error}"
    names = names[process::processes]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _compare(folder / name, wanted[name]), names)
        return next((f"{n}: {why}" for n, why in zip(names, found, strict=True) if why), None)


def _names(folder: Path, prefix: str = "") -> Iterator[str]:
    """Files below a folder, by their path from it."""
    for child in folder.iterdir():
        if child.is_dir():
            yield from _names(child, f"{prefix}{child.name}/")
        elif child.name not in _LEFT_OUT:
            yield prefix + child.name


def _measure(path: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _compare(path: Path, wanted: list[int]) -> str | None:
    """What is wrong with a file, or None."""
    try:
        size, crc = _measure(path)
    except OSError as error:
        return error.strerror or str(error)
    if size != wanted[0]:
        return f"has {size} bytes, {wanted[0]} were written"
    return None if crc == wanted[1] else "its content is not what was written (CRC-32)"
