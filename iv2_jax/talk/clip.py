"""A clip as the chat model sees it: chosen frames, their times, and the views made of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import av.error
import numpy as np

from iv2_jax.data import packets
from iv2_jax.data.closing import Closing
from iv2_jax.data.containers import DecodeError, largest_picture, open_container
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.instruct.conversations import kind_of
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.rows import load_views, sampling_rule
from iv2_jax.data.sources import Frames, open_frames
from iv2_jax.data.tiles import hd_views
from iv2_jax.errors import DataError

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".ogv")
LONG = 600.0  # seconds from which on a file is sought, not listed from end to end
_SHOWN_SIDE = 320  # longer side, in pixels, of the frames that people are shown
_MOST_DECODED = 1500  # frames decoded behind a jump before the latest one is taken


@dataclasses.dataclass(frozen=True, eq=False)
class SeenClip:
    """What a model saw of a file.

    Attributes:
      path: the file.
      kind: `video` or `image`.
      views: `(V, T, S, S, 3)` uint8, or float32 in the units of pixels with tiles.
      frames: T pictures `(H, W, 3)` uint8 for people, upright and made smaller.
      times: second of each frame; None for a picture and for a folder of pictures.
      numbers: `(T,)` number of each frame in the file; of long files by the nominal rate.
      seconds: how long the file is; None as for `times`.
      notes: sentences about oddities of the file.
    """

    path: str
    kind: str
    views: np.ndarray
    frames: tuple[np.ndarray, ...]
    times: tuple[float, ...] | None
    numbers: tuple[int, ...]
    seconds: float | None
    notes: tuple[str, ...] = ()

    @property
    def captions(self) -> list[str]:
        """A short text for each frame: when it is shown."""
        if self.kind == "image":
            return ["picture"]
        if self.times is None:
            return [f"frame {number}" for number in self.numbers]
        return [clock(second) for second in self.times]

    def describe(self) -> str:
        """What was seen, in a line."""
        height, width = self.frames[0].shape[:2]
        views = (
            f", {len(self.views)} views each (tiles and the whole)" if len(self.views) > 1 else ""
        )
        if self.kind == "image":
            return f"a picture of {width}x{height} pixels{views}"
        count = len(self.frames)
        if self.seconds is None:
            return f"{count} of the folder's frames: {', '.join(map(str, self.numbers))}{views}"
        times = ", ".join(self.captions)
        return f"{count} frames of {clock(self.seconds)}, at {times}{views}"


def see(path: str | os.PathLike[str], talk: TalkConfig) -> SeenClip:
    """Decodes what a model sees of a video, a picture or a folder of pictures.

    Frames are those of the model's evaluation rule (spec stage3 4.4). A file of more than ten
    minutes is not read from end to end: its frames are sought, so three hours take no longer.

    Args:
      path: the file or folder.
      talk: how frames and views are made.

    Raises:
      DecodeError: it is missing, corrupt, has no pictures, or is of no kind that is known.
    """
    path = os.path.expanduser(os.fspath(path).strip())
    if not path:
        raise DataError("give the path of a clip")
    if "\0" in path:
        raise DecodeError(path.replace("\0", "\\0"), "is no path: it has a zero byte in it")
    kind = "video" if os.path.isdir(path) else kind_of(path)
    clip = _Recorded(open_clip(path))
    try:
        views = _views(clip, talk, talk.view_config(kind))
    finally:
        clip.close()
    return SeenClip(
        path,
        kind,
        views,
        tuple(small(frame) for frame in clip.frames),
        None if clip.times is None else tuple(float(clip.times[i]) for i in clip.chosen),
        tuple(int(i) for i in clip.chosen),
        clip.seconds,
        tuple(clip.warnings),
    )


def _views(clip: _Recorded, talk: TalkConfig, config: DataConfig) -> np.ndarray:
    """`(V, T, S, S, 3)` as evaluation makes them."""
    if talk.tiling is None:
        return load_views(clip, config, np.random.default_rng(0))
    _, evaluate = sampling_rule(clip, config)
    return hd_views(clip.read(evaluate(len(clip), config.frames, 0, 1)), talk.tiling)


def open_clip(path: str) -> Frames:
    """Opens a clip of any kind; long videos are sought."""
    if "://" in path:
        return open_frames(path)
    if os.path.isdir(path):
        videos = sorted(f.name for f in Path(path).iterdir() if f.suffix.lower() in VIDEOS)
        if videos:
            raise DecodeError(path, f"is a folder; give one of its files, such as {videos[0]}")
        return open_frames(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise DecodeError(path, "is no regular file")
    if kind_of(path) == "video":
        long = SoughtVideo.open(path)
        if long is not None:
            return long
    return open_frames(path)


class _Recorded:
    """An open clip that remembers which frames were read of it."""

    def __init__(self, clip: Frames) -> None:
        self._clip = clip
        self.warnings: list[str] = []
        self.chosen: list[int] = []
        self.frames: np.ndarray = np.zeros((0, 1, 1, 3), np.uint8)
        self.path = getattr(clip, "path", "")
        self.times: np.ndarray | None = getattr(clip, "timestamps", None)
        self.fps: float | None = getattr(clip, "fps", None)
        self.seconds: float | None = None
        if self.times is not None:
            step = 1 / self.fps if self.fps else 0.0
            self.seconds = float(self.times[-1]) + step

    def __len__(self) -> int:
        return len(self._clip)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `sources.Frames.read`."""
        self.chosen = [int(i) for i in indices]
        self.frames = self._clip.read(indices)
        self.warnings = list(self._clip.warnings)
        return self.frames

    def close(self) -> None:
        """Frees the file."""
        self._clip.close()


