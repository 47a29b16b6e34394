"""Where clips come from: files named by a manifest, or a packed data set.

A source lists its clips and opens any of them for reading frames. It is sent to every loader
worker, so that it carries no records there, only what opening needs, in a few arrays.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from iv2_jax.data import manifest, stills
from iv2_jax.data.decode import DecodeError, VideoReader
from iv2_jax.data.packed_files import PACKED_INDEX, example_clip, packed_shards, parse_example
from iv2_jax.data.records import Clip, FieldError, clip_from_object
from iv2_jax.data.stills import Box, FrameFolder, Still
from iv2_jax.data.stored_frames import StoredFrames
from iv2_jax.data.strings import Strings
from iv2_jax.errors import DataError

SOUND_FILES = (".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav")


class Frames(Protocol):
    """An open clip."""

    warnings: list[str]

    def __len__(self) -> int:
        """Number of frames, at least one."""

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB of the frames with these indices."""

    def close(self) -> None:
        """Frees the file."""


class Sound(NamedTuple):
    """Where a clip's sound is.

    Attributes:
      source: path, or the bytes of a file.
      name: what messages call it.
      start: first second, None for the beginning.
      end: second at which it ends (not included), None for the end of the file.
      from_video: it is the sound track of a video, not a sound file.
    """

    source: str | bytes
    name: str
    start: float | None
    end: float | None
    from_video: bool


class ClipSource(Protocol):
    """A list of clips that can be opened by position; picklable."""

    clips: Sequence[Clip]

    def __len__(self) -> int:
        """Number of clips."""

    def name(self, index: int) -> str:
        """What messages call the clip: its path."""

    def open(self, index: int) -> Frames:
        """Opens a clip; raises `DecodeError`."""

    def sound(self, index: int) -> Sound:
        """Where the clip's sound is, if it has any; raises `DecodeError`."""


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
        self._paths = Strings(clip.path for clip in clips)
        nothing = math.nan
        self._start = np.array([nothing if c.start is None else c.start for c in clips])
        self._end = np.array([nothing if c.end is None else c.end for c in clips])
        self._frames = np.array([c.frames or 0 for c in clips], np.int32)
        self._sounds = Strings(clip.sound or "" for clip in clips)
        self._crops = _crops(clips)

    def __len__(self) -> int:
        return len(self._paths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "clips": ()}  # workers need the arrays only

    def name(self, index: int) -> str:
        """The clip's path."""
        return self._paths[index]

    def open(self, index: int) -> Frames:
        """Opens the clip, whatever it is stored as."""
        start, end = self._stretch(index)
        return open_frames(
            self.name(index),
            start=start,
            end=end,
            frames=int(self._frames[index]) or None,
            crop=_crop(self._crops, index),
        )

    def sound(self, index: int) -> Sound:
        """The clip's sound file as a whole, or the stretch of its own track."""
        path, (start, end) = self.name(index), self._stretch(index)
        if self._sounds[index]:
            path, start, end = self._sounds[index], None, None
        if os.path.isdir(path):
            raise DecodeError(path, "is a folder of frames, which has no sound")
        source = _fetch(path) if "://" in path else path
        return Sound(source, path, start, end, not path.lower().endswith(SOUND_FILES))

    def _stretch(self, index: int) -> tuple[float | None, float | None]:
        """First and last second, None where the file's are meant."""
        start, end = float(self._start[index]), float(self._end[index])
        return None if math.isnan(start) else start, None if math.isnan(end) else end


