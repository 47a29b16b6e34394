"""Where clips come from: files named by a manifest, or a packed data set.

A source lists its clips and opens any of them for reading frames. It is sent to every loader
worker, so that it carries no records there, only what opening needs, in a few arrays.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from iv2_jax.data import manifest
from iv2_jax.data.decode import DecodeError, VideoReader
from iv2_jax.data.records import Clip, FieldError, clip_from_object
from iv2_jax.errors import DataError

PACKED_INDEX = "iv2_clips.jsonl"  # records of a packed set in the order of its shards
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Frames(Protocol):
    """An open clip."""

    warnings: list[str]

    def __len__(self) -> int:
        """Number of frames, at least one."""

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB of the frames with these indices."""

    def close(self) -> None:
        """Frees the file."""


class ClipSource(Protocol):
    """A list of clips that can be opened by position; picklable."""

    clips: Sequence[Clip]

    def __len__(self) -> int:
        """Number of clips."""

    def name(self, index: int) -> str:
        """What messages call the clip: its path."""

    def open(self, index: int) -> Frames:
        """Opens a clip; raises `DecodeError`."""


def open_source(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    prefix: str = "",
    split: str | None = None,
    separator: str | None = None,
) -> ClipSource:
    """Opens a manifest of any format, or the folder of a packed data set.

    Args:
      path: the manifest, or a folder written by `iv2 data build`.
      format: see `manifest.read_clips`.
      prefix: folder or URL that relative paths of a manifest are joined to.
      split: only the clips of this split.
      separator: column separator of text lists.

    Raises:
      DataError: it cannot be read, is empty, or has no such split.
    """
    if os.path.isdir(path):
        return PackedSource(path, split=split)
    if not os.path.exists(path):
        raise DataError(f"{path}: does not exist; give a manifest or the folder of a packed set")
    return FileSource(
        manifest.read_clips(path, format=format, prefix=prefix, split=split, separator=separator)
    )


class FileSource:
    """Clips that are files (or folders of frames, or URLs)."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        """Takes the records of `manifest.read_clips`."""
        self.clips = clips
        paths = [clip.path.encode() for clip in clips]
        self._paths = b"".join(paths)
        self._ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        nothing = math.nan
        self._start = np.array([nothing if c.start is None else c.start for c in clips])
        self._end = np.array([nothing if c.end is None else c.end for c in clips])
        self._frames = np.array([c.frames or 0 for c in clips], np.int32)

    def __len__(self) -> int:
        return len(self._ends)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "clips": ()}  # workers need the arrays only

    def name(self, index: int) -> str:
        """The clip's path."""
        first = int(self._ends[index - 1]) if index else 0
        return self._paths[first : int(self._ends[index])].decode()

    def open(self, index: int) -> Frames:
        """Opens the clip, whatever it is stored as."""
        start, end = float(self._start[index]), float(self._end[index])
        return open_frames(
            self.name(index),
            start=None if math.isnan(start) else start,
            end=None if math.isnan(end) else end,
            frames=int(self._frames[index]) or None,
        )


