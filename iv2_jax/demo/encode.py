"""Writes prepared clips: H.264 that is cheap to decode, with sound."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.video.reformatter
import numpy as np

KEYFRAME_EVERY = 16  # frames; seeking decodes at most that many
AUDIO_RATE = 32000  # Hz of the stored sound; AAC knows only a few rates

# One thread and no lookahead that depends on load: the same frames give the same file.
_X264 = {
    "preset": "ultrafast",
    "tune": "fastdecode",
    "crf": "20",
    "x264-params": f"keyint={KEYFRAME_EVERY}:min-keyint={KEYFRAME_EVERY}:scenecut=0:bframes=0",
    "threads": "1",
}
_AAC = {"aac_coder": "fast"}  # the default takes 23 ms for two seconds of sound


class Sound(NamedTuple):
    """Mono sound: samples (n,) int16 and their rate in Hz."""

    samples: np.ndarray
    rate: int


def write_clip(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    *,
    fps: Fraction,
    size: tuple[int, int] | None = None,
    sound: Sound | None = None,
) -> None:
    """Encodes one clip as mp4; the file appears only when it is complete.

    Args:
        path: file to write.
        frames: (T, H, W, 3) uint8 RGB.
        fps: frames per second.
        size: height and width to store, both even; None keeps those of the frames.
        sound: muxed as AAC when given; starts with the first frame.
    """
    height, width = size or frames.shape[1:3]
    path = Path(path)
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    with av.open(os.fspath(part), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options=dict(_X264))
        video.height, video.width = height, width
        video.pix_fmt = "yuv420p"
        audio = (
            container.add_stream("aac", rate=AUDIO_RATE, layout="mono", options=dict(_AAC))
            if sound
            else None
        )
        to_yuv = av.video.reformatter.VideoReformatter()  # keeps its tables from frame to frame
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = to_yuv.reformat(frame, width, height, "yuv420p", interpolation="AREA")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if sound:
            _mux_sound(container, audio, sound)
    part.replace(path)


def _mux_sound(
    container: av.container.OutputContainer, stream: av.AudioStream, sound: Sound
) -> None:
    """Resamples and encodes the sound."""
    frame = av.AudioFrame.from_ndarray(sound.samples[None], format="s16", layout="mono")
    frame.sample_rate = sound.rate
    frame.time_base = Fraction(1, sound.rate)
    frame.pts = 0
    resampler = av.AudioResampler(
        format="fltp", layout="mono", rate=AUDIO_RATE, frame_size=stream.frame_size or 1024
    )
    for piece in (*resampler.resample(frame), *resampler.resample(None)):
        container.mux(stream.encode(piece))
    container.mux(stream.encode(None))
