"""Stored arrays by clip: what frozen teachers give for each clip of a list, computed once.

A folder holds ArrayRecord files, a record a clip, and `targets.json`: the settings that the arrays
follow from, their names, shapes and dtypes, and the clips' ids by part (`train`, `eval`). A record
is the bytes of its arrays one after the other.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.data.builders.shards import Shards
from iv2_jax.data.sources import packed_shards
from iv2_jax.errors import ConfigError, DataError

INDEX = "targets.json"
_NAME = "targets"
_SHARD_BYTES = 1 << 30


class TargetWriter:
    """Writes a folder part by part; see `builders.shards.new_folder` for where to."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Takes an empty folder and what the arrays follow from (plain values)."""
        self._folder = folder
        self._index: dict[str, Any] = {"settings": dict(settings), "arrays": [], "parts": {}}

    def write_part(
        self, part: str, clips: Sequence[str], rows: Any, progress: Any = lambda: None
    ) -> int:
        """Writes one part.

        Args:
          part: its name, `train` or `eval`.
          clips: ids of all clips of the list, in order.
          rows: iterable of (position of the clip in the list, {name: array}).
          progress: called after every clip.

        Returns:
          Number of clips written; those of `clips` that `rows` left out are noted as such.
        """
        shards, records = Shards(self._folder, _NAME, part, _SHARD_BYTES), {}
        try:
            for position, arrays in rows:
                self._check(arrays)
                record = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays.values())
                shards.write(record)
                records[clips[position]] = len(records)
                progress()
        finally:
            shards.close()
        if not records:
            raise DataError(f"no clip of part {part!r} decodes")
        shards.finish()
        left_out = [clip for clip in clips if clip not in records]
        self._index["parts"][part] = {"clips": list(records), "left_out": left_out}
        return len(records)

    def finish(self) -> None:
        """Writes the index."""
        (self._folder / INDEX).write_text(json.dumps(self._index), encoding="utf-8")

    def _check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """All records hold the same arrays."""
        layout = [[k, list(a.shape), a.dtype.name] for k, a in arrays.items()]
        self._index["arrays"] = self._index["arrays"] or layout
        if layout != self._index["arrays"]:
            raise DataError(f"arrays {layout} differ from {self._index['arrays']} before")


class Targets:
    """The stored arrays of one part, read at random by workers."""

    def __init__(self, folder: str | os.PathLike[str], part: str) -> None:
        """Opens a folder.

        Raises:
          DataError: it is no folder of targets, or damaged.
        """
        self.folder = os.fspath(folder)
        index = read_index(folder)
        if part not in index["parts"]:
            raise DataError(f"{folder}: has no part {part!r}; it has {sorted(index['parts'])}")
        self._arrays = [(n, tuple(s), np.dtype(d)) for n, s, d in index["arrays"]]
        about = index["parts"][part]
        self._position = {clip: i for i, clip in enumerate(about["clips"])}
        self._left_out = set(about["left_out"])
        self._files = packed_shards(folder)[part]
        self._reader: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_lock": None, "_position": {}, "_left_out": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self._arrays)

    def records(self, clips: Sequence[str]) -> np.ndarray:
        """Record number of each clip (n,), -1 for those left out when the folder was written.

        Raises:
          DataError: a clip is not known at all.
        """
        unknown = [c for c in clips if c not in self._position and c not in self._left_out]
        if unknown:
            raise DataError(
                f"{self.folder}: has nothing for {len(unknown)} of {len(clips)} clips, such as "
                f"{unknown[0]!r}; write it anew with `iv2 data teacher-features`"
            )
        return np.array([self._position.get(clip, -1) for clip in clips], np.int64)

    def read(self, record: int) -> dict[str, np.ndarray]:
        """The arrays of a record by name.

        Raises:
          DataError: the file is damaged.
        """
        try:
            data = self._open()[record]
        except (IndexError, RuntimeError, ValueError, OSError) as e:
            raise DataError(f"{self.folder}: record {record} cannot be read: {e}") from e
        if len(data) != self.nbytes:
            raise DataError(f"{self.folder}: record {record} has {len(data)} bytes")
        arrays, at = {}, 0
        for name, shape, dtype in self._arrays:
            count = math.prod(shape)
            arrays[name] = np.frombuffer(data, dtype, count, at).reshape(shape)
            at += count * dtype.itemsize
        return arrays

    def zeros(self) -> dict[str, np.ndarray]:
        """Arrays of a row that shows no clip."""
        return {name: np.zeros(shape, dtype) for name, shape, dtype in self._arrays}

    def _open(self) -> Any:
        """The random-access reader, opened once a process."""
        with self._lock:
            if self._reader is None:
                from array_record.python import array_record_data_source

                self._reader = array_record_data_source.ArrayRecordDataSource(self._files)
            return self._reader


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `targets.json` of a folder says.

    Raises:
      DataError: there is none, or it is damaged.
    """
    path = Path(folder) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return {name: index[name] for name in ("settings", "arrays", "parts")}
    except FileNotFoundError:
        raise DataError(
            f"{folder}: has no {INDEX}; `iv2 data teacher-features` writes such a folder"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise DataError(f"{path}: is damaged ({e}); write the folder anew") from e


def check_settings(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Refuses a folder whose arrays were made with other settings.

    Raises:
      ConfigError: they differ; the message names the first setting that does.
    """
    stored = read_index(folder)["settings"]
    wanted = json.loads(json.dumps(settings))
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise ConfigError(
                f"{folder}: was made with {name}={stored.get(name)!r}, this run has "
                f"{wanted.get(name)!r}; write it anew with `iv2 data teacher-features`"
            )
