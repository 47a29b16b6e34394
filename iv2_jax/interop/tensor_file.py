"""Tensors of weight files: shapes known at once, values read when asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor of a file: shape and dtype are known, values are read by `np.asarray`.

    Attributes:
        shape: its shape.
        dtype: its NumPy dtype (bfloat16 by `ml_dtypes`).
        read: returns the values; each call reads anew and keeps nothing.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the values."""
        return np.asarray(self.read(), dtype=dtype)


class TensorFile(Mapping[str, TensorRef]):
    """The tensors of one file or of a folder of shards, read only when asked for.

    Attributes:
        path: the file or folder.
        wrapper: key the weights stood under in a pickled checkpoint, such as `module`, or None.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorRef], wrapper: str | None = None
    ) -> None:
        self.path = path
        self.wrapper = wrapper
        self._tensors = dict(tensors)

    def __getitem__(self, key: str) -> TensorRef:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def select(self, prefix: str) -> TensorFile:
        """Keeps the keys that start with `prefix`, and takes it off.

        Raises:
            CheckpointError: no key starts with it.
        """
        kept = {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}
        if not kept:
            raise CheckpointError(
                f"{self.path}: no key starts with {prefix!r}; it has {sample(list(self))}"
            )
        return TensorFile(self.path, kept, self.wrapper)


def sample(names: Sequence[Any]) -> str:
    """A few of the names, for messages."""
    shown = ", ".join(map(repr, names[:8]))
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
