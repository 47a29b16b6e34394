"""What happens to clips that do not decode: named once, replaced, counted, and a limit to it."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from iv2_jax.errors import DataError

WINDOW = 1000  # rows over which the share of bad ones is taken
FEWEST = 100  # rows that are assumed to have been read when fewer have
_SHOWN = 5  # files named in a message


class BadClipLog:
    """Names each undecodable clip once, on stderr and in a JSONL file; used by loader workers.

    With a file, workers of one machine see each other's lines, so that a clip is named once for
    all of them; without one, once for each worker.
    """

    def __init__(self, path: str = "") -> None:
        """Takes the file to append to, or nothing."""
        self._path = path
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_path"])

    def add(self, path: str, reason: str, *, used: bool = False) -> None:
        """Names a clip.

        Args:
          path: the clip.
          reason: what is wrong with it.
          used: it is odd but usable, and is not replaced.
        """
        with self._lock:
            if path in self._seen:
                return
            self._seen.add(path)
            record = {"path": path, "reason": reason, "used": used}
            if self._path and not _append_once(self._path, record):
                return
        kind = "odd clip" if used else "bad clip, replaced"
        print(f"iv2: {kind}: {path}: {reason}", file=sys.stderr, flush=True)


def _append_once(path: str, record: dict[str, Any]) -> bool:
    """Appends the record unless the file has one for its path; whether it was appended."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file, _locked(file):
        file.seek(0)
        for line in file:
            with contextlib.suppress(ValueError):  # a line that a crash cut short
                if json.loads(line).get("path") == record["path"]:
                    return False
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return True


@contextlib.contextmanager
def _locked(file: IO[str]) -> Iterator[None]:
    """Holds the file against the other workers of this machine."""
    try:
        import fcntl
    except ImportError:  # no such thing here: two workers may name a clip twice
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
        file.flush()
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


class BadClipMonitor:
    """Adds up replaced rows on the consumer's side and ends a run that has too many.

    Attributes:
      rows: rows seen.
      bad_rows: rows among them whose first choice did not decode.
    """

    def __init__(
        self, max_share: float, bad_clips: Callable[[int, int], Sequence[str]] | None = None
    ) -> None:
        """Sets the limit.

        Args:
          max_share: largest share of bad rows, among the last 1,000 (of fewer than 100 rows as
            if they were 100, so that one bad clip at the start does not end a run).
          bad_clips: paths that were passed over for (global row, replaced).
        """
        self.rows = 0
        self.bad_rows = 0
        self._max_share = max_share
        self._bad_clips = bad_clips
        self._recent: collections.deque[bool] = collections.deque(maxlen=WINDOW)
        self._recent_bad = 0
        self._paths: dict[str, int] = {}

    def update(self, replaced: np.ndarray, rows: Sequence[int]) -> None:
        """Counts one batch.

        Args:
          replaced: (b,) how many clips were passed over for each row.
          rows: (b,) the rows' global numbers.

        Raises:
          DataError: the share of bad rows is above the limit.
        """
        for row, count in zip(rows, replaced.tolist(), strict=True):
            bad = count > 0
            if len(self._recent) == WINDOW:
                self._recent_bad -= self._recent[0]
            self._recent.append(bad)
            self._recent_bad += bad
            self.rows += 1
            self.bad_rows += bad
            if bad and self._bad_clips is not None:
                for path in self._bad_clips(row, count):
                    self._paths[path] = self._paths.get(path, 0) + 1
        if self._recent_bad > self._max_share * max(len(self._recent), FEWEST):
            raise DataError(self._complaint())

    def _complaint(self) -> str:
        """Says how many, which, and what to do."""
        shown = sorted(self._paths, key=lambda p: -self._paths[p])[:_SHOWN]
        more = len(self._paths) - len(shown)
        names = "".join(f"\n  {path}" for path in shown)
        if more > 0:
            names += f"\n  and {more} more"
        return (
            f"{self._recent_bad} of the last {len(self._recent)} rows were clips that do not "
            f"decode, more than max_bad_share={self._max_share:g} allows; check them with "
            f"`iv2 data validate`, or raise max_bad_share:{names}"
        )
