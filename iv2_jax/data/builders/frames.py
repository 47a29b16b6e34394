"""Brings a clip down to some of its frames as JPEG pictures, and its sound beside them."""

from __future__ import annotations

import dataclasses
import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from iv2_jax.data import audio, augment, sampling
from iv2_jax.data.records import Clip
from iv2_jax.data.sources import open_frames, read_bytes
from iv2_jax.errors import DataError

_FOLDER_RATE = 25.0  # frames per second given to folders of frames, which have no clock


@dataclasses.dataclass(frozen=True)
class FrameOptions:
    """Which frames of a clip are stored, and how.

    Attributes:
      count: frames to a clip; a shorter clip repeats some, as the rule does.
      sampling: rule that picks them, in its evaluation form (`sampling.rule`).
      crop: side of a square: the short side is brought to it and the middle taken, exactly the
        view of `data.augment="center"`; None stores whole pictures.
      short_side: whole pictures: bring a longer short side down to this; None leaves sizes alone.
      quality: of the JPEG pictures, 1 to 100.
    """

    count: int
    sampling: str = "middle"
    crop: int | None = None
    short_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        sampling.rule(self.sampling)
        for field, least, most in (
            ("count", 1, 4096),
            ("crop", 16, 4096),
            ("short_side", 16, 4096),
            ("quality", 1, 100),
        ):
            value = getattr(self, field)
            if value is not None and not least <= value <= most:
                raise DataError(f"frames.{field} must be from {least} to {most}, is {value}")
        if self.crop and self.short_side:
            raise DataError("frames.crop and frames.short_side exclude each other")


@dataclasses.dataclass(frozen=True)
class Stored:
    """Pictures of one clip: JPEG files, and seconds from its beginning, in the order of time."""

    pictures: list[bytes]
    seconds: list[float]


def store_frames(clip: Clip, options: FrameOptions) -> Stored:
    """Samples, decodes, crops and compresses.

    Args:
      clip: a video or a folder of frames.
      options: which and how.

    Raises:
      DecodeError: the clip does not decode.
    """
    frames = open_frames(clip.path, start=clip.start, end=clip.end, frames=clip.frames)
    try:
        times = getattr(frames, "timestamps", None)
        if times is None:
            times = np.arange(len(frames)) / _FOLDER_RATE
        _, pick = sampling.rule(options.sampling, fps=getattr(frames, "fps", None))
        chosen = np.sort(pick(len(frames), options.count, 0, 1))
        pixels = _resized(frames.read(chosen), options)
    finally:
        frames.close()
    seconds = (times[chosen] - times[0]).tolist()
    return Stored([_jpeg(picture, options.quality) for picture in pixels], seconds)


def sound_track(clip: Clip) -> bytes:
    """The clip's own sound as FLAC (16 kHz, one channel), nothing where it has none.

    Raises:
      DecodeError: there is sound that does not decode.
    """
    source = read_bytes(clip.path) if "://" in clip.path else clip.path
    samples = audio.load_waveform(
        source, start=clip.start, end=clip.end, name=clip.path, warnings=[]
    )
    if samples is None or not len(samples):
        return b""
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as output:
        stream = output.add_stream("flac", rate=audio.SAMPLE_RATE, layout="mono")
        stream.format = "s16"
        integers = np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(integers[None], format="s16", layout="mono")
        frame.rate, frame.pts = audio.SAMPLE_RATE, 0
        frame.time_base = Fraction(1, audio.SAMPLE_RATE)
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def _resized(frames: np.ndarray, options: FrameOptions) -> np.ndarray:
    """(T, H, W, 3): the crop, or the pictures made smaller."""
    if options.crop:
        return augment.eval_views(frames, options.crop)[0]
    height, width = frames.shape[1:3]
    if options.short_side and min(height, width) > options.short_side:
        return augment.pil_resize(
            frames, *augment.short_side_size(height, width, options.short_side)
        )
    return frames


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """A JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()
