"""Many texts in two arrays: cheap to hand to a worker process, unlike a list of objects."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Strings:
    """An immutable sequence of texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Takes the texts; halves of surrogate pairs in them are kept."""
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._bytes = b"".join(parts)
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        first = int(self._ends[index - 1]) if index else 0
        return self._bytes[first : int(self._ends[index])].decode("utf-8", "surrogatepass")
