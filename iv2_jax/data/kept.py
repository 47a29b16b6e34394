"""Decoded clips kept in memory: for small sets that are shown many times in the same view."""

from __future__ import annotations

import threading

import numpy as np


class KeptClips:
    """Arrays of clips by their position, until the memory they may take is full.

    What does not fit is read anew each time: dropping what was kept instead would, with a new order
    every epoch, drop much of what comes next. Threads may share one; a worker process starts with
    an empty one.
    """

    def __init__(self, max_bytes: int) -> None:
        """Takes the memory that the arrays may have."""
        self._room = max_bytes
        self._clips: dict[int, dict[str, np.ndarray]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._clips)

    def __reduce__(self) -> tuple[type[KeptClips], tuple[int]]:
        return KeptClips, (self._room + sum(map(_num_bytes, self._clips.values())),)

    def get(self, index: int) -> dict[str, np.ndarray] | None:
        """The arrays of a clip, which must not be written to, or None."""
        kept = self._clips.get(index)
        return None if kept is None else dict(kept)

    def put(self, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Keeps the arrays of a clip if there is room."""
        size = _num_bytes(arrays)
        with self._lock:
            if index not in self._clips and size <= self._room:
                self._room -= size
                self._clips[index] = dict(arrays)


def _num_bytes(arrays: dict[str, np.ndarray]) -> int:
    return sum(np.asarray(array).nbytes for array in arrays.values())
