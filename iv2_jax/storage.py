"""Folders in a bucket (`gs://BUCKET/RUN`) beside folders on a disk.

Paths in a bucket are `etils.epath` paths: they read, write and list as `pathlib` ones do. What
they cannot do is append, so files that grow are written on a disk and copied now and then.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from pathlib import Path

from iv2_jax.errors import ConfigError

logger = logging.getLogger(__name__)

SCHEME = "gs://"
_PUSH_EVERY = 60.0  # seconds between copies of a file that grows


def path(text: str | Path) -> Path:
    """The path that `text` names, in a bucket if it starts with gs://.

    Raises:
      ConfigError: What reads buckets is not installed, or the scheme is another one.
    """
    name = str(text)
    if not name.startswith(SCHEME):
        if "://" in name:
            raise ConfigError(f"{name}: only {SCHEME} and folders on a disk are known")
        return Path(text)
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise ConfigError(f"{name}: reading buckets needs gcsfs; pip install gcsfs") from None
    from etils import epath

    return epath.Path(name)


def is_remote(folder: Path) -> bool:
    """Whether `folder` is in a bucket."""
    return str(folder).startswith(SCHEME)


def absolute(folder: Path) -> Path:
    """`folder` from the root; one in a bucket always is."""
    return folder if is_remote(folder) else folder.absolute()


def write_whole(file: Path, text: str) -> None:
    """Writes a small file so that readers see the old text or the new, never half of it."""
    if is_remote(file):
        file.write_text(text)  # an object appears when it is complete
        return
    temporary = file.with_suffix(".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class Mirror:
    """A folder to write growing files into: `folder` itself, or a copy of it on a disk.

    Attributes:
      local: Write here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._remote = is_remote(folder)
        self._temporary = tempfile.TemporaryDirectory(prefix="iv2_") if self._remote else None
        self.local = Path(self._temporary.name) if self._temporary else folder
        self._copied: dict[Path, tuple[int, int]] = {}
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None

    def push(self) -> None:
        """Copies in the background what has changed, if the last copy is a while ago."""
        if not self._remote or time.monotonic() - self._last < _PUSH_EVERY:
            return
        if self._thread is None or not self._thread.is_alive():
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._copy, daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Copies what has changed and waits for it."""
        if self._thread is not None:
            self._thread.join()
        if self._remote:
            self._copy()

    def close(self) -> None:
        """Copies the rest and drops the copy on the disk."""
        self.flush()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _copy(self) -> None:
        """One pass; a bucket that cannot be written to now is tried again at the next."""
        for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
            status = file.stat()
            state = (status.st_size, status.st_mtime_ns)
            if self._copied.get(file) == state:
                continue
            target = self._folder / file.relative_to(self.local).as_posix()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
            except Exception as error:  # the libraries behind have error types of their own
                logger.warning("%s could not be written: %s", target, error)
                return
            self._copied[file] = state