class SoughtVideo(Closing):
    """A long video whose frames are found by seeking, by the container's duration and mean rate.

    The packets of a film are gigabytes, so they are not counted. A frame asked for is the one on
    screen at its nominal time; the work for it is what lies between it and the keyframe before it.

    Attributes:
      warnings: as of `VideoReader`.
      fps: mean frames per second.
      timestamps: nominal second of each frame.
    """

    def __init__(
        self, path: str, container: av.container.InputContainer, seconds: float, fps: float
    ) -> None:
        self._path, self._container = path, container
        self._stream = largest_picture(container)
        self._stream.thread_type = "AUTO"
        for stream in container.streams:
            if stream.index != self._stream.index:
                stream.discard = av.stream.Discard.all
        self.warnings: list[str] = []
        self.path, self.fps = path, fps
        self.timestamps = np.arange(max(int(seconds * fps), 1)) / fps

    @classmethod
    def open(cls, path: str) -> SoughtVideo | None:
        """Opens a file if it is a long video that says its duration; None for any other.

        Raises:
          DecodeError: it cannot be opened.
        """
        container = open_container(path, path)
        stream = largest_picture(container)
        seconds = (container.duration or 0) / av.time_base
        rate = stream and (stream.average_rate or stream.guessed_rate)
        if not rate or seconds < LONG:
            container.close()
            return None
        return cls(path, container, seconds, float(rate))

    def __len__(self) -> int:
        return len(self.timestamps)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `sources.Frames.read`; frames are brought to the size of the first.

        Raises:
          DecodeError: no frame decodes at a time; the file may be cut off.
        """
        found: dict[int, np.ndarray] = {}
        for index in np.unique(np.asarray(indices, np.int64)).tolist():
            size = next(iter(found.values())).shape[:2] if found else None
            try:
                found[index] = self._at(float(self.timestamps[index]), size)
            except packets.READ_ERRORS as e:
                raise DecodeError(
                    self._path,
                    f"cannot be decoded at {clock(self.timestamps[index])}: {packets.reason(e)}",
                ) from e
        return np.stack([found[int(i)] for i in indices])

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def _at(self, second: float, size: tuple[int, int] | None) -> np.ndarray:
        """The frame on screen at a time, upright `(H, W, 3)` uint8."""
        unit = float(self._stream.time_base)
        wanted = (self._stream.start_time or 0) + round(second / unit)
        shown: av.VideoFrame | None = None
        for count, frame in enumerate(self._frames(wanted)):
            if frame.pts is not None and frame.pts > wanted and shown is not None:
                break
            shown = frame
            if frame.pts is None or frame.pts >= wanted or count >= _MOST_DECODED:
                break
        if shown is None:
            raise DecodeError(self._path, f"has no frame at {clock(second)}; is it cut off?")
        late = (wanted - (wanted if shown.pts is None else shown.pts)) * unit
        if late > 1 + 2 / self.fps:
            self.warnings.append(
                f"has no frame at {clock(second)}: the one at {clock(second - late)} stands in; is "
                "the file cut off?"
            )
        turns = round((shown.rotation or 0) / 90) % 4
        height, width = size or (None, None)
        if turns % 2:
            height, width = width, height
        pixels = shown.reformat(width=width, height=height, format="rgb24").to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels

    def _frames(self, pts: int) -> Iterator[av.VideoFrame]:
        """Frames from the keyframe before a timestamp on."""
        self._container.seek(pts, stream=self._stream, backward=True)
        yield from self._container.decode(self._stream)


def clock(second: float) -> str:
    """A time as people write it: `3.2 s`, `12:05`, `2:59:59`."""
    if second < 60:
        return f"{second:.1f} s"
    minutes, seconds = divmod(int(second), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def small(frame: np.ndarray) -> np.ndarray:
    """A frame whose longer side is at most `_SHOWN_SIDE`."""
    from PIL import Image

    picture = Image.fromarray(frame)
    picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    return np.asarray(picture)