class PackedSource:
    """Clips whose bytes lie in the ArrayRecord files of a packed data set.

    `start` and `end` of its records tell where in the original file the clip was cut from; the
    bytes hold that stretch only.
    """

    def __init__(self, folder: str | os.PathLike[str], *, split: str | None = None) -> None:
        """Lists the shards and records of a folder.

        Args:
          folder: written by `iv2 data build`, or by TFDS with the same features.
          split: only this split's shards; all by default.
        """
        self._folder = os.fspath(folder)
        shards = packed_shards(folder)
        if split is not None and split not in shards:
            raise DataError(f"{folder}: no split {split!r}; known: {', '.join(sorted(shards))}")
        self._files = [f for s in sorted(shards) if split in (None, s) for f in shards[s]]
        self._names: tuple[bytes, np.ndarray] | None = None
        self._reader: Any = None
        self._lock = threading.Lock()
        self._length = len(self._records())
        self.clips: Sequence[Clip] = self._read_clips(shards, split)
        paths = [clip.path.encode() for clip in self.clips]
        self._names = b"".join(paths), np.cumsum([len(p) for p in paths], dtype=np.int64)

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "clips": (), "_reader": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def name(self, index: int) -> str:
        """Path of the original, within the packed set."""
        if self._names is None:
            return f"{self._folder}[{index}]"
        paths, ends = self._names
        first = int(ends[index - 1]) if index else 0
        return f"{self._folder}[{index}]:{paths[first : int(ends[index])].decode()}"

    def open(self, index: int) -> Frames:
        """Reads the clip's bytes and opens them."""
        return VideoReader(self.read_bytes(index), name=self.name(index))

    def read_bytes(self, index: int) -> bytes:
        """The stored file of one clip."""
        return parse_example(self._record(index))["video"][0]

    def _records(self) -> Any:
        """The random-access reader, opened once a process."""
        with self._lock:
            if self._reader is None:
                from array_record.python import array_record_data_source

                try:
                    self._reader = array_record_data_source.ArrayRecordDataSource(self._files)
                except (RuntimeError, ValueError, OSError) as e:
                    raise DataError(
                        f"{self._folder}: a shard is damaged, copy or build it again: {e}"
                    ) from e
            return self._reader

    def _record(self, index: int) -> bytes:
        """One serialised example."""
        try:
            return self._records()[index]
        except (IndexError, RuntimeError, ValueError, OSError) as e:
            raise DecodeError(self.name(index), f"cannot be read from its shard: {e}") from e

    def _read_clips(self, shards: dict[str, list[str]], split: str | None) -> Sequence[Clip]:
        """Records from the index file, or from the examples when there is none."""
        path = Path(self._folder, PACKED_INDEX)
        if not path.exists():
            return [example_clip(parse_example(self._record(i))) for i in range(self._length)]
        clips: list[Clip] = []
        with path.open(encoding="utf-8") as file:
            for line, row in enumerate(file, start=1):
                try:
                    record = json.loads(row)
                    if split in (None, record["shard_split"]):
                        clips.append(clip_from_object(record))
                except (ValueError, KeyError, TypeError, FieldError) as e:
                    raise DataError(f"{path}:{line}: is damaged ({e}); build the set anew") from e
        if len(clips) != self._length:
            raise DataError(
                f"{path}: lists {len(clips)} clips, the shards hold {self._length}; build it anew"
            )
        return clips


