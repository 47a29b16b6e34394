"""Clips stored as some of their frames, each a JPEG picture: the cheapest clips to read.

`builders.frames` writes them and `sources.PackedSource` opens them. Only the pictures that are
asked for are decoded. Pixels are what FFmpeg's decoder and converter make of them, as with videos
(`decode`); that takes half the time of Pillow.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import av
import av.error
import av.video.reformatter
import numpy as np

from iv2_jax.data.decode import DecodeError

_decoders = threading.local()  # one a thread: none is safe for use by two


class StoredFrames:
    """An open clip of stored frames; see `sources.Frames`.

    Attributes:
      name: what messages call the clip.
      warnings: empty; here for the protocol.
      presampled: these frames are a choice already made, not all that the clip had.
    """

    presampled = True

    def __init__(
        self,
        pictures: Sequence[bytes],
        seconds: Sequence[float],
        *,
        name: str,
        end: float | None = None,
    ) -> None:
        """Takes the files and when they are shown.

        Args:
          pictures: (n,) JPEG files in the order of time, of one size.
          seconds: (n,) ascending seconds from the clip's beginning.
          name: name for messages.
          end: only the frames before this second; at least the first.

        Raises:
          DecodeError: there are not as many times as pictures, or none.
        """
        if len(pictures) != len(seconds) or not pictures:
            raise DecodeError(name, f"has {len(pictures)} pictures and {len(seconds)} times")
        count = len(pictures)
        if end is not None:
            count = max(int(np.searchsorted(np.asarray(seconds), end, "left")), 1)
        self.name = name
        self.warnings: list[str] = []
        self.timestamps = np.asarray(seconds[:count], np.float64)
        self._pictures = pictures[:count]

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def fps(self) -> float:
        """Stored frames a second; 0 where there is but one."""
        span = float(self.timestamps[-1] - self.timestamps[0])
        return (len(self) - 1) / span if span > 0 else 0.0

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8 RGB of the frames with these indices.

        Raises:
          IndexError: an index is negative or not below `len(self)`.
          DecodeError: a picture does not decode, or is not of the size of the first.
        """
        chosen = np.asarray(indices, np.int64)
        if chosen.size == 0:
            raise ValueError("no frame is asked for")
        if chosen.min() < 0 or chosen.max() >= len(self):
            raise IndexError(
                f"{self.name}: frames {chosen.min()}..{chosen.max()} are asked for, it stores "
                f"{len(self)}"
            )
        wanted, places = np.unique(chosen, return_inverse=True)
        frames: np.ndarray | None = None
        for at, index in enumerate(wanted.tolist()):
            pixels = self._decode(index)
            if frames is None:
                frames = np.empty((len(wanted), *pixels.shape), np.uint8)
            if pixels.shape != frames.shape[1:]:
                raise DecodeError(self.name, f"its picture {index} has a size of its own")
            frames[at] = pixels
        assert frames is not None  # there was an index
        return frames if len(wanted) == len(chosen) and _rising(places) else frames[places]

    def close(self) -> None:
        """Nothing is open between reads."""

    def _decode(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 of one picture."""
        codec, converter = _decoder()
        if not self._pictures[index]:  # to the decoder no bytes are the end of all pictures
            raise DecodeError(self.name, f"its picture {index} is empty")
        try:
            decoded = codec.decode(av.Packet(self._pictures[index]))
        except (av.error.FFmpegError, ValueError) as e:
            codec.flush_buffers()
            reason = getattr(e, "strerror", None) or str(e)
            raise DecodeError(self.name, f"its picture {index} does not decode: {reason}") from e
        if len(decoded) != 1 or decoded[0].is_corrupt:
            raise DecodeError(self.name, f"its picture {index} is damaged")
        return converter.reformat(decoded[0], format="rgb24", threads=1).to_ndarray()


def _rising(places: np.ndarray) -> bool:
    """Whether every picture is asked for once, in the order of time."""
    return bool(np.array_equal(places, np.arange(len(places))))


def _decoder() -> tuple[av.VideoCodecContext, av.video.reformatter.VideoReformatter]:
    """This thread's JPEG decoder and colour converter."""
    if not hasattr(_decoders, "pair"):
        codec = av.VideoCodecContext.create("mjpeg", "r")
        codec.thread_type, codec.thread_count = "NONE", 1
        codec.options = {"err_detect": "explode"}  # damage is an error, not a grey picture
        _decoders.pair = codec, av.video.reformatter.VideoReformatter()
    return _decoders.pair