class PackedSource:
    """Clips whose bytes lie in the ArrayRecord files of a packed data set.

    `start` and `end` of its records tell where in the original file the clip was cut from; the
    bytes hold that stretch only.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Lists the shards and records of a folder.

        Args:
          folder: written by `iv2 data build`, or by TFDS with the same features.
          split: only this split's shards; all by default.
          seconds: only the first so many seconds of every clip.
        """
        self._folder = os.fspath(folder)
        self._seconds = seconds
        shards = packed_shards(folder)
        if split is not None and split not in shards:
            raise DataError(f"{folder}: no split {split!r}; known: {', '.join(sorted(shards))}")
        self._files = [f for s in sorted(shards) if split in (None, s) for f in shards[s]]
        self._paths: Strings | None = None
        self._reader: Any = None
        self._lock = threading.Lock()
        self._length = len(self._records())
        self.clips: Sequence[Clip] = self._read_clips(shards, split)
        self._paths = Strings(clip.path for clip in self.clips)
        self._crops = _crops(self.clips)

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "clips": (), "_reader": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def name(self, index: int) -> str:
        """Path of the original, within the packed set."""
        path = f":{self._paths[index]}" if self._paths is not None else ""
        return f"{self._folder}[{index}]{path}"

    def open(self, index: int) -> Frames:
        """Reads the clip's bytes, or its stored frames, and opens them."""
        values, name = parse_example(self._record(index)), self.name(index)
        if values.get("frames"):
            return StoredFrames(
                values["frames"], values.get("seconds", []), name=name, end=self._seconds
            )
        data = self._file(values, index)
        if name.lower().endswith(stills.EXTENSIONS):
            return Still(data, name=name, crop=_crop(self._crops, index))
        return VideoReader(data, name=name, end=self._seconds)

    def sound(self, index: int) -> Sound:
        """The sound that was packed beside the clip, or the clip's own bytes."""
        values, name = parse_example(self._record(index)), self.name(index)
        apart, own, file = (
            next(iter(values.get(k, [])), b"") for k in ("sound", "video", "sound_path")
        )
        if not apart and not own:
            if not values.get("frames"):
                raise DecodeError(name, "is text alone, without sound")
            own = values["frames"][0]  # a file without a sound stream, as its video was
        track = apart and not file  # of a video whose frames are stored
        from_video = bool(track) or (not apart and not name.lower().endswith(SOUND_FILES))
        end = self._seconds if track or not apart else None
        return Sound(apart or own, name, None, end, from_video)

    def read_bytes(self, index: int) -> bytes:
        """The stored file of one clip."""
        return self._file(parse_example(self._record(index)), index)

    def _file(self, values: dict[str, list[Any]], index: int) -> bytes:
        """The stored file of an example."""
        data = next(iter(values.get("video", [])), b"")
        if not data:
            kind = "stored frames" if values.get("frames") else "text alone"
            raise DecodeError(self.name(index), f"is {kind}, without a file")
        return data

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


def _crops(clips: Sequence[Clip]) -> np.ndarray:
    """(n, 4) of the clips that have one, (0, 4) where none has; NaN for the others."""
    if not any(clip.crop for clip in clips):
        return np.zeros((0, 4), np.float32)
    return np.array([clip.crop or (math.nan,) * 4 for clip in clips], np.float32)


def _crop(crops: np.ndarray, index: int) -> Box | None:
    """One clip's crop."""
    if not len(crops) or np.isnan(crops[index, 0]):
        return None
    x0, y0, x1, y1 = crops[index].tolist()
    return x0, y0, x1, y1


# -- opening one clip -----------------------------------------------------------------------------


def open_frames(
    path: str,
    *,
    start: float | None = None,
    end: float | None = None,
    frames: int | None = None,
    crop: Box | None = None,
) -> Frames:
    """Opens a video, a picture or a folder of frames; a file or a URL.

    Args:
      path: where it is.
      start: first second or None.
      end: last second (not included) or None.
      frames: number of frames of a folder, None to take all it holds.
      crop: the part of a picture that counts; all by default.

    Raises:
      DecodeError: it cannot be opened.
    """
    if path.lower().endswith(stills.EXTENSIONS) and not os.path.isdir(path):
        return Still(read_bytes(path), name=path, crop=crop)
    if "://" in path:
        return VideoReader(_fetch(path), name=path, start=start, end=end)
    if os.path.isdir(path):
        if start is not None or end is not None:
            raise DecodeError(path, "is a folder of frames, which has no seconds to cut at")
        return FrameFolder(path, frames)
    return VideoReader(path, start=start, end=end)


_fetched = threading.local()  # each thread's last URL: pictures and sound are read one by one


def _fetch(path: str) -> bytes:
    """The bytes of a URL, loaded once for the two reads of a clip."""
    last, data = getattr(_fetched, "last", ("", b""))
    if last == path:
        _fetched.last = ("", b"")
        return data
    data = read_bytes(path)
    _fetched.last = (path, data)
    return data


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