def packed_shards(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Files of every split of a TFDS folder, in order.

    Raises:
      DataError: the folder holds no complete set of ArrayRecord shards.
    """
    pattern = re.compile(r".+-(?P<split>[^-]+)\.array_record-(?P<at>\d{5})-of-(?P<of>\d{5})")
    found: dict[str, dict[int, str]] = {}
    expected: dict[str, int] = {}
    for name in sorted(os.listdir(folder)):
        match = pattern.fullmatch(name)
        if match:
            split = match["split"]
            found.setdefault(split, {})[int(match["at"])] = os.path.join(folder, name)
            expected[split] = int(match["of"])
    if not found:
        raise DataError(
            f"{folder}: holds no *.array_record-* files; give a manifest or the folder that "
            "`iv2 data build` wrote"
        )
    for split, files in found.items():
        missing = sorted(set(range(expected[split])) - set(files))
        if missing:
            raise DataError(f"{folder}: split {split!r} lacks shard {missing[0]}; copy it again")
    return {split: [files[i] for i in sorted(files)] for split, files in found.items()}


def parse_example(record: bytes) -> dict[str, list[Any]]:
    """Values of a serialised `tf.train.Example` by feature, without TensorFlow."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(record)
    values: dict[str, list[Any]] = {}
    for key, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values[key] = list(getattr(feature, kind).value) if kind else []
    return values


def example_clip(values: dict[str, list[Any]]) -> Clip:
    """The record of an example written by `builders.packed`."""

    def texts(key: str) -> list[str]:
        return [value.decode() for value in values.get(key, [])]

    def optional(key: str) -> str | None:
        return next(iter(texts(key)), "") or None

    def seconds(key: str) -> float | None:
        value = next(iter(values.get(key, [])), math.nan)
        return None if math.isnan(value) else float(value)

    captions: dict[str, tuple[str, ...]] = {}
    for modality, text in zip(texts("captions/modality"), texts("captions/text"), strict=True):
        captions[modality] = (*captions.get(modality, ()), text)
    numbers = values.get("labels/is_number", [])
    named = zip(texts("labels/name"), texts("labels/value"), numbers, strict=True)
    audio = next(iter(values.get("audio", [])), -1)
    return Clip(
        id=optional("id") or "",
        path=optional("path") or "",
        start=seconds("start"),
        end=seconds("end"),
        captions=captions,
        labels={name: int(value) if number else value for name, value, number in named},
        qa=tuple(zip(texts("qa/question"), texts("qa/answer"), strict=True)),
        split=optional("split"),
        group=optional("group"),
        audio=None if audio < 0 else bool(audio),
    )


# -- opening one clip -----------------------------------------------------------------------------


def open_frames(
    path: str,
    *,
    start: float | None = None,
    end: float | None = None,
    frames: int | None = None,
) -> Frames:
    """Opens a video file, a folder of frames or a URL.

    Args:
      path: where it is.
      start: first second or None.
      end: last second (not included) or None.
      frames: number of frames of a folder, None to take all it holds.

    Raises:
      DecodeError: it cannot be opened.
    """
    if "://" in path:
        return VideoReader(read_bytes(path), name=path, start=start, end=end)
    if os.path.isdir(path):
        if start is not None or end is not None:
            raise DecodeError(path, "is a folder of frames, which has no seconds to cut at")
        return FrameFolder(path, frames)
    return VideoReader(path, start=start, end=end)


def read_bytes(path: str) -> bytes:
    """The bytes of a file or URL.

    Raises:
      DecodeError: it cannot be read.
      DataError: a URL whose scheme needs a package that is not installed.
    """
    try:
        if "://" not in path:
            return Path(path).read_bytes()
        import fsspec

        with fsspec.open(path, "rb") as file:
            return file.read()
    except ImportError as e:
        raise DataError(
            f"{path}: reading it needs a package that is not installed ({e}); install fsspec and "
            "the one for its scheme (gcsfs, s3fs, …), or mount the bucket and give paths"
        ) from e
    except FileNotFoundError as e:
        raise DecodeError(path, "does not exist") from e
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise DecodeError(path, f"cannot be read: {reason}") from e


class FrameFolder:
    """A clip stored as one picture a frame, in the order of the numbers in their names."""

    def __init__(self, path: str, frames: int | None = None) -> None:
        """Lists the pictures; the first `frames` of them if given."""
        self.path = path
        self.warnings: list[str] = []
        self._files = list(_pictures(path))
        if not self._files:
            raise DecodeError(path, f"holds no pictures ({', '.join(_IMAGES)})")
        if frames is not None and frames > len(self._files):
            raise DecodeError(path, f"holds {len(self._files)} pictures, the list says {frames}")
        self._files = self._files[:frames]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `Frames.read`; pictures of other sizes are brought to that of the first."""
        chosen = np.asarray(indices, np.int64)
        if chosen.min() < 0 or chosen.max() >= len(self._files):
            raise IndexError(f"{self.path}: frames {chosen.min()}..{chosen.max()} are asked for")
        loaded: dict[int, np.ndarray] = {}
        size: tuple[int, int] | None = None
        for i in np.unique(chosen).tolist():
            loaded[i] = _load_picture(os.path.join(self.path, self._files[i]), size)
            size = size or (loaded[i].shape[1], loaded[i].shape[0])
        return np.stack([loaded[i] for i in chosen.tolist()])

    def close(self) -> None:
        """Nothing is open between reads."""


def _pictures(folder: str) -> Iterator[str]:
    """Picture files of a folder, `img_2` before `img_10`."""
    names = [n for n in os.listdir(folder) if n.lower().endswith(_IMAGES)]
    yield from sorted(names, key=_natural)


@functools.lru_cache(maxsize=4096)
def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that compares runs of digits as numbers."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(p)) if p.isdigit() else (1, p) for p in parts)


def _load_picture(path: str, size: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8 of one picture, at (width, height) if given."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as e:
        raise DecodeError(path, f"is not a readable picture: {e}") from e
    return np.asarray(picture if size in (None, picture.size) else picture.resize(size))
