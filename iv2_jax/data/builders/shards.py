"""Writing a folder of ArrayRecord files that is there completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iv2_jax.errors import DataError


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder that becomes `folder` if the block ends well.

    Raises:
      DataError: the folder exists or cannot be written, or the disk is full; nothing is left.
    """
    target = Path(folder)
    if target.exists() and not overwrite:
        raise DataError(f"{target}: already exists; choose another folder or pass overwrite")
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (OSError, RuntimeError) as e:
        raise _explain(e, target) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _explain(error: Exception, target: Path) -> Exception:
    """A `DataError` for what a disk may do; other errors as they are."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        free = shutil.disk_usage(_existing(target)).free
        return DataError(
            f"{target}: the disk is full ({free >> 20} MiB free); nothing was kept, make room or "
            "choose another disk"
        )
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return DataError(f"{error.filename or target}: cannot be written: {reason}")
    return error


def _existing(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next((p for p in path.resolve().parents if p.exists()), Path("/"))


class Shards:
    """Writes the records of one split, a new file whenever one has grown large enough."""

    def __init__(self, folder: Path, name: str, split: str, shard_bytes: int) -> None:
        """Takes where to write and how much to a file."""
        self.lengths: list[int] = []
        self._folder, self._stem = folder, f"{name}-{split}.array_record"
        self._shard_bytes = shard_bytes
        self._size = 0
        self._writer: Any = None

    def write(self, record: bytes) -> None:
        """Appends one record."""
        if self._writer is None:
            from array_record.python import array_record_module

            path = str(self._folder / f"{self._stem}.{len(self.lengths)}")
            # One record a group: any of them is read without its neighbours.
            self._writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
            self.lengths.append(0)
            self._size = 0
        self._writer.write(record)
        self.lengths[-1] += 1
        self._size += len(record)
        if self._size >= self._shard_bytes:
            self._close_file()

    def finish(self) -> list[int]:
        """Gives the closed files their final names; the number of records in each."""
        total = len(self.lengths)
        for at in range(total):
            final = f"{self._stem}-{at:05d}-of-{total:05d}"
            (self._folder / f"{self._stem}.{at}").rename(self._folder / final)
        return self.lengths

    def close(self) -> None:
        """Closes the last file; the writer reports a full disk only here."""
        self._close_file()

    def _close_file(self) -> None:
        """Closes the file that is open, if any."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
