"""Disks that are full or may not be written to, for real where the machine lets us mount one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def _mount(*arguments: str) -> bool:
    """Whether `mount` did it; containers without the right to it do not."""
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[bool]:
    """A file system of its own at `folder` while the block lasts; gives whether it could be had.

    Args:
      folder: Made if it is not there.
      mebibytes: Its size, in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mounted = _mount("-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Callable[[], None]:
    """Fills the disk that `folder` is on, or what has become free since; the answer makes room.

    Args:
      folder: On a `small_disk`.
      leave: Bytes that stay free.
    """
    ballast = folder / "ballast"
    # The run may write at the same time, so that it is full before the sum says so.
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while (free := os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize) > leave:
            file.write(bytes(min(free - leave, 1 << 20)))
    return lambda: ballast.unlink(missing_ok=True)


def forbid(folder: Path) -> Callable[[], None]:
    """Nothing can be written in `folder` any more; the answer allows it again.

    Root is not held up by permissions: for it the folder is mounted read-only, or put away with a
    file in its place where mounting is not allowed.
    """
    if os.geteuid() != 0:
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        return lambda: folder.chmod(mode)
    deadline = time.monotonic() + 60
    if _mount("--bind", str(folder), str(folder)):
        # Not while the run has a file open there to write to.
        while not _mount("-o", "remount,ro,bind", str(folder)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return lambda: subprocess.run(["umount", "--lazy", str(folder)], check=True) and None
    away = folder.with_name(f"{folder.name}.away")
    folder.rename(away)
    folder.write_text("not a folder")

    def back() -> None:
        folder.unlink()
        away.rename(folder)

    return back
