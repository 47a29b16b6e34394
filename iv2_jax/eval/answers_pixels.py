"""Views of the clips that questions are about: as the run reads them, or as MVBench does."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
import threading
from collections.abc import Sequence

import numpy as np

from iv2_jax.data import augment
from iv2_jax.data.augment_stage2 import bicubic_resize
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.instruct.conversations import Medium
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.rows import load_views, sampling_rule
from iv2_jax.data.sources import Frames, open_frames
from iv2_jax.data.tiles import hd_views
from iv2_jax.errors import ConfigError, nearest

PROTOCOLS = ("run", "mvbench")
FOLDER_FPS = 3.0  # of folders of frames, as TVQA's (spec stage3 11.1)
_GIF_FPS = 25.0
_KEPT = 8  # clips whose views stay decoded: several questions in a row are about one


def bound_frames(
    num_available: int,
    num_frames: int,
    fps: float,
    start: float | None = None,
    end: float | None = None,
    *,
    first: int = 0,
) -> np.ndarray:
    """MVBench's frames of a stretch (spec stage3 11.1).

    The numbers are those of the file; the stretch's last frame is one of them at most, so that the
    frames lie a little early.

    Args:
      num_available: n, frames of the file.
      num_frames: T.
      fps: frames per second of the file.
      start: first second, None for the beginning.
      end: last second, None for the end.
      first: number of the first frame as the original counts: 1 for folders of frames, 0 otherwise.

    Returns:
      `(T,)` int64 numbers from 0 on, all within the file.
    """
    # The original takes n - 1 as the last number of a video and n as that of a folder.
    last = num_available - 1 + first
    low = first if start is None else max(first, round(start * fps))
    high = last if end is None else min(round(end * fps), last)
    segment = (high - low) / num_frames
    chosen = [int(low + segment / 2 + round(segment * i)) - first for i in range(num_frames)]
    # A stretch that begins behind the last frame gives numbers that no file has.
    return np.clip(np.array(chosen, np.int64), 0, num_available - 1)


class ClipViews:
    """Loads the views of clips; the last ones stay in memory. Safe to use from several threads."""

    def __init__(self, talk: TalkConfig, *, protocol: str = "run") -> None:
        """Takes how clips are read.

        Args:
          talk: of the model: frames, size, tiles.
          protocol: `run`: frames and resizing as in the run's chats. `mvbench`: the benchmark's
            frames, and a bicubic resize of the short side before the centre crop.

        Raises:
          ConfigError: the protocol is not known.
        """
        if protocol not in PROTOCOLS:
            raise ConfigError(f"protocol {protocol!r} is not known{nearest(protocol, PROTOCOLS)}")
        self._talk, self._protocol = talk, protocol
        self._kept: collections.OrderedDict[Medium, concurrent.futures.Future[np.ndarray]]
        self._kept = collections.OrderedDict()
        self._lock = threading.Lock()

    def load(self, medium: Medium) -> np.ndarray:
        """All views of a clip.

        Returns:
          `(V, T, S, S, 3)`, uint8, or float32 in the units of pixels with tiles; T is 1 for images.

        Raises:
          DecodeError: the file cannot be used; says why.
        """
        with self._lock:
            views = self._kept.get(medium)
            is_new = views is None
            if views is None:
                views = self._kept[medium] = concurrent.futures.Future()
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            else:
                self._kept.move_to_end(medium)
        if is_new:
            try:
                views.set_result(self._read(medium))
            except BaseException as e:  # goes to every thread that waits for this clip
                views.set_exception(e)
        return views.result()

    def _read(self, medium: Medium) -> np.ndarray:
        """Opens, picks frames, resizes."""
        folder = os.path.isdir(medium.path)
        video = medium.kind == "video"
        released = self._protocol == "mvbench" and video
        # The benchmark counts from the file's beginning; seconds of a folder are counted here.
        whole = released or folder or not video
        start, end = (None, None) if whole else (medium.start, medium.end)
        clip = open_frames(medium.path, start=start, end=end)
        try:
            if released:
                fps = FOLDER_FPS if folder else getattr(clip, "fps", 0.0)
                fps = _GIF_FPS if medium.path.lower().endswith(".gif") else fps
                chosen = bound_frames(
                    len(clip),
                    self._talk.frames,
                    fps,
                    medium.start,
                    medium.end,
                    first=1 if folder else 0,
                )
                return self._benchmark_views(clip.read(chosen))
            return self._views(_Stretch(clip, medium) if folder and video else clip, medium.kind)
        finally:
            clip.close()

    def _benchmark_views(self, frames: np.ndarray) -> np.ndarray:
        """Tiles, or the centre of the frames resized as the benchmark's code does."""
        if self._talk.tiling is not None:
            return hd_views(frames, self._talk.tiling)
        size = self._talk.size
        height, width = augment.short_side_size(*frames.shape[1:3], size)
        rows, columns = augment.center_window(height, width, size)
        resized = bicubic_resize(frames, height, width)[:, rows, columns]
        return np.ascontiguousarray(resized)[None]

    def _views(self, clip: Frames, kind: str) -> np.ndarray:
        """The evaluation view of the run."""
        config = self._talk.view_config(kind)
        if self._talk.tiling is None:
            # No draw is made for an evaluation view.
            return load_views(clip, config, np.random.default_rng(0), flip=False)
        _, evaluate = sampling_rule(clip, config)
        return hd_views(clip.read(evaluate(len(clip), config.frames, 0, 1)), self._talk.tiling)


@dataclasses.dataclass
class _Stretch:
    """The frames of a folder between two seconds."""

    clip: Frames
    medium: Medium

    def __post_init__(self) -> None:
        self.warnings = self.clip.warnings
        start, end = self.medium.start, self.medium.end
        low = 0 if start is None else int(start * FOLDER_FPS)
        high = len(self.clip) if end is None else min(round(end * FOLDER_FPS), len(self.clip))
        if low >= high:
            raise DecodeError(
                self.medium.path,
                f"has {len(self.clip)} frames at {FOLDER_FPS:g} a second, none from {start} s to "
                f"{end} s",
            )
        self._first, self._count = low, high - low

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `sources.Frames.read`."""
        return self.clip.read(np.asarray(indices) + self._first)

    def close(self) -> None:
        """Closes the folder."""
        self.clip.close()
